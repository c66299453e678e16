"""Exclusive file locks among the processes and threads of a node (flock, which NFS knows too)."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Busy(Exception):
    """Somebody else has the lock, or the room, and this caller does not wait for it."""


@contextmanager
def locked(path: Path, *, wait: bool = True, remove: bool = False) -> Iterator[io.FileIO]:
    """The open lock file at `path`; Busy when it is another's and not to be waited for.

    With `remove` it goes with the last who wants it, so locks of a million shards leave no files.
    """
    with _owned(path, wait) as file:
        try:
            yield file
        finally:
            if remove:
                path.unlink(missing_ok=True)


def _owned(path: Path, wait: bool) -> io.FileIO:
    while True:
        file = io.FileIO(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise Busy from None
        # its last owner may have removed it: that lock keeps nobody out any more
        if _is_still_at(path, file):
            return file
        file.close()


def _is_still_at(path: Path, file: io.FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file."""
    # opened for writing, since NFS refuses an exclusive lock on anything else
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
