"""Shard sources that others describe: a list of files with labels, or a dataset object.

Any object with a length and items serves, so torchvision's, timm's and Hugging Face's datasets all
do: an item is (image, label) or a dict with `image` and `label`, the image a Pillow image, encoded
bytes or an open file. Encoded images are stored as they are; a Pillow image is stored as PNG.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset

from data.errors import BadSample, DataError
from data.sources import FileReference, Reference, Split, divide, safe_key, unique_key


def list_splits(
    path: Path, image_column: str, label_column: str, held_out: float
) -> dict[str, Split]:
    """The images that a CSV, TSV or Parquet file lists, one per row (under a header line).

    Image paths are taken relative to the file. Labels that are all whole numbers are the classes
    themselves; any others are class names, numbered in sorted order.
    """
    images, labels = [], []
    for number, row in enumerate(_rows(path)):
        for column in (image_column, label_column):
            if row.get(column) in (None, ""):
                known = ", ".join(str(name) for name in row)
                raise DataError(
                    f"{path}: row {number + 1} has no {column!r} (columns: {known}); name the "
                    "columns with --image-column and --label-column"
                )
        images.append(str(row[image_column]))
        labels.append(str(row[label_column]))
    if not images:
        raise DataError(f"{path} lists no images; expected a header line and a row per image")
    numeric = all(label.isdecimal() for label in labels)
    if numeric:
        names = [str(label) for label in range(max(map(int, labels)) + 1)]
        numbers = [int(label) for label in labels]
    else:
        names = sorted(set(labels))
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [number_of[label] for label in labels]
    keys: set[str] = set()
    references: list[Reference] = [
        FileReference(unique_key(safe_key(_stem(image)), keys), path.parent / image, label)
        for image, label in zip(images, numbers, strict=True)
    ]
    return divide(Split(references, names), held_out)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of the list, column name -> value."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        with open(path, newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    except FileNotFoundError:
        raise DataError(
            f"--path {path} is not there; name the file that lists the images"
        ) from None


def _parquet_rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"--path {path} needs the package pyarrow; pip install pyarrow, or save the list as CSV"
        ) from None
    try:
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"--path {path} is no Parquet file, or it is cut: {error}") from None


def _stem(name: str) -> str:
    return str(Path(name).with_suffix("")).lstrip("./")


def named_dataset_splits(name: str, root: Path, splits: dict[str, str]) -> dict[str, Split]:
    """Splits of a dataset by its timm name, such as torch/cifar10 or hfds/cifar10.

    `splits` maps our names to the dataset's: {'train': 'train', 'val': 'validation'}. Nothing is
    downloaded; for Hugging Face names the `datasets` package decides.
    """
    found = {}
    for ours, theirs in splits.items():
        try:
            dataset = create_dataset(name, root=str(root), split=theirs, is_training=False)
        except (AssertionError, RuntimeError, ValueError, ImportError, OSError) as error:
            first = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(f"--name {name}, split {theirs}: {first}") from None
        found[ours] = dataset_split(dataset, ours)
    return found


def dataset_split(dataset: Any, prefix: str, label_names: Sequence[str] | None = None) -> Split:
    """A split of any dataset object; keys are `prefix` and the number of the item."""
    labels = _labels(dataset)
    names = label_names or getattr(dataset, "classes", None)
    if names is None:
        names = [str(label) for label in range(max(labels) + 1)]
    references: list[Reference] = [
        DatasetReference(f"{prefix}{number:08d}", dataset, number, label)
        for number, label in enumerate(labels)
    ]
    return Split(references, [str(name) for name in names])


def _labels(dataset: Any) -> list[int]:
    """All labels: from the list that torchvision's datasets keep, else item by item."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [_item(dataset, number)[1] for number in range(len(dataset))]
    return [int(label) for label in targets]


def _item(dataset: Any, number: int) -> tuple[Any, int]:
    # timm's dataset skips over images it cannot read without a word, its reader does not
    item = dataset.reader[number] if isinstance(dataset, ImageDataset) else dataset[number]
    return (item["image"], item["label"]) if isinstance(item, dict) else (item[0], item[1])


@dataclass(frozen=True)
class DatasetReference:
    """An item of a dataset object."""

    key: str
    dataset: Any
    number: int
    label: int

    def read(self) -> bytes:
        image = _item(self.dataset, self.number)[0]
        if isinstance(image, dict):  # Hugging Face's Image(decode=False)
            image = image["bytes"]
        if hasattr(image, "read"):
            with image:
                image = image.read()
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            return buffer.getvalue()
        if not isinstance(image, bytes):
            raise BadSample(f"an item of type {type(image).__name__} is no image")
        return image
