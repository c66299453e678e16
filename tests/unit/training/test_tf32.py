"""`precision.tf32` reaches torch's matrix products and convolutions, whatever they were set to."""

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

SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn)


class Connected(Exception):
    """The run has met the other ranks; nothing is built yet."""


@pytest.fixture
def until_connected(monkeypatch: pytest.MonkeyPatch) -> Any:
    environment = dict(os.environ)
    before = [switch.allow_tf32 for switch in SWITCHES]

    def stop_here(*arguments: Any, **options: Any) -> None:
        raise Connected

    monkeypatch.setattr(train, "record_collectives", lambda folder: None)
    monkeypatch.setattr(train, "resolve_train", stop_here)
    yield
    train.engines.stop()
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = value
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("until_connected")
@pytest.mark.parametrize("wanted", [True, False])
def test_the_switch_acts_both_ways(wanted: bool) -> None:
    for switch in SWITCHES:
        switch.allow_tf32 = not wanted
    config = load_config(
        train.RunConfig, "configs/quickstart.json", [f"precision.tf32={str(wanted).lower()}"]
    )
    with pytest.raises(Connected):
        train.run(config, Namespace(), Console(rank=0), StopSignals())
    assert [switch.allow_tf32 for switch in SWITCHES] == [wanted, wanted]
