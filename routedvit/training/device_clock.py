"""How long a device is busy with something, without making it wait."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

KEPT = 1000  # newest blocks between two reads


class DeviceClock:
    """Mean seconds that `device` spent in the `timed` blocks since the last read.

    On a GPU events are recorded and nothing waits; `read` does, for the last block.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._blocks: deque[Any] = deque(maxlen=KEPT)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A block to be timed."""
        begin = self._now()
        yield
        self._blocks.append((begin, self._now()))

    def read(self) -> float:
        """Seconds of a block; 0 if there was none."""
        blocks = list(self._blocks)
        self._blocks.clear()
        if not blocks:
            return 0.0
        if not self._on_gpu:
            return statistics.mean(end - begin for begin, end in blocks)
        blocks[-1][1].synchronize()
        return statistics.mean(begin.elapsed_time(end) for begin, end in blocks) / 1e3

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
