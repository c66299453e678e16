"""Where shards are made from: each source names its splits and the samples in them.

A split is a sequence of small references, each able to `read()` its encoded bytes. A sequence, so
that shards can be written in parallel and a stopped writer can go on; references, so that no image
is in memory before its shard is. The sources: class folders in `data.folders`, digits in
`data.digits`, lists and dataset objects in `data.listings`.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from data.errors import DataError


class Reference(Protocol):
    """A sample that has not been read yet."""

    @property
    def key(self) -> str: ...  # no dots: WebDataset ends the key at the first one
    @property
    def label(self) -> int: ...
    def read(self) -> bytes: ...  # may raise anything; what it returns is not trusted either


@dataclass(frozen=True)
class Split:
    """The samples of one split, in the order of the source, and the names of the classes."""

    references: Sequence[Reference]
    label_names: list[str]
    ignored: Counter[str] = field(default_factory=Counter)  # what was passed over -> files


@dataclass(frozen=True)
class ArrayReference:
    """A uint8 image [H, W] or [H, W, 3] held in memory; becomes a PNG."""

    key: str
    pixels: np.ndarray
    label: int

    def read(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class FileReference:
    """An image file whose bytes are copied unchanged.

    There may be fourteen million: two strings each, and one for the folder of all.
    """

    key: str
    root: str
    name: str  # relative to `root`, or absolute
    label: int

    def read(self) -> bytes:
        with open(os.path.join(self.root, self.name), "rb") as file:
            return file.read()


def whereabouts(reference: Reference) -> str:
    """The path of an image file, from the root of this machine; '' of what is no file."""
    if not isinstance(reference, FileReference):
        return ""
    return os.path.abspath(os.path.join(reference.root, reference.name))


def divide(split: Split, held_out: float) -> dict[str, Split]:
    """`train` and `val`, the same share of every class held out; always the same samples.

    An image of each class stays in `train`. DataError when the share is too small for any class.
    """
    labels = np.array([reference.label for reference in split.references])
    sizes = np.unique(labels, return_counts=True)[1]
    # sorted once: looking through all labels for each of 21,000 classes took minutes
    classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    generator = np.random.default_rng(0)
    val: set[int] = set()
    for of_class in classes:
        members = generator.permutation(of_class)
        val.update(members[: min(round(len(members) * held_out), len(members) - 1)].tolist())
    if held_out and not val:
        raise DataError(
            f"--held-out {held_out:g} holds nothing out: the largest class has "
            f"{sizes.max()} images; give a larger share"
        )
    parts: dict[str, list[Reference]] = {"train": [], "val": []}
    for number, reference in enumerate(split.references):
        parts["val" if number in val else "train"].append(reference)
    splits = {"train": Split(parts["train"], split.label_names, split.ignored)}
    if val:
        splits["val"] = Split(parts["val"], split.label_names)
    return splits
