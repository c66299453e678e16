"""What a process says when it joins the others."""

import contextlib

import pytest
import torch

from routedvit.training.distributed.world import World
from routedvit.training.engine import processes


@pytest.mark.parametrize(("rank", "given", "lines"), [(0, False, 1), (1, False, 0), (0, True, 0)])
def test_a_gpu_that_is_missed_is_told_once(rank, given, lines, monkeypatch):
    world = World(rank, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(processes, "ACCELERATOR_GIVEN", given)
    monkeypatch.setattr(processes, "join_environment", lambda: world)
    monkeypatch.setattr(processes, "connecting", lambda *_: contextlib.nullcontext())
    for name in ("prepare_deepspeed", "keep_freed_memory"):
        monkeypatch.setattr(processes, name, lambda: None)
    monkeypatch.setattr(processes.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(processes.atexit, "register", lambda _: None)
    told: list[str] = []
    assert processes.start(tf32=torch.backends.cudnn.allow_tf32, tell=told.append) is world
    assert ["finds no GPU" in line for line in told] == [True] * lines
