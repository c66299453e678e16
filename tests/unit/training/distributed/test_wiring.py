"""train.py hands the ways to end a rank to what ends it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch.distributed as dist

import train
from routedvit.training.distributed.parting import leave
from routedvit.training.engine import processes


class Built(Exception):
    """The console would be entered now."""


def test_an_error_of_a_run_leaves_as_its_backend_must(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def console(rank: int, **options: Any) -> None:
        given.update(options, rank=rank)
        raise Built

    monkeypatch.setattr(train, "Console", console)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "x.json"])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "5")
    with pytest.raises(Built):
        train.main()
    assert given["leave"] is leave
    assert given["rank"] == 5  # also where nothing has translated the launcher's variables yet


@pytest.mark.parametrize(("backend", "seconds"), [("gloo", None), ("nccl", 570.0)])
def test_waits_are_bounded_where_nothing_else_tells_of_them(
    monkeypatch: pytest.MonkeyPatch, backend: str, seconds: float | None
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert processes.seconds_to_wait() == seconds  # DEEPSPEED_TIMEOUT is 10 minutes
