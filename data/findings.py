"""Where a set of shards is not what its manifest says, a line for each finding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import legible
from data.examination import ShardReport, index_beside, key_hashes
from data.manifest import Manifest, ShardEntry, sha256_of
from data.tar_index import read_index


def against_manifest(reports: list[ShardReport], manifest: Manifest) -> list[str]:
    """Where the shards of one folder differ from its manifest."""
    known = {entry.name: entry for entry in manifest.shards}
    findings = []
    for report in reports:
        entry = known.get(report.path.name)
        if entry is None:
            findings.append(f"{report.path}: not in the manifest")
        elif report.note is not None:
            found = report.note["entry"]
            findings += [
                f"{report.path}: {what} is {found[what]}, the manifest says {getattr(entry, what)}"
                for what in ("samples", "bytes", "sha256")
                if found[what] != getattr(entry, what)
            ]
            if found["sha256"] == entry.sha256:  # else its index must differ too
                findings += _about_index(report.path, found["index"], entry)
            classes = len(manifest.class_counts)
            top = max(map(int, report.note["class_counts"]), default=0)
            if top >= classes:
                findings.append(f"{report.path}: label {top}, the manifest has {classes} classes")
    return findings


def _about_index(path: Path, found: dict[str, Any], entry: ShardEntry) -> list[str]:
    """What is wrong with the index file of a shard whose walk would make `found`."""
    if entry.index is None:
        return []
    file = index_beside(path)
    if not file.is_file():
        return [f"{file}: missing; reading the shard takes longer without"]
    if sha256_of(file) != entry.index.sha256:
        return [f"{file}: not the file that the manifest knows; it will not be used"]
    if found["sha256"] != entry.index.sha256:
        return [f"{file}: it describes other content than the shard has"]
    return []


def about_classes(folder: Path, reports: list[ShardReport], manifest: Manifest) -> list[str]:
    """Where the classes that were found in a whole folder are not those of its manifest."""
    whole_set = {report.path.name for report in reports} == {s.name for s in manifest.shards}
    if not whole_set or any(report.damage or report.bad for report in reports):
        return []  # then there are other findings, and the numbers must differ
    found: Counter[int] = Counter()
    for report in reports:
        if report.note is not None:
            found.update({int(label): n for label, n in report.note["class_counts"].items()})
    wrong = [
        f"{folder}: {found[label]} images of class {label}, the manifest says {count}"
        for label, count in enumerate(manifest.class_counts)
        if found[label] != count
    ]
    return [f"{wrong[0]} (and {len(wrong) - 1} more classes)"] if len(wrong) > 1 else wrong


def repeated_keys(reports: list[ShardReport]) -> list[str]:
    """Keys that more than one shard of a folder holds."""
    repeated = _repeated([report.keys for report in reports])
    if not len(repeated):
        return []
    counts: Counter[str] = Counter()
    for report in reports:
        if np.isin(report.keys, repeated).any():  # the keys themselves were left in the shard
            index = read_index(report.path, labels=report.labels)
            rows = np.flatnonzero(np.isin(key_hashes(index), repeated)).tolist()
            counts.update(index.key(row) for row in rows)
    return [
        f"key {legible(key)} is in {count} shards" for key, count in counts.items() if count > 1
    ]


def shared_keys(folders: dict[Path, list[ShardReport]]) -> list[str]:
    """A hint, where folders have keys in common: the same images, or others of these names."""
    keys = {
        folder: np.unique(np.concatenate([report.keys for report in reports]))
        for folder, reports in folders.items()
    }
    repeated = np.unique(_repeated(list(keys.values())))
    if not len(repeated):
        return []
    homes = [folder for folder, own in keys.items() if repeated[0] in own]
    report = next(report for report in folders[homes[0]] if repeated[0] in report.keys)
    index = read_index(report.path, labels=report.labels)
    key = index.key(int(np.flatnonzero(key_hashes(index) == repeated[0])[0]))
    return [
        f"keys that are in more than one folder: {len(repeated)}, such as {legible(key)} in "
        f"{' and '.join(map(str, homes))}; if these are the same images, one is too many"
    ]


def _repeated(keys: list[np.ndarray]) -> np.ndarray:
    """What stands more than once in the arrays together."""
    hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *keys]))
    return hashes[1:][hashes[1:] == hashes[:-1]]
