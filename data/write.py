"""`python -m data.write`: make shards from images.

    python -m data.write --source mnist --out shards/mnist
    python -m data.write --source folder --path photographs --held-out 0.1 --out shards/photographs
    python -m data.write --source idx --path fashion-mnist --out shards/fashion
    python -m data.write --source list --path images.csv --label-column species --out shards/birds
    python -m data.write --source dataset --name torch/cifar10 --path downloads --out shards/cifar

Writes OUT/train and OUT/val, each with its manifest; a split whose manifest is there and whose
shards have the right sizes is left alone, so a stopped run is simply started again. Another command
is refused: what it holds out may have been trained on. Samples are shuffled once, always alike:
training shuffles within a window, which cannot mend sorted classes.

An image that cannot be decoded is left out and named in skipped.jsonl; more than --max-skipped of
them stop the command.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from data.arguments import share, whole
from data.digits import idx_splits, mnist_splits
from data.encoding import Encoding
from data.errors import DataError, counted
from data.folders import SUFFIXES, folder_splits, listed
from data.locks import Busy, locked
from data.manifest import MANIFEST_NAME, Manifest, read_manifest
from data.recipe import recipe_of, refuse_another, refuse_unknown, with_samples
from data.remote import is_url, shown
from data.skipped import DEFAULT_SHARE, skipped_in
from data.sources import Split
from data.writer import write_split

SOURCES = ("mnist", "folder", "idx", "list", "dataset")
HOLD_OUT = ("folder", "list")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
COMPLETE = "; it is complete already (remove it to write it anew)"


def complete(folder: Path) -> Manifest | None:
    """The manifest of a finished split; None when there is none or shards are missing or cut."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder / MANIFEST_NAME)
    for entry in manifest.shards:
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            return None
    return manifest


def splits_of(arguments: argparse.Namespace) -> dict[str, Split]:
    """The splits of the source that the arguments name."""
    if arguments.held_out and arguments.source not in HOLD_OUT:
        raise DataError(
            f"--held-out is for {' and '.join(HOLD_OUT)}; {arguments.source} has its own val split"
        )
    if arguments.source == "mnist":
        return mnist_splits()
    path, held_out = arguments.path, arguments.held_out
    if path is None:
        raise DataError(f"--source {arguments.source} needs --path: where the images are")
    if arguments.source == "folder":
        return folder_splits(path, held_out, arguments.out)
    if arguments.source == "idx":
        return idx_splits(path)
    # timm's datasets import torch: seconds that the other sources need not wait
    from data.listings import list_splits, named_dataset_splits

    if arguments.source == "list":
        columns = arguments.image_column, arguments.label_column
        return list_splits(path, *columns, held_out, arguments.labels_are_names)
    if arguments.name is None:
        raise DataError("--source dataset needs --name, timm's name of it, such as torch/cifar10")
    return named_dataset_splits(
        arguments.name,
        path,
        {"train": "train", "val": arguments.val_split},
        arguments.image_column,
        arguments.label_column,
    )


def on_disk(name: str) -> Path:
    """The folder to write into. DataError for a URL, of which Path would make a folder 's3:'."""
    if is_url(name):
        raise DataError(
            f"--out {shown(name)} is a URL; write to a disk, then copy the folder with the store's "
            "own tool, such as `aws s3 sync FOLDER s3://BUCKET/FOLDER` or `gcloud storage rsync -r`"
        )
    return Path(name)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.write",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, choices=SOURCES)
    parser.add_argument("--path", type=Path, help="folder or file to read (all but mnist)")
    parser.add_argument("--name", help="dataset: timm's name, such as torch/cifar10 or hfds/mnist")
    parser.add_argument("--val-split", default="validation", help="dataset: the split for val")
    parser.add_argument(
        "--image-column", default="image", help="list, hfds: column with the images"
    )
    parser.add_argument(
        "--label-column", default="label", help="list, hfds: column with the classes"
    )
    parser.add_argument(
        "--labels-are-names",
        action="store_true",
        help="list: number the classes anew even where labels are numbers",
    )
    parser.add_argument("--out", required=True, help="folder that gets train/ and val/")
    parser.add_argument(
        "--shard-size", type=whole(1), help="samples per shard (mnist: 250; else 1000)"
    )
    parser.add_argument(
        "--held-out",
        type=share,
        default=0.0,
        help="folder, list: share of each class for val",
    )
    parser.add_argument(
        "--max-skipped",
        type=share,
        default=DEFAULT_SHARE,
        help="share of a split that may be unusable (0.01); more stops the command",
    )
    parser.add_argument(
        "--resize",
        type=whole(1),
        help="shrink the shorter side to this; what shrinks, or EXIF turns, is encoded anew",
    )
    parser.add_argument("--encode", choices=("jpg", "png", "webp"), help="encode all images so")
    parser.add_argument(
        "--quality", type=whole(1, 100), default=90, help="quality of what is encoded anew (90)"
    )
    parser.add_argument("--jobs", type=whole(1), default=1, help="processes that write shards")
    parsed = parser.parse_args(arguments)
    parsed.out = on_disk(parsed.out)
    parsed.shard_size = parsed.shard_size or (250 if parsed.source == "mnist" else 1000)
    return parsed


def run(arguments: argparse.Namespace) -> list[str]:
    """Write what is missing; a line for each split that says what is there now."""
    recipe = recipe_of(arguments)
    folders = {name: arguments.out / name for name in ("train", "val")}
    finished = {name: found for name in folders if (found := complete(folders[name]))}
    for name, manifest in finished.items():
        refuse_another(folders[name], manifest, recipe)
    # The digits cost seconds to parse: when both splits stand there is nothing to look at.
    if len(finished) == len(folders):
        return [f"{_told(folders[name], found)}{COMPLETE}" for name, found in finished.items()]
    splits = splits_of(arguments)
    read = " ".join(sorted(SUFFIXES))
    lines = [
        f"{arguments.path}: passed over {listed(split.ignored)} (only {read} are read)"
        for split in splits.values()
        if split.ignored
    ]
    for name, split in splits.items():
        if name in finished:
            refuse_another(folders[name], finished[name], with_samples(recipe, split))
            for other in splits.keys() - finished:
                refuse_unknown(folders[name], finished[name], other)
    with alone_in(arguments.out) if splits.keys() - finished.keys() else nullcontext():
        return lines + write_splits(arguments, splits, folders, recipe)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other writers out of the folder, where its disk knows locks: Lustre may be mounted
    without. DataError when there is one.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(out / ".data.write.lock", wait=False, remove=True))
        except Busy:
            raise DataError(
                f"another data.write is at work in {out}; wait for it, or name another --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def write_splits(
    arguments: argparse.Namespace,
    splits: dict[str, Split],
    folders: dict[str, Path],
    recipe: dict[str, Any],
) -> list[str]:
    """Write those that are not complete; a line for each."""
    lines = []
    encoding = Encoding(arguments.resize, arguments.encode, arguments.quality)
    for name, split in splits.items():
        folder = folders[name]
        if found := complete(folder):
            refuse_another(folder, found, with_samples(recipe, split))
            lines.append(f"{_told(folder, found)}{COMPLETE}")
        else:
            manifest = write_split(
                split,
                folder,
                arguments.shard_size,
                encoding,
                arguments.jobs,
                max_skipped=arguments.max_skipped,
                recipe=with_samples(recipe, split),
            )
            lines.append(_told(folder, manifest))
    return lines


def _told(folder: Path, manifest: Manifest) -> str:
    return "; ".join(filter(None, (f"{folder}: {summary(manifest)}", skipped_in(folder))))


def summary(manifest: Manifest) -> str:
    """Counts in words."""
    megabytes = sum(entry.bytes for entry in manifest.shards) / 1e6
    empty = manifest.class_counts.count(0)
    without = f" ({empty} of them empty)" if empty else ""
    return (
        f"{counted(manifest.samples, 'image')} of {len(manifest.class_counts)} classes{without} "
        f"in {counted(len(manifest.shards), 'shard')}, {megabytes:.1f} MB"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    try:
        print(*run(parse(arguments)), sep="\n")
    except DataError as error:
        print(f"data.write: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that is not ours
        print(f"data.write: {error}; mend it and start the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.write: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
