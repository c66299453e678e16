"""What Linux tells about processes; None, or empty, where there is no /proc or no such process."""

from pathlib import Path

# Positions in /proc/PID/stat behind the name: proc(5) counts from 1 and the state is its third.
STATE, PARENT, START_TIME = 0, 1, 19


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name."""
    try:
        # "pid (name) state parent ...", and the name may hold anything, brackets too.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def parent_of(pid: int) -> int | None:
    """Parent of a process."""
    fields = stat_of(pid)
    return int(fields[PARENT]) if fields else None


def birth_of(pid: int) -> str | None:
    """When a living process began, in ticks since the machine did: with the pid, what it is."""
    fields = stat_of(pid)
    return fields[START_TIME] if fields and fields[STATE] not in "ZX" else None  # zombies are dead


def command_of(pid: int) -> str:
    """The command line of a process, its words separated by spaces."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def boot_id() -> str:
    """A name for this machine since it was last switched on."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
