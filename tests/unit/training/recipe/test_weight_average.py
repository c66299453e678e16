"""The average of the weights: timm's numbers, no place in a first step, refused where it is wrong.

Under ZeRO it is tested by tests/integration/test_recipes.py.
"""

import copy

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import nn

from routedvit.training.recipe.weight_average import (
    KEY,
    WeightAverage,
    drop_unless_kept,
    exchange,
)


def train(model, optimizer, average, steps, reference=None):
    for step in steps:
        model(torch.full((1, 4), float(step + 1))).square().sum().backward()
        average.turn(step)
        optimizer.step()
        optimizer.zero_grad()
        if reference is not None:
            reference.update(model, step=step + 1)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adopt", "madgrad", "nadamw"])
@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_timms_whatever_the_optimiser(name, warmup):
    warm_up = {"warmup_gamma": 2.0, "warmup_power": 0.75}
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    optimizer = timm.optim.create_optimizer_v2(model.parameters(), name, lr=0.01)
    average = WeightAverage(optimizer, decay=0.8, warmup=warmup, **warm_up)
    reference = ModelEmaV3(model, decay=0.8, use_warmup=warmup, **warm_up)
    train(model, optimizer, average, range(8), reference)
    for parameter, expected in zip(model.parameters(), reference.module.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[parameter][KEY], expected, rtol=0, atol=1e-7)
        assert not torch.equal(expected, parameter)

    # The hook must not disturb the optimiser's own state.
    plain = timm.optim.create_optimizer_v2(twin.parameters(), name, lr=0.01)
    unused = WeightAverage(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), decay=0.8)
    train(twin, plain, unused, range(8))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_without_gradients_leaves_it():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = WeightAverage(optimizer, decay=0.5)
    optimizer.step()
    assert not optimizer.state
    train(model, optimizer, average, range(3))
    before = optimizer.state[model.weight][KEY].clone()
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight][KEY], before)


def test_it_is_saved_with_the_optimiser():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = WeightAverage(optimizer, decay=0.5)
    train(model, optimizer, average, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, average, range(3, 6))

    other = nn.Linear(4, 3)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.1)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, WeightAverage(resumed, decay=0.5), range(3, 6))
    assert torch.equal(resumed.state[other.weight][KEY], optimizer.state[model.weight][KEY])


def test_averages_that_nobody_updates_are_dropped():
    """As they come with a checkpoint of a run that kept them into one that does not."""
    model = nn.Linear(4, 3)
    optimizer = timm.optim.create_optimizer_v2(model.parameters(), "adamw", lr=0.01)
    train(model, optimizer, WeightAverage(optimizer, decay=0.8), range(2))
    drop_unless_kept(optimizer)
    assert all(KEY in state for state in optimizer.state.values())
    other = timm.optim.create_optimizer_v2(model.parameters(), "adamw", lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    drop_unless_kept(other)
    assert all({*state} == {"step", "exp_avg", "exp_avg_sq"} for state in other.state.values())


def test_exchanging_twice_changes_no_bit():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, WeightAverage(optimizer, decay=0.5), range(3))
    weight, average = model.weight.detach().clone(), optimizer.state[model.weight][KEY].clone()
    exchange(optimizer)
    assert torch.equal(model.weight, average)
    assert torch.equal(optimizer.state[model.weight][KEY], weight)
    exchange(optimizer)
    assert torch.equal(model.weight, weight)
