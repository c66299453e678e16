"""A full GPU ends a run in one line that names the keys to change; other crashes stay the same."""

from pathlib import Path

import pytest
import torch

from routedvit.training.config.file import describe_keys
from routedvit.training.out_of_memory import out_of_memory
from routedvit.training.watch.console import CRASH_CODE, Console
from train import RunConfig

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"
)


def crash(error: Exception, log: Path | None, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a rank's console shows (here with what goes into the log before them)."""
    console = Console(0, explain=out_of_memory)
    if log is not None:
        console.log_to(log)
    with pytest.raises(SystemExit) as ended:
        console.__exit__(type(error), error, error.__traceback__)
    assert ended.value.code == CRASH_CODE
    return capsys.readouterr().err.splitlines()


def test_a_full_gpu_is_one_line_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    *_, told, where = crash(FULL, Path("logs/rank_0.log"), capsys)
    assert told.startswith("crashed: the GPU is full (no room for 2.50 GiB more): lower")
    keys = describe_keys(RunConfig)
    for key in ("train.micro_batch_size", "train.grad_checkpointing"):
        assert key in told
        assert f"  {key} = " in keys
    assert "deepspeed.zero_optimization.stage" in told
    assert "--dry-run --find-batch --world-size 1 " in told
    assert where == "the full traceback is at the end of logs/rank_0.log"


def test_before_there_is_a_log_it_follows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    lines = crash(FULL, None, capsys)
    assert any("Tried to allocate" in line for line in lines[:-1])
    assert lines[-1].startswith("crashed: the GPU is full")


def test_another_crash_keeps_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    other = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert out_of_memory(other) is None
    *_, told, _ = crash(other, Path("log"), capsys)
    assert told == f"crashed: RuntimeError: {other}"
