"""`python -m data.check`: is a set of shards whole, and what is in it?

    python -m data.check shards/mnist/train
    python -m data.check --write-manifest 'other/train-{000..099}.tar' --label-names classes.txt

Compares sizes and hashes with the manifest, checks the tar structure block by block, decodes every
image, looks for keys that come twice, and prints a report for people. Exit code 0: all is well;
1: something is wrong, and every finding is a line; 2: there was nothing to check.

--write-manifest makes the manifest of shards that were written elsewhere, and their index files.
It vouches for the files as they are now, so it refuses shards whose structure is damaged.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.arguments import whole
from data.decode import MAX_IMAGE_BYTES, MAX_PIXELS, decode, open_image
from data.errors import BadSample, DataError
from data.index_file import SUFFIX, content_for, entry_for
from data.manifest import (
    MANIFEST_NAME,
    MAX_CLASSES,
    Manifest,
    ShardEntry,
    read_manifest,
    sha256_of,
    write_atomically,
)
from data.manifest import write_manifest as save_manifest
from data.pool import each
from data.remote import is_url
from data.report import describe
from data.shards import match
from data.statistics import ShardStatistics, combine
from data.tar_index import TarIndex, read_index

MAX_LINES = 50  # findings printed; the count is of all


@dataclass
class ShardReport:
    """What was found in one shard. `note` is None when its structure is damaged."""

    path: Path
    note: dict[str, Any] | None = None
    keys: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)  # of the shard
    bad: list[str] = field(default_factory=list)  # samples
    ignored: int = 0


def examine(path: Path, full_decode: bool = True) -> ShardReport:
    """Read a shard from end to end. Never raises for what is in it."""
    report = ShardReport(path)
    try:
        _examine(report, full_decode)
    except FileNotFoundError:
        report.damage.append(f"{path}: missing")
    except DataError as error:
        report.damage.append(str(error).partition("; replace the shard")[0])
    except OSError as error:
        report.damage.append(f"{path}: cannot be read ({error.strerror})")
    return report


def _examine(report: ShardReport, full_decode: bool) -> None:
    path = report.path
    index = read_index(path)
    report.keys = [index.key(sample) for sample in range(len(index))]
    report.ignored = index.ignored
    statistics = ShardStatistics()
    with open(path, "rb") as file:
        for sample in range(len(index)):
            try:
                _examine_sample(file, index, sample, statistics, full_decode)
            except BadSample as error:
                report.bad.append(f"{path}: {report.keys[sample]}: {error}")
    if len(index):
        entry = ShardEntry(
            name=path.name,
            samples=len(index),
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            index=entry_for(content_for(path)),
        )
        report.note = statistics.note(entry)
    else:
        report.damage.append(f"{path}: no sample in it")


def _examine_sample(
    file: Any, index: TarIndex, sample: int, statistics: ShardStatistics, full_decode: bool
) -> None:
    if sample in index.faults:
        raise BadSample(index.faults[sample])
    label, size = int(index.labels[sample]), int(index.sizes[sample])
    if label >= MAX_CLASSES:
        raise BadSample(f"label {label}; classes are numbered from 0 to {MAX_CLASSES - 1}")
    if size > MAX_IMAGE_BYTES:
        raise BadSample(f"an image of {size} encoded bytes; {MAX_IMAGE_BYTES} are allowed")
    file.seek(int(index.offsets[sample]))
    payload = file.read(size)
    image = open_image(payload, MAX_PIXELS)
    if full_decode:
        decode(payload, 3, MAX_PIXELS)
    statistics.add(image, label)


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
    file = path.with_name(path.name + SUFFIX)
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
    """Keys that more than one shard holds."""
    counts = Counter(key for report in reports for key in report.keys)
    return [f"key {key} is in {count} shards" for key, count in counts.items() if count > 1]


def check_folder(
    folder: Path, reports: list[ShardReport], write: bool, label_names: list[str] | None
) -> list[str]:
    """Print what is in a folder, write its manifest if asked; returns what is wrong."""
    findings = [line for report in reports for line in report.damage]
    if write and findings:
        raise DataError(
            f"{findings[0]} ({len(findings)} damaged shards); a manifest would vouch for them: "
            "replace them or leave them out"
        )
    notes = [report.note for report in reports if report.note is not None]
    if any(note["class_counts"] for note in notes):
        earlier = _earlier(folder, notes if write else [])
        names = label_names or (earlier.label_names if earlier else None)
        found = combine(notes, names)
        if label_names and len(found.class_counts) > len(label_names):
            raise DataError(
                f"--label-names has {len(label_names)} lines and {folder} has label "
                f"{len(found.class_counts) - 1}; give one line per class, label 0 first"
            )
        ignored = sum(report.ignored for report in reports)
        print(*describe(folder, found, names, notes, ignored), sep="\n")
        if write:
            for report in reports:
                index = report.path.with_name(report.path.name + SUFFIX)
                write_atomically(index, content_for(report.path))
            recipe = earlier.recipe if earlier else None
            save_manifest(folder, found.model_copy(update={"recipe": recipe}))
            print(f"  wrote     {folder / MANIFEST_NAME}")
    elif write:
        raise DataError(f"{folder}: no usable sample; nothing to write a manifest about")
    manifest = read_manifest(folder / MANIFEST_NAME)
    findings += against_manifest(reports, manifest)
    findings += about_classes(folder, reports, manifest)
    return findings + [line for report in reports for line in report.bad]


def _earlier(folder: Path, notes: list[dict[str, Any]]) -> Manifest | None:
    """The manifest of a folder, where it can be read and knows the shards that `notes` describe.

    How they were written and what their classes are called is found in no shard.
    """
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except DataError:
        return None
    known = {entry.sha256 for entry in manifest.shards}
    return manifest if known >= {note["entry"]["sha256"] for note in notes} else None


def local(pattern: str) -> list[Path]:
    """The shards a pattern names; every byte is read, so they have to be here."""
    if is_url(pattern):
        raise DataError(f"{pattern} is a URL; copy the shards to a disk and check them there")
    return [Path(name) for name in match(pattern)]


def names_in(path: Path) -> list[str]:
    """The class names in a file, one per line."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--label-names {path}: {error}; name a UTF-8 file with one class name per line"
        ) from None


def run(arguments: argparse.Namespace) -> int:
    """Check what the arguments name; returns the exit code."""
    paths = [path for pattern in arguments.shards for path in local(pattern)]
    names = names_in(arguments.label_names) if arguments.label_names else None
    examination = functools.partial(examine, full_decode=not arguments.headers_only)
    reports = list(
        tqdm(
            each(examination, paths, arguments.jobs),
            total=len(paths),
            unit="shard",
            disable=None,
        )
    )
    findings = repeated_keys(reports)
    for folder in dict.fromkeys(path.parent for path in paths):
        inside = [report for report in reports if report.path.parent == folder]
        findings += check_folder(folder, inside, arguments.write_manifest, names)
    for line in findings[:MAX_LINES]:
        print(f"  WRONG     {line}")
    if len(findings) > MAX_LINES:
        print(f"  WRONG     ... and {len(findings) - MAX_LINES} more")
    depth = (
        "headers and 256 images a shard read" if arguments.headers_only else "every image decoded"
    )
    print(f"{len(findings)} findings" if findings else f"all is well: {depth}")
    return 1 if findings else 0


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", help="manifest, folder, glob or brace pattern")
    parser.add_argument(
        "--write-manifest", action="store_true", help="make the manifest, from the shards as found"
    )
    parser.add_argument("--label-names", type=Path, help="file with one class name per line")
    parser.add_argument(
        "--headers-only", action="store_true", help="decode only 256 images a shard"
    )
    parser.add_argument("--jobs", type=whole(1), default=1, help="processes that read shards")
    try:
        return run(parser.parse_args(arguments))
    except DataError as error:
        print(f"data.check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
