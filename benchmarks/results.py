"""One line per measurement in `benchmarks/results.csv`, with what is needed to believe it.

The environment variable BENCHMARK_RESULTS names another file, for a trial that is not to be kept.
"""

import csv
import datetime
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

FILE = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).with_name("results.csv"))
COLUMNS = (
    "date", "benchmark", "case", "median", "min", "max", "rounds", "unit",
    "baseline", "ratio", "hardware", "python", "torch",
)  # fmt: skip


def append_result(
    benchmark: str,
    case: str,
    values: Sequence[float],
    *,
    unit: str,
    baseline: str,
    ratio: float,
) -> None:
    """Append median, minimum and maximum of `values`.

    `ratio` is this case's median over that of `baseline`, measured in the same run, interleaved.
    """
    new = not FILE.exists()
    with FILE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        numbers = [statistics.median(values), min(values), max(values)]
        writer.writerow(
            [
                datetime.date.today().isoformat(), benchmark, case,
                *(f"{number:.4g}" for number in numbers), len(values), unit,
                baseline, f"{ratio:.3f}", hardware(), platform.python_version(),
                torch.__version__,
            ]
        )  # fmt: skip


def report_measured(
    benchmark: str,
    measured: Mapping[str, Sequence[float]],
    *,
    unit: str,
    baseline: str,
    prefix: str = "",
) -> None:
    """Print and append a row per case of one run; `prefix` begins the name of each."""
    middle = statistics.median(measured[baseline])
    for name, values in measured.items():
        median = statistics.median(values)
        print(
            f"{prefix}{name:28s} {median:8.4g} {unit}  ({min(values):.4g} to {max(values):.4g})"
            f"  {median / middle:6.3f} x {baseline}"
        )
        append_result(
            benchmark, f"{prefix}{name}", values, unit=unit, baseline=baseline,
            ratio=median / middle,
        )  # fmt: skip


def hardware() -> str:
    """The GPU, or the CPU's model, its vector instructions and the cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {vectors}, {len(os.sched_getaffinity(0))} cores"
