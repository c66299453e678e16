"""A start meets the copy of its run (mirror.py): a folder without checkpoints gets the newest one.

A machine that is new has nothing, and one that was away for a while too little: there another has
gone on. Nothing of that is decided without a word, and a copy that cannot be reached ends a start
that has nothing else to go on from, instead of beginning anew.
"""

import json
from collections.abc import Callable
from pathlib import Path

from routedvit.training.checkpoints.bucket import Bucket
from routedvit.training.checkpoints.manifest import (
    MANIFEST,
    RUN_ID,
    Manifest,
    first_fault,
    replace_text,
    run_id,
)
from routedvit.training.checkpoints.mirror import CHECKPOINTS, PART, complete
from routedvit.training.checkpoints.ownership import OWNER
from routedvit.training.checkpoints.publishing import discard, hidden
from routedvit.training.checkpoints.rollbacks import ROLLBACKS, read_jumps
from routedvit.training.checkpoints.shelf import LATEST, names_in
from routedvit.training.config.base import ConfigError


class CopyUnreachable(ConfigError):
    """What a run would go on from cannot be had now; a scheduler may try again."""

    exit_code = 1


def fetch_run(folder: Path, bucket: Bucket, tell: Callable[[str], None]) -> bool:
    """Bring the run in the copy into a folder that has no checkpoint; whether there was one.

    Every file of its newest checkpoint is compared with its manifest; a damaged one is told, and
    the one before it taken. Of the other files those that are not here are brought.

    Raises:
        CopyUnreachable: the store does not give it.
        ConfigError: all checkpoints there are damaged.
    """
    try:
        names = bucket.names()
        whole = complete(names)
        for name in reversed(whole):
            final = folder / CHECKPOINTS / name
            fetched = hidden(final, "fetched")  # what a death leaves is cleared away as of a save
            for part in sorted(names, key=lambda part: part.endswith(f"/{MANIFEST}")):
                if part.startswith(f"{CHECKPOINTS}/{name}/"):
                    bucket.get(part, fetched / part.split("/", 2)[2])
            if fault := _fault(fetched):
                tell(f"checkpoint {name} in {bucket.shown} is damaged ({fault})")
                discard(fetched)
                continue
            for other in sorted(names):
                if not (PART.fullmatch(other) or other == OWNER or (folder / other).exists()):
                    bucket.get(other, folder / other)
            fetched.rename(final)  # last: from now on the folder has one
            replace_text(folder / CHECKPOINTS / LATEST, f"{name}\n")
            tell(f"{folder} had no checkpoint; {name} came from {bucket.shown}")
            return True
    except OSError as error:
        raise CopyUnreachable(
            f"checkpoint.mirror: {error}; {folder} has no checkpoint of its own to go on from"
        ) from error
    if whole:
        raise ConfigError(
            f"checkpoint.mirror: all {len(whole)} checkpoints in {bucket.shown} are damaged; the "
            "run begins anew where it names another place"
        )
    return False


def check_copy(folder: Path, bucket: Bucket, *, fresh: bool, resumes: bool) -> None:
    """Whether a start may go on with this folder and copy to there.

    Args:
        folder: of the run.
        bucket: the copy.
        fresh: the start moves the run in the folder aside.
        resumes: the start was given the checkpoint to go on from.

    Raises:
        ConfigError: it would overwrite what another run, or this one elsewhere, has copied.
        OSError: the store does not tell.
    """
    copied = complete(bucket.names())
    if not copied:
        return
    if fresh:
        raise ConfigError(
            f"checkpoint.mirror: {bucket.shown} is the copy of an earlier run, which --fresh does "
            "not move aside; give this one another name, or move or delete that copy"
        )
    here, own = names_in(folder / CHECKPOINTS), run_id(folder / CHECKPOINTS)
    theirs = (bucket.read(f"{CHECKPOINTS}/{RUN_ID}") or b"").decode().strip()
    if not here or (own and theirs and own != theirs):
        raise ConfigError(
            f"checkpoint.mirror: {bucket.shown} is the copy of another run; give this one another "
            "name, or move or delete that copy"
        )
    # a return that the copy has not heard of explains later checkpoints there
    jumps = json.loads(bucket.read(f"{CHECKPOINTS}/{ROLLBACKS}") or b"[]")
    has_gone_back = read_jumps(folder / CHECKPOINTS) != jumps
    if copied[-1] > here[-1] and not (resumes or has_gone_back):
        raise ConfigError(
            f"{folder} ends at {here[-1]}, and its copy {bucket.shown} at {copied[-1]}: the run "
            "went on elsewhere; move the folder away to go on from the copy, or go back with "
            f"--resume {here[-1]}"
        )


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint that was fetched, in words."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except ValueError:  # pydantic's is one
        return f"{MANIFEST} is no manifest of format 2"
    return first_fault(folder, manifest.files)
