"""An engine that holds one number, for tests of what is kept of it."""

from __future__ import annotations

import pytest

from tests.unit.training.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()
