"""Where a run went back to and which data it passed over: rollbacks.json beside its checkpoints.

The file and not the checkpoint says so, since a checkpoint is never written twice. Whoever loads
one goes on behind the data that spoiled what came after it, another run that begins from it too.
"""

import json
from pathlib import Path

from routedvit.training.checkpoints.manifest import replace_text

ROLLBACKS = "rollbacks.json"


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
