"""How fast a run goes, and how much of the time it waits for data."""

from collections import deque

KEPT = 1000  # step times of a histogram


class Meter:
    """Images per second of the whole world, and the share of that time spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0  # since the last read
        self._all_steps, self._all_seconds, self._all_waited = 0, 0.0, 0.0
        self._step_seconds: deque[float] = deque(maxlen=KEPT)

    def add(self, seconds: float, waited: float) -> None:
        """One step took `seconds`, of which `waited` in the loader."""
        if self._all_steps:  # the first step starts workers and allocators
            self._all_seconds += seconds
            self._all_waited += waited
            self._step_seconds.append(seconds)
        self._all_steps += 1
        self._steps += 1
        self._seconds += seconds
        self._waited += waited

    @property
    def steps(self) -> int:
        """All that were added, also those that a return to a checkpoint repeats."""
        return self._all_steps

    def read(self) -> tuple[float, float]:
        """(images per second, share waited in [0, 1]) since the last call."""
        rate = self._steps * self._batch_size / self._seconds
        share = self._waited / self._seconds
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return rate, share

    def step_seconds(self) -> list[float]:
        """Seconds of each step since the last call, the newest thousand; without the first ever."""
        seconds = list(self._step_seconds)
        self._step_seconds.clear()
        return seconds

    def average(self) -> float:
        """Images per second over all steps but the first."""
        steps = self._all_steps - 1
        return steps * self._batch_size / self._all_seconds if steps > 0 else 0.0

    def average_wait(self) -> float:
        """Share of the time in steps that was spent waiting for data, without the first step."""
        return self._all_waited / self._all_seconds if self._all_seconds else 0.0
