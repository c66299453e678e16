"""The source that is a folder of images, one folder a class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from data.errors import DataError
from data.keys import Keys
from data.sources import FileReference, Reference, Split, divide

# What a folder is searched for; the content decides what a file is.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp"))


def folder_splits(root: Path, held_out: float, out: Path | None = None) -> dict[str, Split]:
    """Images in one folder per class, as torchvision's ImageFolder reads them.

    With `train` and `val` folders inside, those are the splits; else `held_out` of each class is,
    of those in `train` where there is one. Shards may be written to `out` inside `root`: what is
    there from an earlier start is no class.
    """
    if not root.is_dir():
        raise DataError(f"--path {root} is no folder; name the folder that holds the class folders")
    named = [name for name in ("train", "val") if (root / name).is_dir()]
    if "train" not in named:
        return divide(_image_folder(root, None, out), held_out)
    train = _image_folder(root / "train", None)
    for path in set(root.iterdir()) - {root / name for name in named}:
        files = [path] if path.is_file() else path.rglob("*")
        train.ignored[f"in {path.name}/" if path.is_dir() else _kind(path)] += _number_of(files)
    if "val" not in named:
        return divide(train, held_out)
    if held_out:
        raise DataError(
            f"--held-out is {held_out:g} and {root} has a val folder of its own; leave the option "
            f"out, or take {root / 'train'} alone as --path"
        )
    return {"train": train, "val": _image_folder(root / "val", train.label_names)}


def _number_of(paths: Iterable[Path]) -> int:
    return sum(path.is_file() for path in paths)


def _kind(path: Path) -> str:
    """What a file that is passed over counts as."""
    return path.suffix.lower() or "without a suffix"


def _image_folder(root: Path, label_names: list[str] | None, out: Path | None = None) -> Split:
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    folders = [name for name in folders if out is None or not _is_for(out, root / name)]
    found = [name for name in folders if not name.startswith(".")]
    if odd := [name for name in found if not _is_text(name)]:
        raise DataError(f"{root}: the folder name {odd[0]!r} is no UTF-8; rename that class")
    label_names = label_names or found
    if unknown := set(found) - set(label_names):
        raise DataError(f"{root} has classes that train lacks: {', '.join(sorted(unknown)[:5])}")
    references: list[Reference] = []
    keys, folder = Keys(), str(root)
    ignored: Counter[str] = Counter()
    if beside := _number_of(root.iterdir()):
        ignored["beside the class folders"] = beside
    if hidden := len(folders) - len(found):
        ignored["hidden folders"] = hidden
    here = set(found)  # val may lack a class that train has
    for label, name in enumerate(label_names):
        for path in sorted(_files_below(root / name)) if name in here else ():
            if path.suffix.lower() not in SUFFIXES:
                ignored[_kind(path)] += 1
                continue
            relative = path.relative_to(root)
            key = keys.of(str(relative.with_suffix("")))
            references.append(FileReference(key, folder, str(relative), label))
    if not references:
        there = f" (there: {listed(ignored)})" if ignored else ""
        raise DataError(
            f"{root} holds no images in class folders; expected {root}/CLASS/NAME with one of "
            f"{' '.join(sorted(SUFFIXES))}{there}"
        )
    return Split(references, label_names, ignored)


def _is_for(out: Path, folder: Path) -> bool:
    """Whether a folder is there for the shards in `out` alone."""
    if not out.resolve().is_relative_to(folder.resolve()):
        return False
    return not any(path.suffix.lower() in SUFFIXES for path in _files_below(folder))


def _is_text(name: str) -> bool:
    """Whether a name that the file system gave is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _files_below(folder: Path) -> Iterator[Path]:
    """All files, through links to folders too, as torchvision goes; each folder once, by its own
    name where it has one here.

    Raises:
        OSError: a folder cannot be listed.
    """
    entered: set[tuple[int, int]] = set()
    for inside, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here = os.stat(inside)
        if (here.st_dev, here.st_ino) in entered:
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(inside, name)), name))
        paths = (Path(inside, name) for name in files)
        yield from (path for path in paths if path.is_file())


def _raise(error: OSError) -> NoReturn:
    raise error


def listed(ignored: Counter[str]) -> str:
    """'7 .txt, 3 .heic', the most first."""
    return ", ".join(f"{count} {kind}" for kind, count in ignored.most_common())
