"""What a run has cost over all its starts, kept in its checkpoints: steps, time and device-hours.

A start that is killed loses the time since its last checkpoint, as it loses the steps. What a run
that began from another's checkpoint, or before this was kept, had cost until then does not count.
"""

import time
from collections.abc import Mapping


class Spent:
    """Counts from now on what this start adds.

    Args:
        earlier: `spent` of the run state that it goes on from.
        ranks: one device each.
    """

    def __init__(self, earlier: Mapping[str, float], ranks: int) -> None:
        self._earlier = dict(earlier)
        self._ranks = ranks
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Of this start, everything included."""
        return time.perf_counter() - self._began

    def total(self, steps: int) -> dict[str, float]:
        """Over all starts; `steps` are those of this one, with those that a return repeats."""
        seconds = self.seconds()
        added = {
            "starts": 1, "steps": steps, "seconds": seconds,
            "device_seconds": seconds * self._ranks,
        }  # fmt: skip
        return {name: self._earlier.get(name, 0) + value for name, value in added.items()}
