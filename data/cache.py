"""Remote shards on this node's disk: fetched once, verified while they stream, bounded in size.

A shard is known by the SHA-256 its manifest gives: two buckets with a 000.tar each, or a shard that
was written anew, never share an entry, while a URL with a new token, or a copy of the set in
another bucket, finds what is here. One process per node fetches (a file lock), the others wait and
find it there; what is here already waits for nobody. Bytes go to a .part file, which a later
attempt, even of another process, goes on with; only content of the right length and SHA-256 gets
its final name.

How room is made is in `data.room`. What goes wrong here is this node's disk, never the shard: no
error of it may quarantine one.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from data.config import RemoteConfig
from data.errors import DataError
from data.locks import Busy, locked
from data.manifest import IndexEntry, ShardEntry
from data.remote import is_url
from data.room import Room
from data.transfer import Transfer, own_disk

GIGABYTE = 10**9
DEFAULT_FOLDER = "~/.cache/routedvit/shards"
_ROOM_PAUSE = 0.1  # seconds between two looks while others' fetches take all the room


def folder_of(remote: RemoteConfig) -> Path:
    """Where shards are kept: data.remote.cache_dir, or the disk that the environment names.

    $TMPDIR is not asked: it often is memory, which 100 GB of shards would fill.
    """
    job = os.environ.get("SLURM_TMPDIR")
    default = f"{job}/routedvit/shards" if job else DEFAULT_FOLDER
    named = remote.cache_dir or os.environ.get("ROUTEDVIT_CACHE") or default
    return Path(named).expanduser()


class ShardCache:
    """Opens shards, wherever they are."""

    def __init__(self, remote: RemoteConfig) -> None:
        self.remote = remote
        self.folder = folder_of(remote)
        self.limit = int(remote.cache_gb * GIGABYTE)
        self.room = Room(self.folder, self.limit)

    def open(self, name: str, entry: ShardEntry | IndexEntry) -> io.FileIO:
        """The open file of the shard at `name`, a path or a URL. DataError when it cannot be had.

        Evicting a shard does not disturb those who have it open.
        """
        if not is_url(name):
            return io.FileIO(name)
        path = self.path(entry)
        with own_disk(self.folder):
            if (kept := self._kept(path)) is not None:
                return kept
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._fetcher(path):
                kept = self._kept(path)  # whoever had the lock may have brought it
                return self._fetched(name, entry, path) if kept is None else kept

    def fetch(self, url: str, entry: ShardEntry | IndexEntry) -> None:
        """Bring the shard here, unless it is, another process does or there is no room now."""
        path = self.path(entry)
        with own_disk(self.folder), suppress(Busy):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._fetcher(path, wait=False):
                if not self.touch(entry):
                    self._fetched(url, entry, path, wait=False).close()

    def touch(self, entry: ShardEntry | IndexEntry) -> bool:
        """Whether the shard is here; if so it counts as used just now."""
        try:
            os.utime(self.path(entry))
        except FileNotFoundError:
            return False
        return True

    def drop(self, entry: ShardEntry | IndexEntry, copy: io.FileIO | None = None) -> None:
        """Forget a fetched file whose copy here turned out to be damaged.

        What another process has fetched instead of the open `copy` meanwhile stays.
        """
        path = self.path(entry)
        with own_disk(self.folder), self.room.lock(), suppress(FileNotFoundError):
            if copy is None or os.path.samestat(os.fstat(copy.fileno()), path.stat()):
                path.unlink()

    def path(self, entry: ShardEntry | IndexEntry) -> Path:
        """Where the shard is kept once it is here."""
        return self.folder / f"{entry.sha256[:40]}.tar"

    def _fetcher(self, path: Path, wait: bool = True) -> AbstractContextManager[io.FileIO]:
        """Makes its holder the one on this node who fetches this shard."""
        return locked(path.with_suffix(".lock"), wait=wait, remove=True)

    def _kept(self, path: Path) -> io.FileIO | None:
        """The shard, if it is here. Opened first: what is open may be evicted at any time."""
        try:
            file = io.FileIO(path)
        except FileNotFoundError:
            return None
        os.utime(file.fileno())  # the time of use that eviction goes by
        return file

    def _fetched(
        self, url: str, entry: ShardEntry | IndexEntry, path: Path, wait: bool = True
    ) -> io.FileIO:
        part = path.with_suffix(f".{entry.bytes}.part")
        with self._reserved(part, entry.bytes, wait) as file:
            Transfer(url, entry, file, self.folder, self.remote).run()
            os.fsync(file.fileno())  # a name that survives a power cut must not outlive the bytes
            found = io.FileIO(part)  # under its final name it may be evicted at once
            with self.room.lock():
                os.replace(part, path)
            return found

    @contextmanager
    def _reserved(self, part: Path, needed: int, wait: bool) -> Iterator[io.FileIO]:
        """`part`, open and locked so that it is kept, with `needed` bytes of room for it."""
        if needed > self.limit:
            raise DataError(
                f"data.remote.cache_gb is {self.limit / GIGABYTE:g} and one shard has "
                f"{needed / GIGABYTE:g} GB; give the cache more room"
            )
        while (file := self.room.claimed(part, needed)) is None:
            if not wait:
                raise Busy
            time.sleep(_ROOM_PAUSE)  # those who fetch wait for nothing that we have, and will end
        with file:
            yield file
