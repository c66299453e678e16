"""`precision.deterministic` reaches torch before anything has run on a GPU, if asked for."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import pytest
import torch

import train
from routedvit.training.config.file import load_config
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.watch.console import Console


class BeforeTheRanksMeet(Exception):
    """Nothing is on a device yet."""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    def stop_here(**options: Any) -> None:
        raise BeforeTheRanksMeet

    monkeypatch.setattr(train, "record_collectives", lambda folder: None)
    monkeypatch.setattr(train.engines, "start", stop_here)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_key_acts_before_the_ranks_meet(wanted: bool) -> None:
    given = [f"precision.deterministic={str(wanted).lower()}"]
    config = load_config(train.RunConfig, "configs/quickstart.json", given)
    with pytest.raises(BeforeTheRanksMeet):
        train.run(config, Namespace(), Console(rank=0), StopSignals())
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
