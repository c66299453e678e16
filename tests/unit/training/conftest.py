"""A world of one process, for tests that need an engine."""

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
