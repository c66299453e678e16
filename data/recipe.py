"""How a set was written, kept in its manifest: the same command goes on, another one is refused.

Were an image held out today and trained on yesterday, because --held-out came later and train/ was
complete already, no number measured on it would mean anything, and nothing would tell.

A recipe maps the options that decide about shards to their values in words. SAMPLES, a hash of the
keys and labels that the source listed, is among them: files that came or went since deal the rest
onto other splits. The content of files under old names is not looked at. Of --path only the last
part is kept: sets travel, and a home folder's name is nobody's business.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from data.errors import DataError
from data.manifest import Manifest
from data.sources import Split

SAMPLES = "samples"
ALWAYS = ("source", "resize", "encode", "shard_size")
OF_SOURCE = {
    "mnist": (),
    "folder": ("path", "held_out"),
    "idx": ("path",),
    "list": ("path", "held_out", "image_column", "label_column", "labels_are_names"),
    "dataset": ("path", "name", "val_split", "image_column", "label_column"),
}


def recipe_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The options that decide which samples are written, where and how."""
    names = [*ALWAYS, *OF_SOURCE[arguments.source]]
    if arguments.resize or arguments.encode:
        names.append("quality")
    return {f"--{name.replace('_', '-')}": _word(getattr(arguments, name)) for name in names}


def _word(value: object) -> str:
    if isinstance(value, Path):
        return value.resolve().name
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def with_samples(recipe: dict[str, str], split: Split) -> dict[str, str]:
    """The recipe plus the hash of what the source lists."""
    digest = hashlib.sha256()
    for reference in split.references:
        digest.update(f"{reference.key} {reference.label}\n".encode())
    return recipe | {SAMPLES: digest.hexdigest()[:16]}


def refuse_another(folder: Path, manifest: Manifest, recipe: dict[str, str]) -> None:
    """DataError when the finished `folder` was written by another recipe.

    A manifest that names none (it is `data.check`'s) is taken for what it is asked to be.
    """
    for option, value in recipe.items():
        known = (manifest.recipe or recipe).get(option, "nothing")
        if known == value:
            continue
        what = f"with {option} {known} and this command says {value}"
        if option == SAMPLES:
            what = "from other samples than its source lists now (some came, went, or were renamed)"
        raise DataError(
            f"{folder} was written {what}; remove {folder.parent} to write it anew, or give "
            "another --out"
        )


def refuse_unknown(folder: Path, manifest: Manifest, beside: str) -> None:
    """DataError when nobody can tell whether `folder` shares images with a split beside it."""
    if manifest.recipe is None:
        raise DataError(
            f"{folder} does not say how it was written, so {beside} could share images with it; "
            f"give another --out, or remove {folder.parent} to write both anew"
        )
