"""From what a user writes as `shards` to files that a manifest vouches for.

A pattern is a manifest.json, a folder that holds one, a glob or a brace pattern, or a list of
these. Nothing in it ever reaches a shell. Each folder needs its manifest, and each shard must be in
it; several folders make one set whose statistics are pooled.
"""

from __future__ import annotations

import glob
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest

MAX_SHARDS = 1_000_000  # `{0..999999999}` is a typing error, not a dataset
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")


@dataclass(frozen=True)
class ShardSet:
    """Shards in a fixed order, with what their manifests say about them as a whole."""

    paths: list[Path]
    entries: list[ShardEntry]
    num_classes: int
    label_names: list[str] | None
    mean: list[float]
    std: list[float]

    @property
    def sizes(self) -> list[int]:
        """Samples per shard."""
        return [entry.samples for entry in self.entries]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.sizes)


def resolve(shards: str | list[str], field: str = "data.train.shards") -> ShardSet:
    """The shards that a config names. DataError, naming `field`, when they cannot be used."""
    patterns = [shards] if isinstance(shards, str) else shards
    paths = [path for pattern in patterns for path in match(pattern, field)]
    if not paths:
        raise DataError(f"{field} is empty; name at least one manifest, glob or brace pattern")
    if len(paths) > MAX_SHARDS:
        raise DataError(f"{field} names more than {MAX_SHARDS} shards; give fewer, larger shards")
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise DataError(f"{field} names {twice} twice; name each shard once")
    manifests = {folder: read_manifest(folder / MANIFEST_NAME) for folder in _folders(paths)}
    known = {
        folder: {entry.name: entry for entry in manifest.shards}
        for folder, manifest in manifests.items()
    }
    entries = []
    for path in paths:
        if path.name not in known[path.parent]:
            raise DataError(
                f"{field}: {path.name} is not in {path.parent / MANIFEST_NAME}; leave it out, or "
                "make the manifest again with `python -m data.check --write-manifest`"
            )
        entries.append(known[path.parent][path.name])
    mean, std = _pooled(list(manifests.values()))
    return ShardSet(
        paths=paths,
        entries=entries,
        num_classes=max(len(manifest.class_counts) for manifest in manifests.values()),
        label_names=_label_names(manifests, field),
        mean=mean,
        std=std,
    )


def match(pattern: str, field: str = "shards") -> list[Path]:
    """The existing shard files that one pattern names, in order. DataError when there is none."""
    if _SCHEME.match(pattern):
        raise DataError(
            f"{field}: {pattern!r} is no local path; only local shards can be read: copy the "
            "shards to a disk first"
        )
    path = Path(pattern)
    if path.is_dir():
        path = path / MANIFEST_NAME
    if path.name == MANIFEST_NAME:
        return [path.parent / entry.name for entry in read_manifest(path).shards]
    names = expand_braces(pattern, field)
    found: list[Path] = []
    for name in names:
        hits = [name] if Path(name).is_file() else sorted(glob.glob(name))
        if not hits:
            what = "no shard matches" if len(names) == 1 else f"{name} is missing of"
            raise DataError(
                f"{field}: {what} {pattern!r}; write shards with `python -m data.write`, or "
                "correct the pattern"
            )
        found += [Path(hit) for hit in hits]
    return found


def expand_braces(pattern: str, field: str = "shards") -> list[str]:
    """`x-{000..002}{a,b}` -> the six names, as a shell would make them. DataError when it cannot.

    Counted before the names are made: `{0..999999999}` is a typing error.
    """
    texts = re.split(r"\{([^{}]*)\}", pattern)
    if any("{" in text or "}" in text for text in texts[::2]):
        raise DataError(f"{field}: {pattern!r} has unbalanced or nested braces; write them out")
    choices = [_choices(text) if number % 2 else [text] for number, text in enumerate(texts)]
    count = math.prod(len(choice) for choice in choices)
    if not 0 < count <= MAX_SHARDS:
        raise DataError(
            f"{field}: {pattern!r} stands for {count} shards or more; from 1 to {MAX_SHARDS} can "
            "be read"
        )
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(body: str) -> list[str]:
    """What stands between braces: a range of numbers or a comma list."""
    ends = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", body)
    if not ends:
        return body.split(",") if "," in body else [f"{{{body}}}"]
    padded = any(len(end) > 1 and end.startswith("0") for end in ends.groups())
    width = max(map(len, ends.groups())) if padded else 0
    first, last = int(ends[1]), min(int(ends[2]), int(ends[1]) + MAX_SHARDS)  # one too many at most
    return [str(number).zfill(width) for number in range(first, last + 1)]


def _folders(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(path.parent for path in paths))


def _label_names(manifests: dict[Path, Manifest], field: str) -> list[str] | None:
    """The label names all manifests agree on; None when none has any."""
    named = [(folder, m.label_names) for folder, m in manifests.items() if m.label_names]
    for folder, names in named[1:]:
        if names != named[0][1]:
            raise DataError(
                f"{field}: {folder} and {named[0][0]} number their classes differently; write "
                "them again from one list of classes"
            )
    return named[0][1] if named else None


def _pooled(manifests: list[Manifest]) -> tuple[list[float], list[float]]:
    """Mean and std of the union, weighted by samples; grey sets count as three equal channels."""
    if len(manifests) == 1:
        return manifests[0].mean, manifests[0].std
    channels = max(len(manifest.mean) for manifest in manifests)
    weights = np.array([manifest.samples for manifest in manifests], dtype=np.float64)
    weights /= weights.sum()
    means = np.array([np.broadcast_to(manifest.mean, channels) for manifest in manifests])
    stds = np.array([np.broadcast_to(manifest.std, channels) for manifest in manifests])
    mean = weights @ means
    std = np.sqrt(weights @ (stds**2 + means**2) - mean**2)
    return mean.tolist(), std.tolist()
