"""Small sets of shards made with Python's tarfile, so that the tests do not trust our writer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data.manifest import Manifest, ShardEntry, write_manifest

Members = list[tuple[str, bytes]]


def png(value: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> bytes:
    """An image whose pixels are noise around `value`, the same for the same value."""
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    pixels = np.random.default_rng(value).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def pair(key: str, number: int, label: int) -> Members:
    """A good sample."""
    return [(f"{key}.png", png(number)), (f"{key}.cls", str(label).encode())]


def write_tar(path: Path, members: Members) -> None:
    """A plain tar of the members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))


def amend(folder: Path, **fields: object) -> Path:
    """Change what the manifest of a set says, such as its label_names; returns the folder."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def vouch(folder: Path, sizes: dict[str, int], classes: int = 3) -> None:
    """A manifest for the shards in `folder`; `sizes` are the samples it claims."""
    entries = [
        ShardEntry(
            name=name,
            samples=samples,
            bytes=(folder / name).stat().st_size,
            sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        )
        for name, samples in sizes.items()
    ]
    total = sum(sizes.values())
    write_manifest(
        folder,
        Manifest(
            samples=total,
            class_counts=[total] + [0] * (classes - 1),
            mean=[0.5],
            std=[0.3],
            pixel_samples=total,
            modes={"L": total},
            width=(8, 8),
            height=(8, 8),
            shards=entries,
        ),
    )
