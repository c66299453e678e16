"""Who may read what a run leaves: as the user's umask says, also where a library says otherwise."""

import os
from pathlib import Path


def as_umask_says(path: Path) -> None:
    """Give a file the mode of one made by `open`.

    safetensors 0.8 makes files that nobody but their owner can read; colleagues share run folders.
    """
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    path.chmod(0o666 & ~umask)
