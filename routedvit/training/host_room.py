"""Whether the memory of the host has room for something large.

What the machine says it has, and what is left below the limits of the cgroups that this process is
in, a container's or a job's, of either version. A limit counts pages of files too, which are given
up at need.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP, MACHINE = Path("/proc/self/cgroup"), Path("/proc/meminfo")
SPARE = 0.1  # of what is free, for what else grows


class _Names(NamedTuple):
    """What the files of a cgroup are called."""

    root: str  # below GROUPS
    limits: tuple[str, ...]
    used: str
    files: tuple[str, ...]  # keys in memory.stat


UNIFIED = _Names(
    "", ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
)  # fmt: skip
FIRST = _Names(
    "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)  # fmt: skip


def has_room_for(size: int) -> bool:
    """Whether the processes of this machine may take `size` bytes more, together.

    True where the system does not say, or in words that are not known here.
    """
    try:
        return all(size < (1 - SPARE) * free for free in (*_in_machine(), *_in_groups()))
    except (ValueError, LookupError):
        return True


def _in_machine() -> Iterator[int]:
    for line in _lines(MACHINE):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _in_groups() -> Iterator[int]:
    for line in _lines(MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            names = FIRST if controllers else UNIFIED
            place = GROUPS / names.root / path.strip("/")
            for folder in (place, *place.parents):
                if folder.is_relative_to(GROUPS):  # in a container the path may be another's
                    yield from _in_group(folder, names)


def _in_group(folder: Path, names: _Names) -> Iterator[int]:
    limits = ["".join(_lines(folder / limit)) for limit in names.limits]
    used = "".join(_lines(folder / names.used))
    if used.isdecimal():
        stat = dict(line.split() for line in _lines(folder / "memory.stat"))
        kept = sum(int(stat.get(key, 0)) for key in names.files)
        # 'max' is no limit
        yield from (int(limit) - int(used) + kept for limit in limits if limit.isdecimal())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
