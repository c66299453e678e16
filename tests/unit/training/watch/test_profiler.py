"""The profiler's window: the steps that were asked for, and nothing when they never come."""

import json
from pathlib import Path

import torch

from routedvit.training.watch.profiler import ProfilerWindow


def run(window: ProfilerWindow, steps: int) -> None:
    for step in range(1, steps + 1):
        window.advance(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4).sum()
    window.close()


def traced(folder: Path) -> set[str]:
    (trace,) = folder.glob("*.json")
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    return {name for name in names if name.startswith("step ")}


def test_the_window_is_traced_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    run(ProfilerWindow(2, 3, tmp_path / "profile", told.append), steps=6)
    assert traced(tmp_path / "profile") == {"step 2", "step 3"}
    assert "aten::sum" in (tmp_path / "profile" / "steps_2_to_3.txt").read_text()
    assert len(told) == 1
    assert "steps_2_to_3.json" in told[0]


def test_a_run_that_ends_inside_the_window_still_writes(tmp_path: Path) -> None:
    run(ProfilerWindow(2, 30, tmp_path, [].append), steps=3)
    assert traced(tmp_path) == {"step 2", "step 3"}


def test_a_window_beyond_the_run_leaves_nothing(tmp_path: Path) -> None:
    run(ProfilerWindow(20, 30, tmp_path, [].append), steps=3)
    assert not list(tmp_path.iterdir())
