"""Remote shards on this node's disk: fetched once, verified while they stream, bounded in size.

A shard is known by its whole URL and the hash its manifest gives, so two buckets with a 000.tar
each, or a shard that was written anew, never share an entry. One process per node fetches (a file
lock), the others wait and find it there. Bytes go to a .part file, which a later attempt, even of
another process, goes on with; only content of the right length and SHA-256 gets its final name.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.config import RemoteConfig
from data.errors import BadShard, DataError
from data.manifest import IndexEntry, ShardEntry
from data.remote import CHUNK, is_url, persist, stream

GIGABYTE = 10**9


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
        with self._lock(path.stem):
            if not path.exists():
                self._make_room(entry.bytes)
                self._fetch(name, entry, path)
            os.utime(path)  # the time of use that eviction goes by
            return io.FileIO(path)

    def path(self, url: str, entry: ShardEntry | IndexEntry) -> Path:
        """Where the shard is kept once it is here."""
        digest = hashlib.sha256(f"{url}\n{entry.sha256}".encode()).hexdigest()
        return self.folder / f"{digest[:40]}.tar"

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Exclusive on this node. 256 lock files serve all shards; none is ever removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"lock-{name[:2]}", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _fetch(self, url: str, entry: ShardEntry | IndexEntry, path: Path) -> None:
        part = path.with_suffix(".part")
        wrong: list[str] = []

        def attempt() -> None:
            digest = _receive(url, entry, part, self.remote)
            if digest != entry.sha256:
                part.unlink()
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
        os.replace(part, path)

    def _make_room(self, needed: int) -> None:
        """Remove the shards longest unused until `needed` bytes fit below the limit."""
        if needed > self.limit:
            raise DataError(
                f"data.remote.cache_gb is {self.limit / GIGABYTE:g} and one shard has "
                f"{needed / GIGABYTE:g} GB; give the cache more room"
            )
        kept = []
        for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.part")):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process makes room as well
                continue
            kept.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in kept) + needed - self.limit
        for _, size, path in sorted(kept):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def _receive(url: str, entry: ShardEntry | IndexEntry, part: Path, remote: RemoteConfig) -> str:
    """Go on with `part` until it has entry.bytes; returns the SHA-256 of all of it."""
    digest = hashlib.sha256()
    with open(part, "a+b") as file:
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        have = file.tell()
        if have < entry.bytes:
            for chunk in stream(url, have, remote):
                have += len(chunk)
                if have > entry.bytes:
                    break
                file.write(chunk)
                digest.update(chunk)
    if have > entry.bytes:
        part.unlink()
        raise OSError(f"more than the {entry.bytes} bytes that the manifest says")
    if have < entry.bytes:
        raise OSError(f"{have} bytes came and the manifest says {entry.bytes}")
    return digest.hexdigest()
