"""Whether a checkpoint is whole, found by all ranks together: each hashes a share of the files."""

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


def find_fault(engine: Engine, folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole. Collective.

    Raises:
        ConfigError: on every rank, if any cannot read it: that says nothing about the files.
    """
    fault: str | None = None
    trouble: str | None = None
    files: dict[str, Fingerprint] = {}
    if engine.rank == 0:  # it lists the whole folder, which all ranks at once are not to do
        fault, trouble, files = _read(folder)
    fault, trouble, files = engine.broadcast((fault, trouble, files))
    try:
        share = list(files)[engine.rank :: engine.world_size]
        fault = fault or first_fault(folder, {name: files[name] for name in share})
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


def _read(folder: Path) -> tuple[str | None, str | None, dict[str, Fingerprint]]:
    """Fault, trouble and files of a manifest. Rank 0."""
    try:
        return None, None, read_manifest(folder, run_id(folder.parent))
    except (FileNotFoundError, ValueError) as error:
        return f"{MANIFEST}: {error}", None, {}
    except OSError as error:
        return None, f"rank 0: {error}", {}
