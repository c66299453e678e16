"""Counters of the optimiser go on though its groups are others; the rest is tested under ZeRO by
tests/integration/test_reshard.py.
"""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from routedvit.training.checkpoints.zero_layout import ZeroLayout
from routedvit.training.config.run import ConfigError


def set_steps(num_groups: int, steps: list[float | None]) -> list[Any]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(num_groups)]
    optimizer = torch.optim.SGD([{"params": [p], "step": 9.0} for p in parameters], lr=0.1)
    layout = cast(Any, SimpleNamespace(optimizer=optimizer, zero=None))
    ZeroLayout.set_counters(layout, {"group_steps": steps, "loss_scale": {}})
    return [group.get("step") for group in optimizer.param_groups]


def test_groups_get_the_steps_that_they_had() -> None:
    assert set_steps(2, [3.0, 4.0]) == [3.0, 4.0]
    assert set_steps(2, [None, 4.0]) == [None, 4.0]


def test_more_or_fewer_groups_go_on_where_all_had_counted_alike() -> None:
    assert set_steps(3, [None, None]) == [None] * 3
    assert set_steps(1, [7.0, 7.0]) == [7.0]
    with pytest.raises(ConfigError, match="2 groups that counted their steps differently"):
        set_steps(3, [3.0, 4.0])
