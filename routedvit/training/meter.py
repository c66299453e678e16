"""How fast a run goes, and how much of the time it waits for data."""


class Meter:
    """Images per second of the whole world, and the share of that time spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0  # since the last read
        self._all_steps, self._all_seconds = 0, 0.0

    def add(self, seconds: float, waited: float) -> None:
        """One step took `seconds`, of which `waited` in the loader."""
        if self._all_steps:  # the first step starts workers and allocators
            self._all_seconds += seconds
        self._all_steps += 1
        self._steps += 1
        self._seconds += seconds
        self._waited += waited

    def read(self) -> tuple[float, float]:
        """(images per second, share waited in [0, 1]) since the last call."""
        rate = self._steps * self._batch_size / self._seconds
        share = self._waited / self._seconds
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return rate, share

    def average(self) -> float:
        """Images per second over all steps but the first."""
        steps = self._all_steps - 1
        return steps * self._batch_size / self._all_seconds if steps > 0 else 0.0
