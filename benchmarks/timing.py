"""Interleaved timing: every case once per round, so that a slow moment falls on all of them.

On a GPU each case is captured once in a CUDA graph of several calls and replayed between two
events: what is timed is the device, not Python. Neighbours on a virtual machine are watched too: a
run in which the hypervisor took more than a quarter of the time is void.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.results import append_result

__all__ = ["interleave", "report"]

CALLS = 20  # per CUDA graph: an event resolves about half a microsecond
SHORTEST = 5e-3  # seconds of calls in a row on a CPU: what one call finds in the caches is its own
STEAL = 0.25

Cases = Mapping[str, Callable[[], object]]


def interleave(cases: Cases, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per call of each case, one entry per round.

    Raises:
        SystemExit: the machine's processors were taken away for more than a quarter of the time.
    """
    timers = {
        name: _on_gpu(case) if device == "cuda" else _on_cpu(case) for name, case in cases.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    before = _jiffies()
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer())
    stolen, total = (after - b for after, b in zip(_jiffies(), before, strict=True))
    if stolen > STEAL * total:
        raise SystemExit(f"void: {stolen / total:.0%} of the processor time was stolen; run again")
    return seconds


def report(
    benchmark: str, shape: str, seconds: Mapping[str, list[float]], baseline: str
) -> dict[str, float]:
    """Print and append a row per case; returns the ratios of the medians to the baseline's."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians[baseline] for name, median in medians.items()}
    for name, times in seconds.items():
        least = min(times) / min(seconds[baseline])
        print(
            f"{benchmark} {shape:18s} {name:42s} {medians[name] * 1e6:10.1f} us"
            f"  ({min(times) * 1e6:.1f} to {max(times) * 1e6:.1f})"
            f"  {ratios[name]:6.3f} x {baseline}, {least:.3f} by minima"
        )
        append_result(
            benchmark, f"{shape} {name}", [t * 1e6 for t in times],
            unit="us", baseline=baseline, ratio=ratios[name],
        )  # fmt: skip
    return ratios


def _on_cpu(case: Callable[[], object]) -> Callable[[], float]:
    case()
    start = time.perf_counter()
    case()
    calls = max(1, round(SHORTEST / (time.perf_counter() - start)))

    def timer() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            case()
        return (time.perf_counter() - start) / calls

    return timer


def _on_gpu(case: Callable[[], object]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which made the inputs
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the caches of the operators
            case()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            case()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / CALLS

    timer()
    return timer


def _jiffies() -> tuple[int, int]:
    """Stolen and total processor time so far."""
    line = Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0]
    values = [int(value) for value in line.split()[1:]]
    return values[7], sum(values[:8])
