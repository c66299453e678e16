"""Whether the memory of the host has room for something large.

What the machine says it has, and what is left below the limits of the cgroups that this process is
in, a container's or a job's, of either version. A limit counts pages of files too, which are given
up at need.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP, MACHINE = Path("/proc/self/cgroup"), Path("/proc/meminfo")
SPARE = 0.1  # of what is free, for what else grows


class _Names(NamedTuple):
    """What the files of a cgroup are called."""

    root: str  # below GROUPS
    limit: str
    used: str
    files: str  # a key in memory.stat


UNIFIED = _Names("", "memory.max", "memory.current", "inactive_file")
FIRST = _Names(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)  # fmt: skip


def has_room_for(size: int) -> bool:
    """Whether all ranks of this machine may take `size` bytes more each.

    True where the system does not say.
    """
    wanted = size * _ranks_here()
    return all(wanted < (1 - SPARE) * free for free in (*_in_machine(), *_in_groups()))


def _ranks_here() -> int:
    """As the launcher says (torchrun, deepspeed), else one a GPU."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return max(1, torch.cuda.device_count())


def _in_machine() -> Iterator[int]:
    for line in _lines(MACHINE):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _in_groups() -> Iterator[int]:
    for line in _lines(MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            names = FIRST if controllers else UNIFIED
            place = GROUPS / names.root / path.strip("/")
            for folder in (place, *place.parents):
                if folder.is_relative_to(GROUPS):  # in a container the path may be another's
                    yield from _in_group(folder, names)


def _in_group(folder: Path, names: _Names) -> Iterator[int]:
    limit = "".join(_lines(folder / names.limit))
    used = "".join(_lines(folder / names.used))
    if limit.isdecimal() and used.isdecimal():  # 'max' is none
        kept = dict(line.split() for line in _lines(folder / "memory.stat"))
        yield int(limit) - int(used) + int(kept.get(names.files, 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
