"""The line a person watches: numbers in place, and a time left that evaluations do not spoil."""

import io

import pytest

from routedvit.training.watch.progress import (
    BarProgress,
    LineProgress,
    NullProgress,
    build_progress,
    duration,
    evaluation_line,
    summary,
)


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_per_update() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start(0, 1000)
    clock.now = 10.0
    progress.update(100, 1.23456, 1e-3, 512.4)
    assert stream.getvalue() == (
        "step  100/1000  loss 1.2346  lr 1.00e-03  512 images/s  left 0:01:30\n"
    )


def test_time_left_forgets_the_warm_up_and_ignores_evaluations() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start(0, 100)
    clock.now = 50.0  # a slow start: compilation, first reads
    progress.update(10, 1.0, 1e-3, 1.0)
    clock.now = 60.0
    progress.update(20, 1.0, 1e-3, 1.0)
    progress.message("step 20  val/top1 50.00")
    clock.now = 600.0  # the evaluation took nine minutes
    progress.update(30, 1.0, 1e-3, 1.0)
    clock.now = 610.0
    progress.update(40, 1.0, 1e-3, 1.0)
    left = [line.split()[-1] for line in stream.getvalue().splitlines() if "left" in line]
    assert left == ["0:07:30", "0:01:20", "0:01:10", "0:01:00"]


def test_a_run_that_evaluates_at_every_update_still_has_a_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start(0, 30)
    for step in (10, 20):
        clock.now += 10.0
        progress.update(step, 1.0, 1e-3, 1.0)
        progress.message("evaluated")
    assert stream.getvalue().splitlines()[-2].endswith("left 0:00:10")


def test_a_run_that_logs_every_step_has_a_time_left_from_the_second_on() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start(0, 10)
    for step, now in ((1, 50.0), (2, 52.0), (3, 54.0)):
        clock.now = now
        progress.update(step, 1.0, 1e-3, 1.0)
    left = [line.split()[-1] for line in stream.getvalue().splitlines()]
    assert left == ["?", "0:00:16", "0:00:14"]


def test_a_resumed_run_counts_only_its_own_steps() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start(900, 1000)
    clock.now = 10.0
    progress.update(950, 1.0, 1e-3, 1.0)
    assert stream.getvalue().endswith("left 0:00:10\n")


def test_the_bar_shows_the_same_numbers_and_messages_do_not_tear_it() -> None:
    clock, stream = Clock(), Terminal()
    progress = BarProgress(stream, clock)
    progress.start(0, 200)
    clock.now = 10.0
    progress.update(100, 0.5, 1e-3, 512.0)
    progress.message("step 100  val/top1 95.00")
    progress.close()
    shown = stream.getvalue()
    assert "100/200  50%" in shown
    assert "loss 0.5000  lr 1.00e-03  512 images/s  left 0:00:10" in shown
    assert "\rstep 100  val/top1 95.00\n" in shown


@pytest.mark.parametrize(
    ("rank", "stream", "kind"),
    [(0, Terminal(), BarProgress), (0, io.StringIO(), LineProgress), (1, Terminal(), NullProgress)],
)
def test_a_terminal_gets_a_bar_a_file_gets_lines_other_ranks_nothing(
    rank: int, stream: io.StringIO, kind: type
) -> None:
    assert type(build_progress(rank, stream)) is kind


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (3661, "1:01:01"), (2 * 86400 + 59, "2 d 0:00:59")]
)
def test_durations_read_as_clock_time(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_summary_is_aligned_and_ends_with_the_next_command() -> None:
    text = summary(
        "done", [("best top-1", "95 %"), ("weights", "w.safetensors")], "make tensorboard"
    )
    assert text.splitlines()[1:] == [
        "done",
        "  best top-1  95 %",
        "  weights     w.safetensors",
        "  next        make tensorboard",
    ]


def test_the_first_step_alone_promises_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start(0, 1000)
    clock.now = 30.0
    progress.update(1, 1.0, 1e-3, 1.0)
    assert stream.getvalue().endswith("left ?\n")
    clock.now = 40.0
    progress.update(101, 1.0, 1e-3, 1.0)
    assert stream.getvalue().endswith("left 0:01:30\n")


def test_an_evaluation_is_one_line() -> None:
    line = evaluation_line(1200, {"val/top1": 95.3, "val/loss": 0.14321})
    assert line == "step 1200: val/top1 95.30  val/loss 0.1432"


def test_of_a_family_only_the_top1_is_told():
    line = evaluation_line(5, {"val/capacity_0.5/top1": 95.3, "val/capacity_0.5/loss": 0.1})
    assert line == "step 5: val/capacity_0.5/top1 95.30"
