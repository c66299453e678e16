"""Which samples a shard holds and where they lie, from the members that `data.tar_members` finds.

Grouping is WebDataset's: the key is the name up to the first dot of its last component, the rest is
the extension; members of a sample are neighbours. Neighbours without a known extension there, such
as img.1.jpg and img.1.cls, are grouped by what stands before the last dot instead.

A sample is one image plus one `.cls` (the label as text). Shards made elsewhere may keep labels in
a JSON member, or have none; `labels` says so. What lacks an image that we read, or a label, is left
out and named; what has neither (a README, what macOS leaves) is ignored.

A sample may have further images, such as c.depth.png beside c.png: ignored, but counted by their
extension. Where such an image has a label of its own (img.1.jpg and img.1.cls beside img.jpg), a
sample was meant that its name makes a part of another: left out and named.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from data.errors import legible
from data.tar_members import Member, Tar

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})
# Images all the same: who counts samples wants to hear of them.
UNREAD_EXTENSIONS = frozenset({"gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jp2", "jxl"})
# Formats that run code or inflate without bound when other tools open them. Never read here; the
# sample that carries one is set aside, because nobody puts these beside an image by accident.
FORBIDDEN_EXTENSIONS = frozenset(
    "pyd pkl pickle dill joblib pt pth ckpt gz bz2 xz zst zip".split()  # noqa: SIM905
)
NO_LABEL = -1
MAX_LABEL_BYTES = 20
MAX_JSON_BYTES = 1 << 20
CLS, UNLABELLED, JSON = "cls", "none", "json:"  # where labels are; behind JSON comes the key


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard, in file order. Arrays have one row per sample."""

    keys: np.ndarray  # bytes, UTF-8
    offsets: np.ndarray  # int64: where the image starts
    sizes: np.ndarray  # int64: bytes of the image
    labels: np.ndarray  # int64: the class, NO_LABEL where it is no number
    faults: dict[int, str] = field(default_factory=dict)  # sample -> why it cannot be used
    checks: np.ndarray | None = None  # int64: CRC-32 of each sample, see data.index_file
    ignored: int = 0  # members that are neither a sample's image nor its label
    images: Counter[str] = field(default_factory=Counter)  # those of them: extension -> how many
    left_out: dict[str, str] = field(default_factory=dict)  # key -> why it is no sample here

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        """The key of a sample, as text."""
        return bytes(self.keys[sample]).decode()


def split_name(name: str, last: bool = False) -> tuple[str, str]:
    """(key, extension) of a member name, cut at the first dot of its last component as WebDataset
    does, or at the `last`; the extension in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if last and extension:
        stem, _, extension = base.rpartition(".")
    return folder + slash + stem, extension.lower()


@dataclass
class _Draft:
    """A sample while its members are being met."""

    key: str
    header: int
    image: Member | None = None
    label: int | None = None
    fault: str | None = None  # why it is a sample, and cannot be used
    missing: str | None = None  # why it is none


class _Builder:
    """Groups members into samples; refuses what comes twice."""

    def __init__(self, tar: Tar, labels: str) -> None:
        self.tar = tar
        self.labels = labels
        self.samples: list[_Draft] = []
        self.left_out: dict[str, str] = {}
        self.ignored = 0
        self.images: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._neighbours: list[Member] = []  # that have the name up to the first dot in common

    def add(self, member: Member) -> None:
        if member.name.rpartition("/")[2].startswith("._"):  # what macOS keeps beside a file
            self.ignored += 1
            return
        if self._neighbours:
            key, _ = split_name(self._neighbours[0].name)
            if split_name(member.name)[0] != key:
                self.close()
        self._neighbours.append(member)

    def close(self) -> None:
        """Make samples of the neighbours met last."""
        members, self._neighbours = self._neighbours, []
        last = not any(_known(split_name(member.name)[1]) for member in members)
        for key, group in groupby(members, lambda member: split_name(member.name, last)[0]):
            self._sample(key, [(split_name(member.name, last)[1], member) for member in group])

    def _sample(self, key: str, members: list[tuple[str, Member]]) -> None:
        if key in self._seen:
            header = members[0][1].header
            self.tar.fault(
                header,
                f"key {key!r} comes a second time or is interleaved (the members of a sample have "
                "to be neighbours, which `tar --sort=name` makes them)",
            )
        sample = _Draft(key, members[0][1].header)
        kinds = [extension for extension, _ in members]
        others = [kind for kind, member in members if not self._take(sample, kind, member)]
        self._name_parts(key, members)
        if sample.fault is None and sample.image is None:
            unread = next((kind for kind in kinds if kind in UNREAD_EXTENSIONS), None)
            if sample.label is None and unread is None:
                self._ignore(kinds)
                return
            sample.missing = "a label and no image"
            if unread is not None:
                sample.missing = f"an image of type .{unread}; JPEG, PNG and WebP are read"
        elif sample.fault is None and sample.label is None and sample.missing is None:
            sample.missing = "no label (.cls); `data.check` has --label-key and --unlabelled"
        self._seen.add(key)
        if sample.missing is None:
            self.samples.append(sample)
            self._ignore(others)
        else:
            self.left_out[key] = sample.missing

    def _ignore(self, kinds: list[str]) -> None:
        self.ignored += len(kinds)
        self.images.update(kind for kind in kinds if _is_image(kind))

    def _name_parts(self, key: str, members: list[tuple[str, Member]]) -> None:
        """Name the images among the parts of a sample that were meant to be samples themselves."""
        kinds = {kind for kind, _ in members}
        for kind, member in members:
            if _is_image(kind) and self._has_label(kind.rpartition(".")[0], kinds):
                own, _ = split_name(member.name, last=True)
                self.left_out[own] = (
                    f"a part of sample {key!r}, as keys end at the first dot; it needs another name"
                )

    def _has_label(self, part: str, kinds: Iterable[str]) -> bool:
        """Whether the image `part` of a sample has a label of its own; where none has, a number."""
        if self.labels == UNLABELLED:
            return part.isdecimal()
        return part != "" and f"{part}.{'cls' if self.labels == CLS else 'json'}" in kinds

    def _take(self, sample: _Draft, extension: str, member: Member) -> bool:
        """Add a member to a sample; whether it says anything about it."""
        if extension in IMAGE_EXTENSIONS:
            if sample.image is not None:
                self.tar.fault(member.header, f"key {sample.key!r} has two images")
            sample.image = member
            if self.labels == UNLABELLED:
                sample.label = 0
        elif extension == "cls" and self.labels == CLS:
            if sample.label is not None:
                self.tar.fault(member.header, f"key {sample.key!r} has two labels")
            sample.label = _number(member.head, member.size)
            if sample.label == NO_LABEL:
                sample.fault = f"the label {member.head[:MAX_LABEL_BYTES]!r} is no class number"
        elif extension == "json" and self.labels.startswith(JSON):
            sample.label, sample.missing = self._in_json(member)
        elif _forbidden(extension):
            sample.fault = f"a member of the forbidden type .{legible(extension)}"
        else:
            return False
        return True

    def _in_json(self, member: Member) -> tuple[int | None, str | None]:
        """The label in a JSON member, or why there is none."""
        name = self.labels.removeprefix(JSON)
        if member.size > MAX_JSON_BYTES:
            return None, f"a JSON member of {member.size} bytes; {MAX_JSON_BYTES} are read"
        try:
            words = json.loads(os.pread(self.tar.descriptor, member.size, member.offset))
        except (ValueError, RecursionError):
            return None, "its JSON member cannot be read"
        if not isinstance(words, dict) or name not in words:
            return None, f"its JSON member has no {name!r}"
        label = words[name]
        if isinstance(label, float) and label.is_integer():  # as pandas writes whole numbers
            label = int(label)
        text = json.dumps(label).strip('"').encode()
        label = _number(text, len(text))
        if label == NO_LABEL:
            return None, f"{name!r} is {text[:MAX_LABEL_BYTES]!r} and no class number"
        return label, None


def _known(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS or extension == "cls" or _forbidden(extension)


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS | UNREAD_EXTENSIONS


def _forbidden(extension: str) -> bool:
    return extension.rpartition(".")[2] in FORBIDDEN_EXTENSIONS


def _number(text: bytes, size: int) -> int:
    text = text.strip()
    if size > MAX_LABEL_BYTES or not re.fullmatch(rb"[0-9]{1,9}", text):
        return NO_LABEL
    return int(text)


def read_index(path: Path, expected_samples: int | None = None, labels: str = CLS) -> TarIndex:
    """Index the shard at `path`; see `index_of`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return index_of(descriptor, str(path), expected_samples, labels)
    finally:
        os.close(descriptor)


def index_of(
    descriptor: int, name: str, expected_samples: int | None = None, labels: str = CLS
) -> TarIndex:
    """Index an open shard, which errors call `name`; `labels` are in CLS, JSON or UNLABELLED.

    Raises BadShard, naming shard and offset, for anything that is not a whole plain tar, holds a
    sample twice, or does not hold `expected_samples` of them.
    """
    tar = Tar(name, descriptor)
    builder = _Builder(tar, labels)
    for member in tar.members():
        builder.add(member)
    builder.close()
    samples = builder.samples
    if expected_samples is not None and len(samples) != expected_samples:
        out = f" ({len(builder.left_out)} are left out)" if builder.left_out else ""
        tar.fault(
            tar.size, f"{len(samples)} samples found{out} and the manifest says {expected_samples}"
        )
    return TarIndex(
        keys=np.array([sample.key.encode() for sample in samples], dtype=np.bytes_),
        offsets=np.array([s.image.offset if s.image else 0 for s in samples], dtype=np.int64),
        sizes=np.array([s.image.size if s.image else 0 for s in samples], dtype=np.int64),
        labels=np.array(
            [NO_LABEL if s.label is None else s.label for s in samples], dtype=np.int64
        ),
        faults={number: s.fault for number, s in enumerate(samples) if s.fault is not None},
        ignored=builder.ignored,
        images=builder.images,
        left_out=builder.left_out,
    )
