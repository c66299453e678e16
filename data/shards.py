"""From what a user writes as `shards` to files that a manifest vouches for.

A pattern is a manifest.json, a folder that holds one, a glob or a brace pattern, as paths or as
URLs, or a list of these. Nothing in it ever reaches a shell. Each folder needs its manifest, and
each shard must be in it; several folders make one set whose statistics are pooled. Where nobody may
write into the folder, `manifest` names one that lies elsewhere.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from data.config import RemoteConfig
from data.errors import DataError
from data.labels import Classes, joined
from data.manifest import MANIFEST_NAME, Manifest, ShardEntry, parse_manifest, read_manifest
from data.remote import as_folder, check_url, file_name, find, is_url, read_bytes, shown, sibling
from data.tar_index import UNLABELLED

MAX_SHARDS = 1_000_000  # `{0..999999999}` is a typing error, not a dataset
MAX_MANIFEST_BYTES = 1 << 28
_GLOB = re.compile(r"[*\[]")  # in a URL: a question mark begins its query


@dataclass(frozen=True)
class ShardSet:
    """Shards in a fixed order, with what their manifests say about them as a whole."""

    names: list[str]  # paths, or URLs
    entries: list[ShardEntry]
    classes: Classes
    mean: list[float]
    std: list[float]
    manifests: list[str] = field(default_factory=list)  # of each shard; empty: beside it
    label_places: list[str] = field(default_factory=list)  # of each shard; empty: .cls members
    source_sizes: tuple[int, ...] = ()  # shards per source, in a mixture of them

    @property
    def num_classes(self) -> int:
        """Classes that labels tell apart."""
        return self.classes.number

    @property
    def label_names(self) -> list[str] | None:
        """A name for each class, its number where only others are known; None without any."""
        names = self.classes.names
        return names and names + [str(label) for label in range(len(names), self.num_classes)]

    @property
    def sizes(self) -> list[int]:
        """Samples per shard."""
        return [entry.samples for entry in self.entries]

    @cached_property
    def remote(self) -> bool:
        """Whether any of them has to be fetched."""
        return any(is_url(name) for name in self.names)

    def digest(self) -> str:
        """'4,000 samples in 16 shards, sha256 0123456789ab', of the entries in their order.

        Of a mixture '10 + 6 shards': where a source ends is part of the order of samples.
        """
        lines = "".join(f"{entry.name} {entry.sha256}\n" for entry in self.entries)
        digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
        count = " + ".join(map(str, self.source_sizes or [len(self.entries)]))
        return f"{self.num_samples:,} samples in {count} shards, sha256 {digest}"

    @cached_property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.sizes)


def resolve(
    shards: str | list[str],
    field: str = "data.train.shards",
    remote: RemoteConfig = RemoteConfig(),  # noqa: B008, never written to
    manifest: str | None = None,
    labelled: bool = True,
) -> ShardSet:
    """The shards that a config names. DataError, naming `field`, when they cannot be used.

    `manifest` is where theirs lies, if not beside them; `labelled` says whether labels are read,
    which then must agree.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    names = _names(patterns, field, remote, manifest)
    homes = [manifest or sibling(name, MANIFEST_NAME) for name in names]
    manifests = {home: _load_manifest(home, remote, field) for home in dict.fromkeys(homes)}
    entries = _entries(names, homes, manifests, field)
    mean, std = pooled(
        [(manifest.mean, manifest.std, manifest.samples) for manifest in manifests.values()]
    )
    return ShardSet(
        names=names,
        entries=entries,
        classes=joined([(home, _classes(m)) for home, m in manifests.items()], field, labelled),
        mean=mean,
        std=std,
        manifests=homes,
        label_places=[manifests[home].label_place for home in homes],
    )


def _names(
    patterns: list[str], field: str, remote: RemoteConfig, manifest: str | None
) -> list[str]:
    """The shards that all patterns name, each once. DataError without any, or with too many."""
    names = [name for pattern in patterns for name in match(pattern, field, remote, manifest)]
    if not names:
        raise DataError(f"{field} is empty; name at least one manifest, glob or brace pattern")
    if len(names) > MAX_SHARDS:
        raise DataError(f"{field} names more than {MAX_SHARDS} shards; give fewer, larger shards")
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{field} names {shown(twice)} twice; name each shard once")
    if manifest and len(set(map(file_name, names))) != len(names):
        raise DataError(
            f"{field} names two shards that {shown(manifest)} cannot tell apart, which knows them "
            "by their file names; name each shard once"
        )
    return names


def _entries(
    names: list[str], homes: list[str], manifests: dict[str, Manifest], field: str
) -> list[ShardEntry]:
    """What its manifest says of each shard. DataError where it says nothing."""
    known = {
        home: {entry.name: entry for entry in manifest.shards}
        for home, manifest in manifests.items()
    }
    entries = []
    for name, home in zip(names, homes, strict=True):
        if file_name(name) not in known[home]:
            raise DataError(
                f"{field}: {file_name(name)} is not in {shown(home)}; leave it out, or make the "
                "manifest again with `python -m data.check --write-manifest`"
            )
        entries.append(known[home][file_name(name)])
    return entries


def match(
    pattern: str,
    field: str = "shards",
    remote: RemoteConfig = RemoteConfig(),  # noqa: B008, never written to
    manifest: str | None = None,
) -> list[str]:
    """The shards that one pattern names, in order, as paths or URLs. DataError without any."""
    if manifest and file_name(pattern) == MANIFEST_NAME:
        raise DataError(
            f"{field} is a manifest, and {_beside(field)} names one too; "
            "name the folder of the shards"
        )
    if is_url(pattern):
        check_url(pattern, field)
        return _match_url(pattern, field, remote, manifest)
    path = Path(pattern)
    # Path.is_dir would raise at a list in braces that is longer than a name may be
    is_folder = os.path.isdir(path)
    if manifest and is_folder:
        return [str(path / entry.name) for entry in _load_manifest(manifest, remote, field).shards]
    if is_folder:
        path = path / MANIFEST_NAME
    if path.name == MANIFEST_NAME:
        return [str(path.parent / entry.name) for entry in read_manifest(path).shards]
    names = expand_braces(pattern, field)
    found: list[str] = []
    there = _files_beside(names) if len(names) > 1 else None
    for name in names:
        is_file = os.path.isfile(name) if there is None else name in there
        hits = [name] if is_file else sorted(glob.glob(name))
        if not hits:
            what = "no shard matches" if len(names) == 1 else f"{name} is missing of"
            raise DataError(
                f"{field}: {what} {pattern!r}; write shards with `python -m data.write`, or "
                "correct the pattern"
            )
        found += [str(Path(hit)) for hit in hits]
    return found


def _files_beside(names: list[str]) -> set[str]:
    """Those of `names` that are files: a folder is listed once instead of asking about each name,
    which every rank of a large run would do for tens of thousands at once.
    """
    files: set[str] = set()
    for folder in {os.path.dirname(name) for name in names}:
        try:
            with os.scandir(folder or ".") as entries:
                files |= {os.path.join(folder, e.name) for e in entries if e.is_file()}
        except OSError:
            continue  # the glob finds nothing there either, which is told
    return files


def _match_url(pattern: str, field: str, remote: RemoteConfig, manifest: str | None) -> list[str]:
    """As `match`; a URL that does not end in .tar is a manifest or the folder of one.

    Nothing is asked about each shard: the manifest knows them, and the reader meets them.
    """
    if file_name(pattern) == MANIFEST_NAME or not file_name(pattern).endswith(".tar"):
        is_manifest = file_name(pattern) == MANIFEST_NAME
        home = pattern if is_manifest else sibling(as_folder(pattern), MANIFEST_NAME)
        entries = _load_manifest(manifest or home, remote, field).shards
        return [sibling(home, entry.name) for entry in entries]
    found: list[str] = []
    for url in expand_braces(pattern, field):
        hits = find(url, remote) if _GLOB.search(urlsplit(url).path) else [url]
        if not hits:
            mend = "correct the pattern"
            if urlsplit(url).query:
                mend = "servers list files without a query: name the folder, or a brace pattern"
            raise DataError(f"{field}: no shard matches {shown(url)!r}; {mend}")
        found += hits
    return found


def _beside(field: str) -> str:
    """The key of the manifest beside the `field` that names its shards."""
    return f"{field.removesuffix('shards')}manifest"


def _load_manifest(name: str, remote: RemoteConfig, field: str) -> Manifest:
    if is_url(name):
        check_url(name, _beside(field))
        return parse_manifest(read_bytes(name, remote, MAX_MANIFEST_BYTES), shown(name))
    return read_manifest(Path(name))


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


def _classes(manifest: Manifest) -> Classes:
    """What a manifest says; names without labels are of labels that were set aside."""
    labelled = manifest.label_place != UNLABELLED
    return Classes(len(manifest.class_counts), manifest.label_names if labelled else None, labelled)


def pooled(
    parts: list[tuple[list[float], list[float], float]],
) -> tuple[list[float], list[float]]:
    """Mean and std of a union of (mean, std, weight); grey counts as three equal channels."""
    if len(parts) == 1:
        return parts[0][:2]
    channels = max(len(mean) for mean, _, _ in parts)
    weights = np.array([weight for _, _, weight in parts], dtype=np.float64)
    weights /= weights.sum()
    means = np.array([np.broadcast_to(mean, channels) for mean, _, _ in parts])
    stds = np.array([np.broadcast_to(std, channels) for _, std, _ in parts])
    mean = weights @ means
    std = np.sqrt(weights @ (stds**2 + means**2) - mean**2)
    return mean.tolist(), std.tolist()
