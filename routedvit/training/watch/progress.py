"""What a person sees of a run: one line that says where it stands and when it ends.

On a terminal a bar, in a log file one plain line per log interval, on ranks other than 0 nothing.
The time left comes from the run's own recent pace: the seconds between two updates, smoothed,
without the intervals in which something else was reported (an evaluation, a checkpoint), whose
pauses would make every estimate after them too long.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from tqdm import tqdm

from routedvit.training.interfaces import Progress

BAR_FORMAT = "{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {desc}"


class Pace:
    """Seconds per step, as an exponential average over the intervals between updates.

    A first interval of one step (workers, compilation) says nothing about the rest and is left out;
    the first of several and those with a pause are used only until there is a better one.

    Args:
        weight: of the newest interval; with 0.1 an estimate forgets a change of speed in some 20
            updates.
    """

    def __init__(self, clock: Callable[[], float], weight: float = 0.1) -> None:
        self._clock = clock
        self._weight = weight
        self._seconds_per_step: float | None = None
        self._provisional = True
        self._paused = True
        self._first = True
        self._last = (0, clock())

    def start(self, step: int) -> None:
        """The first interval begins at `step` now."""
        self._last = (step, self._clock())

    def pause(self) -> None:
        """The running interval holds something other than steps."""
        self._paused = True

    def update(self, step: int) -> None:
        """The running interval ends at `step` and the next one begins."""
        now = self._clock()
        steps = step - self._last[0]
        seconds = (now - self._last[1]) / max(1, steps)
        if self._first and steps == 1:
            pass
        elif self._seconds_per_step is None or self._provisional:
            self._seconds_per_step = seconds
            self._provisional = self._paused
        elif not self._paused:
            self._seconds_per_step += self._weight * (seconds - self._seconds_per_step)
        self._last = (step, now)
        self._paused = self._first = False

    def seconds_for(self, steps: int) -> float | None:
        """Seconds that `steps` will take, or None before the first whole interval."""
        return None if self._seconds_per_step is None else steps * self._seconds_per_step


class BarProgress:
    """A tqdm bar on a terminal; messages scroll by above it."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._pace = Pace(clock)
        self._bar: tqdm | None = None

    def start(self, step: int, total: int) -> None:
        self._bar = tqdm(
            total=total, initial=step, file=self._stream, bar_format=BAR_FORMAT, dynamic_ncols=True
        )
        self._pace.start(step)

    def update(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        assert self._bar is not None, "start() comes first"
        self._pace.update(step)
        left = self._pace.seconds_for(self._bar.total - step)
        self._bar.set_description_str(describe(loss, lr, images_per_second, left), refresh=False)
        self._bar.n = step
        self._bar.refresh()

    def message(self, text: str) -> None:
        self._pace.pause()
        tqdm.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class LineProgress:
    """One plain line per update, for log files and pipes."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._pace = Pace(clock)
        self._total = 0

    def start(self, step: int, total: int) -> None:
        self._total = total
        self._pace.start(step)

    def update(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        self._pace.update(step)
        left = self._pace.seconds_for(self._total - step)
        width = len(str(self._total))
        self._print(
            f"step {step:{width}d}/{self._total}  {describe(loss, lr, images_per_second, left)}"
        )

    def message(self, text: str) -> None:
        self._pace.pause()
        self._print(text)

    def close(self) -> None:
        self._stream.flush()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class NullProgress:
    """For ranks other than 0: the same calls, nothing shown."""

    def start(self, step: int, total: int) -> None: ...

    def update(self, step: int, loss: float, lr: float, images_per_second: float) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def build_progress(rank: int, stream: TextIO | None = None) -> Progress:
    """The progress of this rank; `stream` is the real console (`Console.stream`)."""
    stream = sys.stdout if stream is None else stream
    if rank != 0:
        return NullProgress()
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


def describe(loss: float, lr: float, images_per_second: float, seconds_left: float | None) -> str:
    """'loss 1.2345  lr 1.00e-03  512 images/s  left 0:03:20'."""
    left = "?" if seconds_left is None else duration(seconds_left)
    return f"loss {loss:.4f}  lr {lr:.2e}  {images_per_second:.0f} images/s  left {left}"


def duration(seconds: float) -> str:
    """'0:03:20', or '2 d 3:04:05' from a day on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h}:{m:02d}:{s:02d}" if days else f"{h}:{m:02d}:{s:02d}"


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """'step 1200: val/top1 95.30  val/top5 99.80  val/loss 0.1432', in the order given.

    Of a family such as val/capacity_0.5/... only the top-1 is shown.
    """
    values = (
        f"{name} {value:.2f}" if abs(value) >= 10 else f"{name} {value:.4f}"
        for name, value in metrics.items()
        if name.count("/") < 2 or name.endswith("/top1")
    )
    return f"step {step}: {'  '.join(values)}"


def summary(title: str, rows: Sequence[tuple[str, str]], next_command: str) -> str:
    """The block that ends a run: a title, aligned rows and what to type next.

    The rows are the caller's: best top-1 and its step, throughput, and where checkpoint, exported
    weights and logs are.
    """
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(["", title, *lines, f"  {'next':<{width}}  {next_command}"])
