"""Which checkpoints stay: the newest ones, every k-th for good, the best by a metric.

A metric that is not finite says nothing about its checkpoint: it counts as one not evaluated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Retention:
    """The rule, over step numbers.

    Args:
        keep: so many of the newest stay, at least one.
        keep_every: the first at or after each multiple stays for good (a bad step is not saved, and
            the one after it is); None: none of them.
        keep_best: so many of the best stay, by the value of `metric` at their step.
        metric: name of an evaluation's value, such as 'val/top1'.
        mode: 'max' if a higher value is better, else 'min'.
    """

    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    metric: str = "val/top1"
    mode: Literal["max", "min"] = "max"

    def surplus(
        self, values: Mapping[int, float | None], *, before: int | None = None
    ) -> list[int]:
        """Steps that may go, given the metric of every step that has a checkpoint (or None).

        The newest one before step `before` stays in any case: the run may have to go back to it.
        """
        stay = set(sorted(values)[-self.keep :])
        if before is not None:
            stay |= set(sorted(step for step in values if step < before)[-1:])
        stay |= self._milestones(values)
        stay |= set(self._best(values))
        return sorted(values.keys() - stay)

    def is_among_best(self, value: float, values: Mapping[int, float | None]) -> bool:
        """Whether a checkpoint with this value would be one of the best."""
        newest = max(values, default=0) + 1
        return newest in self._best({**values, newest: value})

    def better(self, one: float, other: float) -> float:
        """The better of two values, the finite one if only one is."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return one if math.isfinite(one) else other
        return max(one, other) if self.mode == "max" else min(one, other)

    def _milestones(self, values: Mapping[int, float | None]) -> set[int]:
        if self.keep_every is None:
            return set()
        first: dict[int, int] = {}
        for step in sorted(values):
            first.setdefault(step // self.keep_every, step)
        first.pop(0, None)
        return set(first.values())

    def _best(self, values: Mapping[int, float | None]) -> list[int]:
        """Best first; of equal ones the older."""
        sign = -1 if self.mode == "max" else 1
        known = [
            (sign * value, step)
            for step, value in values.items()
            if value is not None and math.isfinite(value)
        ]
        return [step for _, step in sorted(known)[: self.keep_best]]
