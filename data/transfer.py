"""One file of a manifest, from its URL into a file of ours: resumed, verified, judged.

What the network spoils is fetched again. What the server has wrong is BadShard, so that it may be
quarantined like any damaged shard: a size or a SHA-256 that is not the manifest's, twice the same.
Where a server tells no size (it knows no ranges, or the file is empty), three transfers that end
well at the same byte say as much. What fails on our own side is this node's disk, never the shard.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.config import RemoteConfig
from data.errors import BadShard, Unreachable
from data.manifest import IndexEntry, ShardEntry
from data.remote import CHUNK, Progress, WrongSize, persist, shown, stream


@contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    """Turn what this node's disk refuses into an error that says so, and at once."""
    try:
        yield
    except OSError as error:
        raise Unreachable(
            f"data.remote.cache_dir: {folder} fails ({error.strerror}); make room there, "
            "lower data.remote.cache_gb or name another folder, then start the same command again"
        ) from error


class Transfer:
    """Brings one file here, over as many attempts as `remote` has patience for."""

    def __init__(
        self,
        url: str,
        entry: ShardEntry | IndexEntry,
        file: io.FileIO,
        folder: Path,
        remote: RemoteConfig,
    ) -> None:
        self.url = url
        self.entry = entry
        self.file = file
        self.folder = folder
        self.remote = remote
        self._wrong: Counter[str | int] = Counter()  # SHA-256 or size -> how often it came
        self._ends: Counter[int] = Counter()  # where transfers ended well -> how often

    def run(self) -> None:
        """Go on with what the file holds until it is whole. BadShard, Unreachable."""
        persist(self._attempt, self.url, self.remote, vouched=True)

    def _attempt(self, progress: Progress) -> None:
        try:
            digest = self._receive(progress)
        except WrongSize as error:
            self._begin_again(error.size, progress)
            if self._wrong[error.size] == 2:
                raise self._bad_size(error.size) from error
            raise
        if digest == self.entry.sha256:
            return
        self._begin_again(digest, progress)
        # once may be the network, twice the same is what the server has
        if self._wrong[digest] == 2:
            raise BadShard(
                f"{shown(self.url)}: offset 0: its SHA-256 is {digest[:12]}... and the manifest "
                f"says {self.entry.sha256[:12]}...; replace the shard by a good copy or write it "
                "again"
            )
        raise OSError(f"its SHA-256 is {digest[:12]}..., not that of the manifest")

    def _begin_again(self, reason: str | int, progress: Progress) -> None:
        self.file.truncate(0)
        if not self._wrong:
            progress.restart()
        self._wrong[reason] += 1

    def _bad_size(self, size: int) -> BadShard:
        expected = self.entry.bytes
        found = f"{size} bytes" if size <= expected else f"more than {expected} bytes"
        return BadShard(
            f"{shown(self.url)}: offset {min(size, expected)}: {found}, the manifest says "
            f"{expected}; upload the shard again or write it again"
        )

    def _receive(self, progress: Progress) -> str:
        """Go on with the file until it has entry.bytes; returns the SHA-256 of all of it."""
        digest, expected = hashlib.sha256(), self.entry.bytes
        with own_disk(self.folder):
            self.file.seek(0)
            while chunk := self.file.read(CHUNK):
                digest.update(chunk)
            have = self.file.tell()
        if have < expected:
            for chunk in stream(self.url, have, self.remote, progress, expected):
                have += len(chunk)
                if have > expected:
                    break
                with own_disk(self.folder):
                    write(self.file, chunk)
                digest.update(chunk)
        if have != expected:
            self._ended(have)
        return digest.hexdigest()

    def _ended(self, have: int) -> None:
        """A transfer that nothing interrupted brought too few bytes, or too many."""
        expected = self.entry.bytes
        if have > expected:
            self.file.truncate(0)
            have = expected + 1  # where it was left, not where it ends
        self._ends[have] += 1
        if self._ends[have] == 3:
            raise self._bad_size(have)
        if have > expected:
            raise OSError(f"more than the {expected} bytes that the manifest says")
        raise OSError(f"{have} bytes came and the manifest says {expected}")


def write(file: io.FileIO, chunk: bytes) -> None:
    """All of `chunk`: a raw file may take less of it than it is given."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]
