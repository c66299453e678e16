"""Whether all ranks start the same run: the same config, code, versions, data and run folder.

Machines that differ in any of these train on without an error, towards numbers that nobody can
explain, or fail at the first checkpoint. Compared once, before the first step; every rank ends with
the same message. Clocks are not compared: nothing here depends on them.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from routedvit.training.config.differences import differences, value_at
from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.collective import broadcast, gather
from routedvit.training.distributed.connection import place
from routedvit.training.provenance import versions

PACKAGE = Path(__file__).parents[2]
# Network file systems show a new file to the other machines late, but hardly later than this.
VISIBLE_WITHIN_SECONDS = 10.0


def check_same_run(config: dict[str, Any], data: str, sources: Iterable[Path]) -> None:
    """Compare this rank with rank 0. Collective.

    Args:
        config: the resolved run config.
        data: names the training data by its content.
        sources: files and folders of code beyond this package.

    Raises:
        ConfigError: some rank differs from rank 0; it names the first difference.
    """
    mine = {
        "config": json.loads(json.dumps(config)),
        "data": data,
        "versions": versions(),
        "code": code_hashes([PACKAGE, *sources]),
    }
    reference, where = broadcast((mine, place(0)))
    keys = list(differences(reference, mine))
    fault = None
    if keys:
        here, there = value_at(mine, keys[0]), value_at(reference, keys[0])
        more = f" (and {len(keys) - 1} more differences)" if len(keys) > 1 else ""
        fault = f"{place(dist.get_rank())} has {keys[0]} = {here}, {where} has {there}{more}"
    _raise_together(
        fault, "the ranks do not start the same run: {}; give every machine the same checkout, "
        "environment, data and command",
    )  # fmt: skip


def check_shared_folder(path: Path, *, seconds: float = VISIBLE_WITHIN_SECONDS) -> None:
    """Rank 0 writes a file into the run folder, and all others must find it. Collective.

    Raises:
        ConfigError: some rank does not see rank 0's folder, or may not write there.
    """
    # A name that was never looked up: NFS remembers for a while that a file was absent.
    name = broadcast(f".seen_by_all_ranks_{uuid.uuid4().hex}")
    token = path / name
    if dist.get_rank() == 0:
        token.touch()
    dist.barrier()
    fault = None
    if not _wait_until(token.exists, seconds):
        fault = f"{place(dist.get_rank())} does not see the files of rank 0 in {path.absolute()}"
    elif not os.access(path, os.W_OK):
        fault = f"{place(dist.get_rank())} may not write into {path.absolute()}"
    try:
        _raise_together(
            fault, "output_dir: {}; checkpoints need a folder on a file system that all machines "
            "share, at the same path",
        )  # fmt: skip
    finally:
        if dist.get_rank() == 0:
            token.unlink()


def code_hashes(roots: Iterable[Path]) -> dict[str, str]:
    """SHA-256 (its first 12 digits) of every Python file below `roots`, by relative name."""
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            # no dots: they separate keys
            name = str(path.relative_to(root.parent).with_suffix(""))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def _raise_together(fault: str | None, message: str) -> None:
    faults = gather(fault)
    if first := next(filter(None, faults), None):
        others = sum(found is not None for found in faults) - 1
        raise ConfigError(message.format(first + (f" ({others} more ranks)" if others else "")))


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
