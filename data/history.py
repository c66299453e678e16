"""Which position in the data each step of a run began at.

Step s begins at s times the batch, unless the run began from another's checkpoint (`origin.json`
beside its checkpoints) or went back past bad data (`rollbacks.json` there). Both files are the
trainer's: an object and a list of objects, of which the keys below are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError


class Stretch(NamedTuple):
    """Step `step` begins at `position`, and those after it follow."""

    step: int
    position: int


class History:
    """Args: `stretches`, ascending by step."""

    def __init__(self, stretches: list[Stretch], batch_size: int) -> None:
        self.stretches = stretches
        self.batch_size = batch_size

    @property
    def begins_at(self) -> int:
        """The run's first position."""
        return self.stretches[0].position

    @property
    def first_step(self) -> int:
        """0, or that of another run's checkpoint."""
        return self.stretches[0].step

    def position(self, step: int) -> int:
        """Where step `step` begins, counted from 0. DataError before the run's first."""
        if step < self.first_step:
            raise DataError(
                f"the run began at step {self.first_step}, and step {step} was another run's"
            )
        last = [own for own in self.stretches if own.step <= step][-1]
        return last.position + (step - last.step) * self.batch_size

    def first_step_from(self, position: int) -> int:
        """The first step that begins at `position` or later."""
        ends = [*(own.step for own in self.stretches[1:]), None]
        for own, end in zip(self.stretches, ends, strict=True):
            step = own.step + max(0, -((own.position - position) // self.batch_size))
            if end is None or step < end:
                return step
        raise AssertionError("the last stretch has no end")


def history_of(run: Path | None, batch_size: int) -> History:
    """That of a run folder, or of a run that only ever went straight on (also None).

    Raises:
        DataError: a file is there and cannot be read.
    """
    stretches = [Stretch(0, 0)]
    if run is not None:
        if origin := _read(run / "checkpoints" / "origin.json"):
            stretches = [Stretch(origin["step"], origin["position"])]
        for jump in _read(run / "checkpoints" / "rollbacks.json") or []:
            stretches = [own for own in stretches if own.step < jump["step"]]
            stretches.append(Stretch(jump["step"], jump["to"]))
    return History(stretches, batch_size)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it, or delete it") from None
