"""Which operators the time of a step goes to: the table to read when a benchmark disappoints."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["write_profiles"]

ROWS = 40


def write_profiles(folder: Path, case: str, steps: Mapping[str, Callable[[], object]]) -> None:
    """One text file per step, `folder`/CASE_NAME.txt: its operators, the most expensive first.

    On a GPU sorted by the device's own time, kernels included; else by the processor's. The steps
    must be warm, since each is profiled once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, order = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
    for name, step in steps.items():
        with profile(activities=activities) as recorded:
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        table = recorded.key_averages().table(
            sort_by=order, row_limit=ROWS, max_name_column_width=90
        )
        file = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{case} {name}").strip("_")
        (folder / f"{file}.txt").write_text(f"{case} {name}\n{table}\n", encoding="utf-8")
