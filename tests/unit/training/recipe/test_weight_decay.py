"""Weight decay by step: DINO's cosine, exempt groups stay so, the same after a load, under ZeRO."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from routedvit.training.config.differences import differences
from routedvit.training.config.native import resolve_native_config
from routedvit.training.config.recipe import OptimConfig
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.recipe.weight_decay import WeightDecayDial

STEPS = 8


def grouped(model: nn.Linear) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": [model.weight], "weight_decay": 0.04},
            {"params": [model.bias], "weight_decay": 0.0},
        ]
    )


def decays(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


def test_it_goes_from_the_start_to_the_end_by_a_cosine_and_spares_the_exempt() -> None:
    optimizer = grouped(nn.Linear(3, 2))
    dial = WeightDecayDial(optimizer, 0.4, STEPS)
    for step in range(STEPS + 1):
        dial.turn(step)
        expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / STEPS))
        assert decays(optimizer) == pytest.approx([expected, 0.0])
    assert decays(optimizer) == pytest.approx([0.4, 0.0])


def test_a_load_brings_groups_of_another_step_and_changes_nothing() -> None:
    optimizer = grouped(nn.Linear(3, 2))
    dial = WeightDecayDial(optimizer, 0.4, STEPS)
    dial.turn(5)
    saved = copy.deepcopy(optimizer.state_dict())
    dial.turn(6)
    expected = decays(optimizer)
    resumed = grouped(nn.Linear(3, 2))
    again = WeightDecayDial(resumed, 0.4, STEPS)
    resumed.load_state_dict(saved)
    again.turn(6)
    assert decays(resumed) == expected


class Squares(nn.Module):
    """The loss of an objective over a linear map."""

    best_metric = "val/loss"

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)

    def forward(
        self, image: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.model(image).square().mean(), {}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_optimiser_that_zero_steps_has_it(stage: int, world: World) -> None:
    objective = Squares()
    native = resolve_native_config(
        {"zero_optimization": {"stage": stage}},
        batch_size=2, micro_batch_size=2, world_size=1, grad_clip=1.0, dtype="fp32",
        num_parameters=20,
    )  # fmt: skip
    engine = Engine(world, objective, grouped(objective.model), native)
    dial = WeightDecayDial(engine.optimizer, 0.4, STEPS)
    seen: set[float] = set()  # ZeRO may step group by group
    engine.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.update(round(decay, 9) for decay in decays(optimizer))
    )
    batch = {
        "image": torch.ones(2, 4),
        "target": torch.zeros(2, dtype=torch.int64),
        "position": torch.arange(2),
    }
    for step, decay in ((0, 0.04), (STEPS, 0.4)):
        seen.clear()
        dial.turn(step)
        engine.train_step([batch])
        assert seen == {decay, 0.0}


def test_an_end_without_a_beginning_is_refused() -> None:
    with pytest.raises(ValidationError, match="weight_decay_end needs a weight_decay above 0"):
        OptimConfig(lr=1e-3, weight_decay=0.0, weight_decay_end=0.4)


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({}, 1e-3),
        ({"lr_batch_size": 256}, 4e-3),
        ({"lr_batch_size": 4096}, 2.5e-4),
        ({"lr_batch_size": 256, "lr_scaling": "sqrt"}, 2e-3),
    ],
)
def test_the_rate_follows_the_batch_that_it_is_meant_for(values: dict, rate: float) -> None:
    arguments = OptimConfig(lr=1e-3, **values).arguments(batch_size=1024)
    assert arguments["lr"] == pytest.approx(rate)
    assert arguments.keys().isdisjoint({"lr_batch_size", "lr_scaling", "weight_decay_end"})


def test_a_run_that_began_before_these_keys_goes_on() -> None:
    """A key that its config does not have counts as null."""
    now = OptimConfig(lr=1e-3).model_dump(mode="json")
    later = ("lr_batch_size", "lr_scaling", "weight_decay_end")
    before = {key: value for key, value in now.items() if key not in later}
    assert list(differences(before, now)) == []
