"""The manifest beside a set of shards: what is in them, how many, and their hashes.

A tar file cut at a member boundary is a shorter valid-looking tar, so nothing in the shard itself
tells that samples are missing; the manifest does. It is written last, after every shard it names:
its presence means that the set is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.errors import DataError
from data.tar_index import CLS

MANIFEST_NAME = "manifest.json"
LABELS = "labels"  # in a recipe: where they are, if not in .cls members
MAX_CLASSES = 1_000_000  # a label above is an identifier, or damage; counts are kept as a list


class IndexEntry(BaseModel):
    """The file beside a shard that says where its samples lie; see data.index_file."""

    model_config = ConfigDict(extra="forbid")
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ShardEntry(BaseModel):
    """One shard: its file name (no folder), and what proves that it is whole."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[^/\\\x00]+$")
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1024)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    index: IndexEntry | None = None  # None: the shard is walked


class Manifest(BaseModel):
    """What `manifest.json` holds. Pixel statistics are in units of the range 0 to 1."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    format: Literal[1] = 1
    samples: int
    class_counts: list[int]  # index: the label
    label_names: list[str] | None = None
    mean: list[float]  # one value per channel: 1 when every image is grey, else 3
    std: list[float]
    pixel_samples: int  # images that mean and std were taken from
    modes: dict[str, int]  # Pillow mode -> images
    width: tuple[int, int]  # smallest, largest
    height: tuple[int, int]
    recipe: dict[str, str] | None = None  # of `data.write`, see data.recipe
    shards: list[ShardEntry]

    @property
    def label_place(self) -> str:
        """Where the samples have their labels, as `tar_index.index_of` takes it."""
        return (self.recipe or {}).get(LABELS, CLS)

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        total = sum(shard.samples for shard in self.shards)
        if total != self.samples:
            raise ValueError(f"samples is {self.samples} but the shards add up to {total}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("a shard is named twice")
        return self


def read_manifest(path: Path) -> Manifest:
    """The checked manifest at `path`. DataError when it is missing, unreadable or inconsistent."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        below = sorted(str(found.parent) for found in path.parent.glob(f"*/{path.name}"))
        mend = f"name a set below it: {' or '.join(below)}"
        if not below:
            mend = (
                "for shards made elsewhere, make it once with "
                f"`python -m data.check --write-manifest '{path.parent}/*.tar'`"
            )
        raise DataError(f"{path.parent} has no {MANIFEST_NAME}; {mend}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name the {MANIFEST_NAME} in it") from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, name: str) -> Manifest:
    """The checked manifest that came from `name`. DataError when it is damaged or inconsistent."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{name}: {where}: {first['msg']}; write the shards again, or make the manifest again "
            "with `python -m data.check --write-manifest`"
        ) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, whole or not at all."""
    text = json.dumps(manifest.model_dump(), indent=1) + "\n"
    write_atomically(folder / MANIFEST_NAME, text.encode())


def write_atomically(path: Path, payload: bytes) -> None:
    """Write `payload` to a temporary name, flush it to the disk, then take the final name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Rename a flushed file to its final name and flush the folder, so the name survives too.

    Some file systems (FUSE, CIFS) cannot flush a folder.
    """
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb", buffering=0) as file:
        return sha256_of_open(file.fileno())


def sha256_of_open(descriptor: int) -> str:
    """The SHA-256 of an open file, whatever its position: other processes may share that."""
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, 1 << 20, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
