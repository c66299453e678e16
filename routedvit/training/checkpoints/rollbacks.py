"""Where a run began and went back to, and which data it passed over: two files beside its
checkpoints, origin.json and rollbacks.json, which `data.order` and `data.audit` read too.

The file and not the checkpoint says so, since a checkpoint is never written twice. Whoever loads
one goes on behind the data that spoiled what came after it, another run that begins from it too.
"""

import json
from pathlib import Path

from routedvit.training.checkpoints.manifest import replace_text

ROLLBACKS, ORIGIN = "rollbacks.json", "origin.json"


def note_origin(folder: Path, checkpoint: Path, step: int, position: int) -> None:
    """The run begins from another's checkpoint, at a step and a position that are not 0."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"checkpoint": str(checkpoint), "step": step, "position": position}
    replace_text(folder / ORIGIN, json.dumps(origin) + "\n")


def forget_origin(folder: Path) -> None:
    """The run begins at 0."""
    (folder / ORIGIN).unlink(missing_ok=True)


def read_jumps(folder: Path) -> list[dict[str, int]]:
    """Each time the run went back: to which 'step', past the data from position 'from' to 'to'.

    'returns' is how often it had by then (see guard.py); older files do not say.
    """
    path = folder / ROLLBACKS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def note_jump(folder: Path, jump: dict[str, int]) -> None:
    """Add one return, with the keys of `read_jumps`."""
    jumps = [*read_jumps(folder), jump]
    replace_text(folder / ROLLBACKS, json.dumps(jumps))


def forget_jumps(folder: Path, *, after: int) -> None:
    """Drop the returns to later steps than `after`: the run will reach those steps anew."""
    jumps = read_jumps(folder)
    kept = [jump for jump in jumps if jump["step"] <= after]
    if kept != jumps:
        replace_text(folder / ROLLBACKS, json.dumps(kept))


def last_jump(jumps: list[dict[str, int]], step: int, position: int) -> dict[str, int] | None:
    """The last return to a checkpoint whose data were at `position` when it was saved."""
    found = [jump for jump in jumps if (jump["step"], jump["from"]) == (step, position)]
    return found[-1] if found else None
