"""Whether a checkpoint is whole, found by all ranks together: each hashes a share of the files."""

import os
import time
from pathlib import Path

from routedvit.training.checkpoints.manifest import (
    MANIFEST,
    Fingerprint,
    first_fault,
    read_manifest,
    run_id,
)
from routedvit.training.config.base import ConfigError
from routedvit.training.engine import Engine

SECONDS_TO_APPEAR = 60.0  # NFS's acdirmax


def find_fault(engine: Engine, folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole. Collective.

    Raises:
        ConfigError: on every rank, if any cannot read it: that says nothing about the files.
    """
    fault: str | None = None
    trouble: str | None = None
    files: dict[str, Fingerprint] = {}
    if engine.rank == 0:  # it lists the whole folder, which all ranks at once are not to do
        look_anew(folder)
        fault, trouble, files = _read(folder)
    fault, trouble, files = engine.broadcast((fault, trouble, files))
    try:
        share = list(files)[engine.rank :: engine.world_size]
        own = {name: files[name] for name in share}
        if engine.rank == 0:
            fault = fault or first_fault(folder, own)
        elif fault is None:
            look_anew(folder)
            fault = first_fault(folder, own, is_there=_appears)
    except FileNotFoundError as error:
        fault = f"{MANIFEST}: {error}"
    except OSError as error:
        trouble = f"rank {engine.rank}: {error}"
    outcomes = engine.gather((fault, trouble))
    if found := next((trouble for _, trouble in outcomes if trouble), None):
        raise ConfigError(
            f"{folder} cannot be read ({found}); it may be whole and stays where it is: see to "
            "the disk and its rights and start again, or move it elsewhere to go without it"
        )
    return next((fault for fault, _ in outcomes if fault), None)


def look_anew(folder: Path) -> None:
    """Make a client of NFS ask its server what is in a folder and where it stands.

    Who has once looked for a name in vain is told so again from a cache, for up to a minute, unless
    the folder that should have it is opened (close-to-open consistency, nfs(5)).
    """
    for path in (folder.parent, folder):
        try:
            os.scandir(path).close()
        except OSError:
            return  # whoever reads it tells


def _appears(path: Path) -> bool:
    """Whether this rank comes to see a file that rank 0 has seen."""
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
        look_anew(path.parent)
    return True


def _read(folder: Path) -> tuple[str | None, str | None, dict[str, Fingerprint]]:
    """Fault, trouble and files of a manifest. Rank 0."""
    try:
        return None, None, read_manifest(folder, run_id(folder.parent))
    except (FileNotFoundError, ValueError) as error:
        return f"{MANIFEST}: {error}", None, {}
    except OSError as error:
        return None, f"rank 0: {error}", {}
