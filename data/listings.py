"""Shard sources that others describe: a list of files with labels, or a dataset object.

Any object with a length and items serves, so torchvision's, timm's and Hugging Face's datasets all
do: an item is (image, label) or a dict with the two, the image a Pillow image, encoded bytes or an
open file. Encoded images are stored as they are; a Pillow image is stored as PNG.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset

from data.errors import BadSample, DataError
from data.keys import Keys
from data.manifest import MAX_CLASSES
from data.sources import FileReference, Reference, Split, divide


def list_splits(
    path: Path,
    image_column: str,
    label_column: str,
    held_out: float,
    labels_are_names: bool = False,
) -> dict[str, Split]:
    """The images that a CSV, TSV or Parquet file lists, one per row (under a header line).

    Image paths are taken relative to the file. Labels that are all whole numbers are the classes
    themselves, unless `labels_are_names`; any others are class names, numbered in sorted order.
    """
    images, labels = [], []
    for number, row in enumerate(_rows(path)):
        for column in (image_column, label_column):
            value = row.get(column)
            blank = value is None or (isinstance(value, str) and not value.strip())
            if blank or value != value:  # NaN is none either
                known = ", ".join(str(name) for name in row)
                mend = "name the columns with --image-column and --label-column"
                if len(row) == 1:
                    mend = "columns stand between commas, in a .tsv between tabs"
                raise DataError(
                    f"{path}: row {number + 1} has no {column!r} (columns: {known}); {mend}"
                )
        if isinstance(row[image_column], dict | bytes):  # as Hugging Face exports them
            raise DataError(
                f"{path}: {image_column!r} holds images themselves, not the paths of their files; "
                "save them as files and list these, or read a data set with --source dataset"
            )
        images.append(str(row[image_column]))
        labels.append(str(row[label_column]).strip())
    if not images:
        raise DataError(f"{path} lists no images; expected a header line and a row per image")
    if held_out:
        _refuse_twice(path, images)
    if not labels_are_names and all(re.fullmatch(r"-?[0-9]+\.0+", label) for label in labels):
        labels = [label.partition(".")[0] for label in labels]  # whole numbers that pandas wrote
    if labels_are_names or not all(re.fullmatch(r"-?[0-9]+", label) for label in labels):
        names = sorted(set(labels))
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [number_of[label] for label in labels]
    else:
        numbers = [int(label) for label in labels]
        names = _numbered(
            numbers, f"{path}, {label_column!r}", "leave these rows out, or give --labels-are-names"
        )
    keys, folder = Keys(), str(path.parent)
    references: list[Reference] = [
        FileReference(keys.of(_stem(image)), folder, image, label)
        for image, label in zip(images, numbers, strict=True)
    ]
    return divide(Split(references, names), held_out)


def _refuse_twice(path: Path, images: list[str]) -> None:
    """DataError where an image is listed twice: it could be in train and be held out too."""
    first: dict[str, int] = {}
    for number, image in enumerate(images):
        before = first.setdefault(os.path.normpath(path.parent / image), number)
        if before != number:
            raise DataError(
                f"{path}: row {number + 1} lists {image} again (row {before + 1}), and --held-out "
                "might put it on both sides; list each image once, or write train and val from two "
                "lists"
            )


def _numbered(labels: list[int], where: str, mend: str) -> list[str]:
    """Names for classes that are numbers. DataError, with the mend, for what is no class number."""
    for label in (min(labels), max(labels)):
        if not 0 <= label < MAX_CLASSES:
            raise DataError(
                f"{where}: label {label}; classes are numbered from 0 to {MAX_CLASSES - 1}: {mend}"
            )
    return [str(label) for label in range(max(labels) + 1)]


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of the list, column name -> value. DataError when it cannot be read."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel writes a BOM
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    except FileNotFoundError:
        raise DataError(
            f"--path {path} is not there; name the file that lists the images"
        ) from None
    except IsADirectoryError:
        raise DataError(
            f"--path {path} is a folder; name the file that lists the images, or take "
            "--source folder"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"--path {path} is no UTF-8 text ({error.reason}); save it so") from None
    except csv.Error as error:
        raise DataError(f"--path {path} cannot be read as CSV: {error}") from None


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


def named_dataset_splits(
    name: str, root: Path, splits: dict[str, str], image_column: str, label_column: str
) -> dict[str, Split]:
    """Splits of a dataset by its timm name, such as torch/cifar10 or hfds/cifar10.

    `splits` maps our names to the dataset's: {'train': 'train', 'val': 'validation'}. Nothing is
    downloaded; for Hugging Face names the `datasets` package decides, and the columns are theirs.
    """
    columns: dict[str, Any] = {}
    hint = ""
    if name.lower().startswith("hfds/"):
        columns = {"input_key": image_column, "target_key": label_column}
        hint = "; --image-column and --label-column name the columns"
    found = {}
    for ours, theirs in splits.items():
        try:
            dataset = create_dataset(
                name, root=str(root), split=theirs, is_training=False, **columns
            )
        except (
            AssertionError,
            RuntimeError,
            ValueError,
            ImportError,
            OSError,
            LookupError,
        ) as error:
            first = str(error).partition("\n")[0] or type(error).__name__
            if "download=True" in first:  # torchvision's words
                hint = ", which this command does not take: let torchvision download it to --path"
            raise DataError(f"--name {name}, split {theirs}: {first}{hint}") from None
        found[ours] = dataset_split(
            dataset, ours, image_column=image_column, label_column=label_column
        )
    return found


def dataset_split(
    dataset: Any,
    prefix: str,
    label_names: Sequence[str] | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> Split:
    """A split of any dataset object; keys are `prefix` and the number of the item."""
    items = _Items(dataset, image_column, label_column)
    labels = items.labels()
    if not labels:
        raise DataError(f"the {prefix} split is empty; name another with --val-split or --name")
    numbered = _numbered(
        labels, f"the {prefix} split", "has it labels? name a split that has, such as --val-split"
    )
    names = label_names or _class_names(dataset, label_column) or numbered
    if len(names) < len(numbered):
        raise DataError(f"the {prefix} split: label {max(labels)} and {len(names)} class names")
    references: list[Reference] = [
        DatasetReference(f"{prefix}{number:08d}", items, number, label)
        for number, label in enumerate(labels)
    ]
    return Split(references, [str(name) for name in names])


def _class_names(dataset: Any, label_column: str) -> Sequence[str] | None:
    """As torchvision's datasets keep them, or those of Hugging Face, which timm wraps twice."""
    inner = getattr(getattr(dataset, "reader", None), "dataset", dataset)
    features = getattr(inner, "features", None) or {}
    return getattr(dataset, "classes", None) or getattr(features.get(label_column), "names", None)


@dataclass(frozen=True)
class _Items:
    """The items of a dataset object as (image, label); dicts have them under the two columns."""

    dataset: Any
    image_column: str
    label_column: str

    def labels(self) -> list[int]:
        """All labels: from the list that torchvision's datasets keep, else item by item."""
        targets = getattr(self.dataset, "targets", None)
        if targets is None:
            targets = [self[number][1] for number in range(len(self.dataset))]
        try:
            return [int(label) for label in targets]
        except (TypeError, ValueError):
            other = next(label for label in targets if not isinstance(label, int | np.integer))
            raise DataError(
                f"label {other!r} is no class number; name another column with --label-column"
            ) from None

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        # timm's dataset skips over images it cannot read without a word, its reader does not
        plain = self.dataset.reader if isinstance(self.dataset, ImageDataset) else self.dataset
        item = plain[number]
        if not isinstance(item, dict):
            return item[0], item[1]
        for column in (self.image_column, self.label_column):
            if column not in item:
                raise DataError(
                    f"an item has no {column!r} (columns: {', '.join(map(str, item))}); name the "
                    "columns with --image-column and --label-column"
                )
        return item[self.image_column], item[self.label_column]


@dataclass(frozen=True)
class DatasetReference:
    """An item of a dataset object."""

    key: str
    items: _Items
    number: int
    label: int

    def read(self) -> bytes:
        image = self.items[self.number][0]
        if isinstance(image, dict):  # Hugging Face's Image(decode=False): bytes, or where they are
            image = image["bytes"] or Path(image["path"]).read_bytes()
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
