"""What changes from step to step: the learning rate and the dials beside it, from the step alone.

A dial is anything else that follows from the number of the step: the capacity of the routers, the
size of the images, the memory of the weight average. All of them are pure functions of the step and
the config, so a resume needs no state. They act inside a training step only; between steps they are
at rest, so evaluation, pictures and exports see the model as it was built.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from timm.scheduler.scheduler import Scheduler


class Dial(Protocol):
    """One quantity that follows from the step."""

    def turn(self, step: int) -> None:
        """Set it for step `step` (0-based)."""

    def rest(self) -> None:
        """Back to what holds outside training steps."""

    def scalars(self) -> dict[str, float]:
        """Its value in the latest step, by the name of its curve."""

    def setting(self) -> str:
        """What two steps must share for their losses to be comparable; '' if it matters not."""


class Schedules:
    """The learning rate and all dials of a run.

    Args:
        rate: timm's schedule of the learning rate.
        dials: what else follows from the step.
    """

    def __init__(self, rate: Scheduler, dials: Sequence[Dial] = ()) -> None:
        self.rate = rate
        self.dials = tuple(dials)

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Everything as step `step` wants it; the rates stay so afterwards."""
        self.rate.step_update(step)
        for dial in self.dials:
            dial.turn(step)
        try:
            yield
        finally:
            for dial in self.dials:
                dial.rest()

    def scalars(self) -> dict[str, float]:
        """The dials' values in the latest step."""
        return {name: value for dial in self.dials for name, value in dial.scalars().items()}

    def setting(self) -> str:
        """Of the latest step, see `Dial.setting`."""
        return " ".join(filter(None, (dial.setting() for dial in self.dials)))
