"""Remote shards on this node's disk: fetched once, verified while they stream, bounded in size.

A shard is known by its whole URL and the hash its manifest gives, so two buckets with a 000.tar
each, or a shard that was written anew, never share an entry. One process per node fetches (a file
lock), the others wait and find it there. Bytes go to a .part file, which a later attempt, even of
another process, goes on with; only content of the right length and SHA-256 gets its final name.

Room is made by one process at a time. Whoever fetches keeps the .part file locked, and its name
says how long it will become: that is the reservation, and it ends with the process that made it.
What goes wrong here is this node's disk, never the shard: no error of it may quarantine one.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.config import RemoteConfig
from data.errors import BadShard, DataError, Unreachable
from data.manifest import IndexEntry, ShardEntry
from data.remote import CHUNK, Progress, is_url, persist, stream

GIGABYTE = 10**9
_ROOM_PAUSE = 0.1  # seconds between two looks while others' fetches take all the room


class ShardCache:
    """Opens shards, wherever they are."""

    def __init__(self, remote: RemoteConfig) -> None:
        self.remote = remote
        self.folder = Path(remote.cache_dir).expanduser()
        self.limit = int(remote.cache_gb * GIGABYTE)

    def open(self, name: str, entry: ShardEntry | IndexEntry) -> io.FileIO:
        """The open file of the shard at `name`, a path or a URL. DataError when it cannot be had.

        Evicting a shard does not disturb those who have it open.
        """
        if not is_url(name):
            return io.FileIO(name)
        path = self.path(name, entry)
        with self._own_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(path.stem[:2]):
                kept = self._kept(path)
                return self._fetched(name, entry, path) if kept is None else kept

    def drop(self, name: str, entry: ShardEntry | IndexEntry) -> None:
        """Forget a fetched file whose copy here turned out to be damaged."""
        with self._own_disk(), self._lock("room"):
            self.path(name, entry).unlink(missing_ok=True)

    def path(self, url: str, entry: ShardEntry | IndexEntry) -> Path:
        """Where the shard is kept once it is here."""
        digest = hashlib.sha256(f"{url}\n{entry.sha256}".encode()).hexdigest()
        return self.folder / f"{digest[:40]}.tar"

    @contextmanager
    def _own_disk(self) -> Iterator[None]:
        """Turn what this node's disk refuses into an error that says so, and at once."""
        try:
            yield
        except OSError as error:
            raise Unreachable(
                f"data.remote.cache_dir: {self.folder} fails ({error.strerror}); make room there, "
                "lower data.remote.cache_gb or name another folder, then start the same command "
                "again"
            ) from error

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Exclusive on this node. 257 lock files serve all shards; none is ever removed."""
        with open(self.folder / f"lock-{name}", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _kept(self, path: Path) -> io.FileIO | None:
        """The shard, if it is here. Opened first: what is open may be evicted at any time."""
        try:
            file = io.FileIO(path)
        except FileNotFoundError:
            return None
        os.utime(file.fileno())  # the time of use that eviction goes by
        return file

    def _fetched(self, url: str, entry: ShardEntry | IndexEntry, path: Path) -> io.FileIO:
        part = path.with_suffix(f".{entry.bytes}.part")
        with self._reserved(part, entry.bytes) as file:
            self._fetch(url, entry, file)
            os.fsync(file.fileno())  # a name that survives a power cut must not outlive the bytes
            found = io.FileIO(part)  # under its final name it may be evicted at once
            with self._lock("room"):
                os.replace(part, path)
            return found

    def _fetch(self, url: str, entry: ShardEntry | IndexEntry, file: io.FileIO) -> None:
        wrong: list[str] = []

        def attempt(progress: Progress) -> None:
            digest = self._receive(url, entry, file, progress)
            if digest != entry.sha256:
                file.truncate(0)
                if not wrong:
                    progress.restart()
                wrong.append(digest)
                # once may be the network, twice the same is what the server has
                if wrong.count(digest) == 2:
                    raise BadShard(
                        f"{url}: offset 0: its SHA-256 is {digest[:12]}... and the manifest says "
                        f"{entry.sha256[:12]}...; replace the shard by a good copy or write it "
                        "again"
                    )
                raise OSError(f"its SHA-256 is {digest[:12]}..., not that of the manifest")

        persist(attempt, url, self.remote)

    def _receive(
        self, url: str, entry: ShardEntry | IndexEntry, file: io.FileIO, progress: Progress
    ) -> str:
        """Go on with `file` until it has entry.bytes; returns the SHA-256 of all of it."""
        digest = hashlib.sha256()
        with self._own_disk():
            file.seek(0)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
            have = file.tell()
        if have < entry.bytes:
            for chunk in stream(url, have, self.remote, progress):
                have += len(chunk)
                if have > entry.bytes:
                    break
                with self._own_disk():
                    _write(file, chunk)
                digest.update(chunk)
        if have > entry.bytes:
            file.truncate(0)
            raise OSError(f"more than the {entry.bytes} bytes that the manifest says")
        if have < entry.bytes:
            raise OSError(f"{have} bytes came and the manifest says {entry.bytes}")
        return digest.hexdigest()

    @contextmanager
    def _reserved(self, part: Path, needed: int) -> Iterator[io.FileIO]:
        """`part`, open and locked so that it is kept, with `needed` bytes of room for it."""
        if needed > self.limit:
            raise DataError(
                f"data.remote.cache_gb is {self.limit / GIGABYTE:g} and one shard has "
                f"{needed / GIGABYTE:g} GB; give the cache more room"
            )
        while (file := self._claimed(part, needed)) is None:
            time.sleep(_ROOM_PAUSE)  # those who fetch wait for nothing that we have, and will end
        with file:
            yield file

    def _claimed(self, part: Path, needed: int) -> io.FileIO | None:
        """The locked `part`, once there is room; None while others' fetches take it."""
        with self._lock("room"):
            if not self._make_room(part, needed):
                return None
            file = io.FileIO(part, "a+")
            fcntl.flock(file, fcntl.LOCK_EX)
            return file

    def _make_room(self, part: Path, needed: int) -> bool:
        """Remove what was longest unused until `needed` bytes fit; False while they cannot."""
        reserved, kept = 0, []
        for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.part")):
            if path.suffix == ".part" and path != part and _is_locked(path):
                reserved += int(path.suffixes[0][1:])
            elif path != part:
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        if reserved + needed > self.limit:
            return False
        excess = reserved + sum(size for _, size, _ in kept) + needed - self.limit
        for _, size, path in sorted(kept):
            if excess <= 0:
                break
            path.unlink()
            excess -= size
        return True


def _is_locked(part: Path) -> bool:
    """Whether a process is fetching into this file."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _write(file: io.FileIO, chunk: bytes) -> None:
    """All of `chunk`: a raw file may take less of it than it is given."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]
