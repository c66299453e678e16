"""Where a run went back to and which data it passed over: rollbacks.json beside its checkpoints.

The file and not the checkpoint says so, since a checkpoint is never written twice. Whoever loads
one goes on behind the data that spoiled what came after it, another run that begins from it too.
"""

import json
from pathlib import Path

from routedvit.training.manifest import replace_text

ROLLBACKS = "rollbacks.json"


def read_jumps(folder: Path) -> list[dict[str, int]]:
    """Each time the run went back: to which 'step', and the positions 'from' and 'to' it passed."""
    path = folder / ROLLBACKS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def note_jump(folder: Path, *, step: int, start: int, end: int) -> None:
    """Add one return to `step`, whose data went on at `end` instead of `start`."""
    jumps = [*read_jumps(folder), {"step": step, "from": start, "to": end}]
    replace_text(folder / ROLLBACKS, json.dumps(jumps))


def forget_jumps(folder: Path, *, after: int) -> None:
    """Drop the returns to later steps than `after`: the run will reach those steps anew."""
    jumps = read_jumps(folder)
    kept = [jump for jump in jumps if jump["step"] <= after]
    if kept != jumps:
        replace_text(folder / ROLLBACKS, json.dumps(kept))


def position_after(jumps: list[dict[str, int]], step: int, position: int) -> int:
    """Where the data of a checkpoint go on, which were at `position` when it was saved."""
    ends = [jump["to"] for jump in jumps if (jump["step"], jump["from"]) == (step, position)]
    return ends[-1] if ends else position
