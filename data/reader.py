"""Reads one sample from a shard: checked once, then a seek and a read.

Before a shard's first sample its size or hash is compared with the manifest, and its index is read
from the file beside it (`data.index_file`) or made from its headers (`data.tar_index`); both are
lazy, so that a resume touches only the shards it needs. A shard that fails is remembered, with the
reason, and not looked at again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from data.cache import ShardCache
from data.config import RemoteConfig
from data.decode import MAX_IMAGE_BYTES
from data.errors import BadSample, BadShard, Refused, Unreachable
from data.index_file import SUFFIX, unpack
from data.manifest import IndexEntry, sha256_of_open
from data.remote import is_url, shown, sibling
from data.shards import ShardSet
from data.tar_index import CLS, NO_LABEL, TarIndex, index_of
from data.tar_members import BLOCK

log = logging.getLogger(__name__)
MAX_OPEN_SHARDS = 256  # per process: streams read many in turn; 1024 descriptors are usual
MAX_OPEN_REMOTE = 64  # fewer: an open shard takes disk even after the cache dropped it
MAX_INDICES = 512  # per process, and twice: a shard of a thousand samples has one of some 50 kB


class Sample(NamedTuple):
    """One encoded image with its label."""

    key: str
    label: int
    payload: bytes


class ShardReader:
    """Random access to the samples of a set of shards, for one process and its forks.

    Forks may share the open files: pread has no position to disagree about.
    """

    def __init__(
        self, shards: ShardSet, verify: str = "size", remote: RemoteConfig | None = None
    ) -> None:
        self.shards = shards
        self.verify = verify
        self.cache = ShardCache(remote or RemoteConfig())
        self.damaged: dict[int, str] = {}  # and what is wrong with them
        self._renewed: set[int] = set()  # whose copy on this node was dropped
        self._indices: OrderedDict[int, TarIndex] = OrderedDict()  # of shards that were examined
        self._listings: OrderedDict[int, TarIndex] = OrderedDict()  # and those maybe not even here
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()
        self._told = False  # that an index file cannot be used
        # Shared with the loader processes: a rank hashes each shard once, not once per worker.
        self._verified = torch.zeros(len(shards.names), dtype=torch.uint8).share_memory_()

    def key(self, shard: int, sample: int) -> str:
        """The key of a sample; reads no image."""
        return self._listing(shard).key(sample)

    def label(self, shard: int, sample: int) -> int:
        """The label that a sample has in its shard; reads no image. May be NO_LABEL."""
        return int(self._listing(shard).labels[sample])

    def read(self, shard: int, sample: int) -> Sample:
        """One sample, of class 0 where labels mean nothing. BadSample when it cannot be used,
        BadShard when its shard is damaged, Unreachable when nobody can tell."""
        index = self._index(shard)
        if sample in index.faults:
            raise BadSample(index.faults[sample])
        label, size = int(index.labels[sample]), int(index.sizes[sample])
        classes = self.shards.classes
        if label == NO_LABEL or (classes.labelled and label >= classes.number):
            raise BadSample(f"label {label} is outside 0..{classes.number - 1}")
        if size > MAX_IMAGE_BYTES:
            raise BadSample(f"an image of {size} encoded bytes; {MAX_IMAGE_BYTES} are allowed")
        begin = int(index.offsets[sample]) - BLOCK
        found = self._bytes(shard, begin, size + BLOCK)
        checks = None if self.verify == "off" else index.checks
        if checks is not None and zlib.crc32(found) != checks[sample]:
            # A disk of one node must not change what that node trains on: ask the store again.
            if self._renew(shard, f"{shown(self.shards.names[shard])}: damaged"):
                found = self._bytes(shard, begin, size + BLOCK)
            if zlib.crc32(found) != checks[sample]:
                raise BadSample("damaged: its bytes are not those that were written")
        return Sample(index.key(sample), label if classes.labelled else 0, found[BLOCK:])

    def _bytes(self, shard: int, begin: int, size: int) -> bytes:
        with _failures_named(self.shards.names[shard]):
            found = os.pread(self._file(shard).fileno(), size, begin)
        if len(found) != size:
            raise Unreachable(
                f"{shown(self.shards.names[shard])}: it shrank while it was read; leave shards "
                "alone during a run"
            )
        return found

    def _renew(self, shard: int, why: str) -> bool:
        """Drop this node's copy of a fetched shard, so that it is fetched again; once a process."""
        name, entry = self.shards.names[shard], self.shards.entries[shard]
        if not is_url(name) or shard in self._renewed:
            return False
        self._renewed.add(shard)
        log.warning("%s; the copy on this node is dropped and fetched again", why)
        with self._open.pop(shard) as file:
            self.cache.drop(entry, file)
        return True

    def _listing(self, shard: int) -> TarIndex:
        """What a shard holds; where an index file says it, the shard is not fetched."""
        for known in (self._indices, self._listings):
            if shard in known:
                known.move_to_end(shard)
                return known[shard]
        kept = self._kept_index(shard)
        if kept is None:
            return self._index(shard)
        return _remember(self._listings, shard, kept)

    def _index(self, shard: int) -> TarIndex:
        if shard in self.damaged:
            # another one: an exception that is raised again keeps the frames of every time alive
            raise BadShard(self.damaged[shard])
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard]
        try:
            index = self._examine_fresh(shard)
        except BadShard as error:
            self.damaged[shard] = str(error)
            raise
        return _remember(self._indices, shard, index)

    def _examine_fresh(self, shard: int) -> TarIndex:
        """As `_examine`; a fetched copy that is damaged is fetched once more."""
        try:
            return self._examine(shard)
        except BadShard as error:
            if shard not in self._open or not self._renew(shard, str(error)):
                raise  # nothing came: the server has none
            return self._examine(shard)

    def _examine(self, shard: int) -> TarIndex:
        """Compare a shard with its manifest entry, as thoroughly as `verify` asks; index it."""
        name, entry = self.shards.names[shard], self.shards.entries[shard]
        with _failures_named(name):
            descriptor = self._file(shard).fileno()
            size = os.fstat(descriptor).st_size
            if self.verify != "off" and size != entry.bytes:
                raise BadShard(
                    f"{shown(name)}: offset {min(size, entry.bytes)}: {size} bytes long and the "
                    f"manifest says {entry.bytes}; replace the shard by a good copy or write it "
                    "again"
                )
            kept = self._kept_index(shard)
            # the walk tells where a tar is cut; labels are where they were when it was adopted
            places = self.shards.label_places
            labels = places[shard] if places else CLS
            index = kept or index_of(descriptor, shown(name), entry.samples, labels)
            # Without an index there is no CRC of each image: a swapped shard of equal size would
            # give its images under the labels of another.
            hashed = self.verify == "sha256" or (self.verify == "size" and kept is None)
            if hashed and not self._verified[shard]:
                digest = sha256_of_open(descriptor)
                if digest != entry.sha256:
                    raise BadShard(
                        f"{shown(name)}: offset 0: its SHA-256 is {digest[:12]}... and the "
                        f"manifest says {entry.sha256[:12]}...; replace the shard by a good copy "
                        "or write it again"
                    )
                self._verified[shard] = 1
            return index

    def _kept_index(self, shard: int) -> TarIndex | None:
        """The index from the file beside the manifest; None where that is missing or damaged."""
        entry = self.shards.entries[shard]
        if entry.index is None:
            return None
        manifests = self.shards.manifests or self.shards.names
        beside = sibling(manifests[shard], f"{entry.name}{SUFFIX}")
        try:
            content = self._read_index(beside, entry.index)
            reason = f"{shown(beside)} is not the file that the manifest knows"
            if hashlib.sha256(content).hexdigest() == entry.index.sha256:
                index = unpack(content)
                if len(index) == entry.samples:
                    return index
                reason = (
                    f"{shown(beside)} has {len(index)} samples, the manifest says {entry.samples}"
                )
        except (BadShard, Refused, OSError) as error:
            reason = str(error)
        if not self._told:
            log.warning("%s; headers of shards are read instead, which takes longer", reason)
        self._told = True
        return None

    def _read_index(self, beside: str, entry: IndexEntry) -> bytes:
        """The index file as it is; a fetched copy that is damaged is fetched once more."""
        with self.cache.open(beside, entry) as file:
            content = file.read()
        if not is_url(beside) or hashlib.sha256(content).hexdigest() == entry.sha256:
            return content
        self.cache.drop(entry)
        with self.cache.open(beside, entry) as file:
            return file.read()

    def _file(self, shard: int) -> io.FileIO:
        if shard not in self._open:
            if len(self._open) >= (MAX_OPEN_REMOTE if self.shards.remote else MAX_OPEN_SHARDS):
                self._open.popitem(last=False)[1].close()
            self._open[shard] = self.cache.open(
                self.shards.names[shard], self.shards.entries[shard]
            )
        self._open.move_to_end(shard)
        return self._open[shard]


def _remember(indices: OrderedDict[int, TarIndex], shard: int, index: TarIndex) -> TarIndex:
    """Keep an index for later, in the place of the one that was asked for longest ago."""
    if len(indices) >= MAX_INDICES:
        indices.popitem(last=False)
    indices[shard] = index
    return index


@contextmanager
def _failures_named(name: str) -> Iterator[None]:
    """Turn what the file system says into an error that names the shard."""
    try:
        yield
    except FileNotFoundError:
        raise BadShard(
            f"{shown(name)} is in the manifest but not there; bring it back or write the shards "
            "again"
        ) from None
    except OSError as error:
        raise Unreachable(
            f"{shown(name)}: it cannot be read ({error.strerror}); mend the disk or its mount, "
            "then start the same command again"
        ) from error
