"""A world of one process, for tests that need an engine, and one writer, for those that fake it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """Joined for the length of a module; what DeepSpeed changes in this process is put back."""
    from routedvit.training import engine as engines  # half the tests here go without DeepSpeed

    linear, environment = nn.functional.linear, dict(os.environ)
    yield engines.start()
    engines.stop()
    nn.functional.linear = linear  # ZeRO-3 replaces it
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def one_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine writes the files of two ranks, so it must also seal those of the second."""
    monkeypatch.setattr("routedvit.training.checkpoints.commit.writer_of", lambda path: 0)
