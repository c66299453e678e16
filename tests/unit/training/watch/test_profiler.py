"""The profiler's window: the steps that were asked for, once, and never at the cost of the run."""

import json
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("again", [[2, 3, 4, 5], [3, 4, 5]])
def test_a_run_that_goes_back_into_the_window_keeps_the_first_profile(again, tmp_path) -> None:
    told: list[str] = []
    window = ProfilerWindow(3, 4, tmp_path, told.append)
    for step in (1, 2, 3, 4, 5):
        window.advance(step)
    before = (tmp_path / "steps_3_to_4.json").read_bytes()
    for step in again:
        window.advance(step)
    window.close()
    assert (tmp_path / "steps_3_to_4.json").read_bytes() == before
    assert len(told) == 1


def test_a_run_that_goes_back_out_of_the_window_ends_it(tmp_path: Path) -> None:
    window = ProfilerWindow(3, 9, tmp_path, [].append)
    for step in (2, 3, 4, 1, 2, 3, 4):
        window.advance(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4).sum()
    window.close()
    assert traced(tmp_path) == {"step 3", "step 4"}


def test_a_folder_that_takes_no_profile_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file in its place")
    told: list[str] = []
    run(ProfilerWindow(2, 2, tmp_path / "profile", told.append), steps=5)
    assert len(told) == 1
    assert "no profile in" in told[0]


def test_a_trace_that_torch_could_not_write_is_not_told_as_there(tmp_path, monkeypatch) -> None:
    """It says so on stderr only, as on a full disk; the trace of an earlier start is none of it."""
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: None)
    (tmp_path / "steps_2_to_2.json").write_text("of an earlier start")
    told: list[str] = []
    run(ProfilerWindow(2, 2, tmp_path, told.append), steps=5)
    assert len(told) == 1
    assert "no profile in" in told[0]
