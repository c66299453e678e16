"""Sections of what changes by step: contradictions are refused, defaults change nothing."""

import pytest
from pydantic import ValidationError

from routedvit.training.config.recipe import CapacityConfig, EmaConfig, ResolutionConfig


def test_by_default_nothing_is_scheduled():
    assert EmaConfig().decay is None
    assert CapacityConfig().schedule == "none"
    assert ResolutionConfig().stages == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schedule": "anneal"}, "start and end that differ"),
        ({"schedule": "sample"}, "start and end that differ"),
        ({"schedule": "anneal", "start": 4.0, "factors": [1.0]}, "'sample' only"),
        ({"schedule": "sample", "factors": [1.0, 0.0]}, "greater than 0"),
        ({"schedule": "sample", "factors": []}, "at least 1 item"),
        ({"schedule": "anneal", "start": 4.0, "levels": 1}, "greater than or equal to 2"),
    ],
)
def test_a_capacity_schedule_that_cannot_be_is_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        CapacityConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "anneal", "start": 4.0, "end": 1.0, "until": 0.5, "shape": "cosine"},
        {"schedule": "sample", "factors": [0.5, 1.0, 2.0]},
        {"schedule": "sample", "start": 0.5, "end": 2.0, "levels": 4},
    ],
)
def test_capacity_schedules_that_can_be(values):
    assert CapacityConfig(**values).model_dump(exclude_unset=True) == values
