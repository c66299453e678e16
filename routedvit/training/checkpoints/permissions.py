"""Who may read what a run leaves: as the user's umask says, also where a library says otherwise."""

import os
from pathlib import Path


def as_umask_says(path: Path) -> None:
    """Give a file the mode of one made by `open`.

    safetensors 0.8 makes files that nobody but their owner can read; colleagues share run folders.
    """
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Of this process. Linux tells it; elsewhere it can only be read by setting it, which other
    threads would see.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("\nUmask:")[1].split()[0], 8)
    except (OSError, LookupError):
        umask = os.umask(0o077)
        os.umask(umask)
        return umask
