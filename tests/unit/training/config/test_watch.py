"""How often an evaluation runs: in epochs or in steps, never in both."""

from __future__ import annotations

from typing import Any

import pytest

from routedvit.training.config.watch import (
    CapacitiesConfig,
    EvalConfig,
    KnnConfig,
    LinearProbeConfig,
    ThroughputConfig,
)

HOOKS = [KnnConfig, LinearProbeConfig, CapacitiesConfig, ThroughputConfig]


def in_steps(section: Any, **keys: Any) -> int:
    return section.model_validate(keys).in_steps(lambda epochs: round(100 * epochs))


@pytest.mark.parametrize("section", [EvalConfig, *HOOKS])
def test_a_cadence_is_in_epochs_or_in_steps(section: Any) -> None:
    assert in_steps(section, every_epochs=0.5) == 50
    assert in_steps(section, every_steps=7) == 7
    assert in_steps(section, every_steps=7, every_epochs=None) == 7
    assert in_steps(section, every_epochs=0) == in_steps(section, every_steps=0) == 0


def test_without_one_the_held_out_set_is_evaluated_each_epoch_and_the_rest_at_the_end() -> None:
    assert in_steps(EvalConfig) == 100
    assert [in_steps(hook) for hook in HOOKS] == [0] * 4


@pytest.mark.parametrize("section", [EvalConfig, *HOOKS])
def test_both_are_refused_in_words(section: Any) -> None:
    with pytest.raises(ValueError, match="every_epochs = 5 and every_steps = 7 both say how often"):
        section.model_validate({"every_epochs": 5, "every_steps": 7})


@pytest.mark.parametrize("keys", [{"every_steps": 7}, {"every_epochs": 2.0}, {}])
def test_a_resolved_config_can_be_read_again(keys: dict[str, Any]) -> None:
    resolved = EvalConfig.model_validate(keys | {"knn": keys}).model_dump(mode="json")
    assert EvalConfig.model_validate(resolved).model_dump(mode="json") == resolved
