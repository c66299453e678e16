"""`python -m data.check`: is a set of shards whole, and what is in it?

    python -m data.check shards/mnist/train
    python -m data.check --write-manifest 'other/train-{000..099}.tar' --label-names classes.txt

Compares sizes and hashes with the manifest, checks the tar structure block by block, decodes every
image, looks for keys that come twice, and prints a report for people. Exit code 0: all is well;
1: something is wrong, and every finding is a line; 2: there was nothing to check.

--write-manifest makes the manifest of shards that were written elsewhere, and their index files.
It vouches for the files as they are now, so it refuses shards whose structure is damaged. Samples
that lack a label or an image of a type that is read, or whose name makes them a part of another
(img.1.jpg beside img.jpg), are left out and named in skipped.jsonl; more than --max-skipped of them
stop the command. Labels are looked for in .cls members; others are found
with --label-key json:KEY, or done without (--unlabelled), and then are in the index files alone.
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.arguments import share, whole
from data.errors import DataError, counted
from data.examination import ShardReport, Task, draft_of, examine, index_beside
from data.findings import about_classes, against_manifest, repeated_keys, shared_keys
from data.manifest import LABELS, MANIFEST_NAME, Manifest, publish, read_manifest
from data.manifest import write_manifest as save_manifest
from data.pool import each
from data.remote import is_url
from data.report import describe
from data.shards import match
from data.skipped import DEFAULT_SHARE, Skipped, told
from data.statistics import combine
from data.tar_index import CLS, JSON, UNLABELLED

NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
MAX_LINES = 50  # findings printed; the count is of all


def check_folder(
    folder: Path,
    reports: list[ShardReport],
    write: bool,
    label_names: list[str] | None,
    max_skipped: float = DEFAULT_SHARE,
) -> list[str]:
    """Print what is in a folder, write its manifest if asked; returns what is wrong."""
    earlier = _earlier(folder, _notes(reports) if write else [])
    if write:
        _leave_out(folder, reports, earlier, max_skipped)
    findings = [line for report in reports for line in report.damage]
    if write and findings:
        raise DataError(
            f"{findings[0]} ({counted(len(findings), 'damaged shard')}); a manifest "
            "would vouch for them: replace them or leave them out"
        )
    notes = _notes(reports)
    if any(note["class_counts"] for note in notes):
        names = label_names or (earlier.label_names if earlier else None)
        found = combine(notes, names)
        if label_names and len(found.class_counts) > len(label_names):
            raise DataError(
                f"--label-names has {len(label_names)} lines and {folder} has label "
                f"{len(found.class_counts) - 1}; give one line per class, label 0 first"
            )
        ignored = sum(report.ignored for report in reports)
        images = sum((report.images for report in reports), Counter())
        print(*describe(folder, found, names, notes, ignored, images), sep="\n")
        if write:
            _adopt(folder, reports, found, earlier)
        if skipped := [line for report in reports for line in report.skipped]:
            print(f"  skipped   {told(skipped, folder)}")
    elif write:
        raise DataError(f"{folder}: no usable sample; nothing to write a manifest about")
    manifest = read_manifest(folder / MANIFEST_NAME)
    findings += against_manifest(reports, manifest)
    findings += about_classes(folder, reports, manifest)
    return findings + [line for report in reports for line in report.bad]


def _notes(reports: list[ShardReport]) -> list[dict[str, Any]]:
    return [report.note for report in reports if report.note is not None]


def _leave_out(
    folder: Path, reports: list[ShardReport], earlier: Manifest | None, share: float
) -> None:
    """List the samples that a manifest will not know. DataError when they are too many."""
    lines = [line for report in reports for line in report.skipped]
    if not lines and earlier is not None:
        return  # a list that is there tells of the images that shards were once written from
    kept = sum(len(report.keys) for report in reports)
    skipped = Skipped(folder, kept + len(lines), share)
    skipped.add(lines)
    skipped.save()


def _adopt(
    folder: Path, reports: list[ShardReport], found: Manifest, earlier: Manifest | None
) -> None:
    """Give the index files their names, then write the manifest that vouches for them."""
    for report in reports:
        publish(draft_of(report.path), index_beside(report.path))
    recipe = dict(earlier.recipe or {}) if earlier else {}
    recipe.pop(LABELS, None)
    labels = {report.labels for report in reports} - {CLS}
    if labels:
        recipe[LABELS] = labels.pop()
    save_manifest(folder, found.model_copy(update={"recipe": recipe or None}))
    print(f"  wrote     {folder / MANIFEST_NAME}")


def _refuse_part(folder: Path, names: set[str]) -> None:
    """DataError where a manifest stands that knows other shards of the folder too: a new one would
    be for these alone, and nobody would vouch for the others.
    """
    try:
        known = {entry.name for entry in read_manifest(folder / MANIFEST_NAME).shards}
    except DataError:
        return
    if others := sorted(name for name in known - names if (folder / name).exists()):
        raise DataError(
            f"{folder / MANIFEST_NAME} is for other shards too ({others[0]} and {len(others) - 1} "
            "more); move one set to a folder of its own, name all shards of the folder in one "
            "command, or delete the manifest"
        )


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


def _labels_of(folder: Path) -> str:
    """Where the labels were when the shards of a folder were adopted; in .cls members otherwise."""
    try:
        return read_manifest(folder / MANIFEST_NAME).label_place
    except DataError:
        return CLS


def label_key(text: str) -> str:
    """An argument such as json:label."""
    if not re.fullmatch(rf"{JSON}.+", text):
        raise argparse.ArgumentTypeError(f"{text} is not of the form json:KEY, such as json:label")
    return text


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
    named = (path for pattern in arguments.shards for path in local(pattern))
    paths = list(dict.fromkeys(named))  # each once: patterns may overlap
    names = names_in(arguments.label_names) if arguments.label_names else None
    folders = dict.fromkeys(path.parent for path in paths)
    labels = {folder: arguments.labels or _labels_of(folder) for folder in folders}
    write = arguments.write_manifest
    for folder in folders if write else []:
        _refuse_part(folder, {path.name for path in paths if path.parent == folder})
    tasks = [Task(path, labels[path.parent], not arguments.headers_only, write) for path in paths]
    try:
        performed = each(examine, tasks, arguments.jobs)
        reports = list(tqdm(performed, total=len(tasks), unit="shard", disable=None))
        findings = []
        found = {f: [report for report in reports if report.path.parent == f] for f in folders}
        for folder, inside in found.items():
            findings += repeated_keys(inside)
            findings += check_folder(folder, inside, write, names, arguments.max_skipped)
    finally:
        for path in paths if write else []:
            draft_of(path).unlink(missing_ok=True)
    for line in shared_keys(found):
        print(f"  NOTE      {line}")
    for line in findings[:MAX_LINES]:
        print(f"  WRONG     {line}")
    if len(findings) > MAX_LINES:
        print(f"  WRONG     ... and {len(findings) - MAX_LINES} more")
    depth = (
        "headers and 256 images a shard read" if arguments.headers_only else "every image decoded"
    )
    print(counted(len(findings), "finding") if findings else f"all is well: {depth}")
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
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--label-key", dest="labels", type=label_key, help="json:KEY: where labels are, if not .cls"
    )
    where.add_argument(
        "--unlabelled", dest="labels", action="store_const", const=UNLABELLED,
        help="images without labels, for the objective mae: all are of class 0",
    )  # fmt: skip
    parser.add_argument(
        "--max-skipped",
        type=share,
        default=DEFAULT_SHARE,
        help="share of a folder's samples that may be left out (0.01)",
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
    except OSError as error:  # a full disk, a folder that is not ours
        mend = "mend it and start the same command again"
        if error.errno in NOT_OURS:
            mend = "link the shards (ln -s) into a folder that you may write into, and name it"
        print(f"data.check: {error}; {mend}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
