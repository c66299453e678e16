"""Optimisers and schedules: groups as the model asks, steps as the recipe says."""

import math

import pytest
import timm
import torch
from torch import nn

from routedvit.training.config import ConfigError
from routedvit.training.optim import (
    add_parameters_beside_the_model,
    build_optimizer,
    build_schedule,
    is_elementwise,
    learning_rate,
)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_vit", num_classes=4)


def test_biases_norms_and_positions_do_not_decay(model):
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.1)
    assert type(optimizer) is torch.optim.AdamW
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            exempt = parameter.ndim <= 1 or names[id(parameter)] in model.no_weight_decay()
            assert group["weight_decay"] == (0.0 if exempt else 0.1)


def test_layer_decay_lowers_the_rate_towards_the_input(model):
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    schedule = build_schedule(
        optimizer, name="constant", total_steps=10, warmup_steps=0, warmup_lr=0, min_lr=0
    )
    schedule.step_update(3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.head.weight)] == 1.0
    first, second = model.blocks[0].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight
    assert rates[id(first)] == pytest.approx(0.5 * rates[id(second)])
    assert learning_rate(optimizer) == pytest.approx(1.0)


def test_cosine_with_warm_up():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = build_schedule(
        optimizer, name="cosine", total_steps=110, warmup_steps=10, warmup_lr=0.1, min_lr=0.01
    )

    def rate(step):
        schedule.step_update(step)
        return learning_rate(optimizer)

    assert rate(0) == pytest.approx(0.1)
    assert rate(5) == pytest.approx(0.55)
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.505)
    assert rate(109) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 0.99)) / 2)
    assert rate(10) == pytest.approx(1.0)  # from the step alone, so a resume needs no state


def test_a_warm_up_as_long_as_the_run_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="warmup_epochs"):
        build_schedule(
            optimizer, name="cosine", total_steps=10, warmup_steps=10, warmup_lr=0, min_lr=0
        )


@pytest.mark.parametrize("name", ["adamw", "lion", "nadamw", "sgd", "adopt"])
def test_elementwise_optimisers_are_the_same_on_flat_pieces(name):
    """The claim behind the list: cut into pieces and flattened, the updates are bit-identical."""
    torch.manual_seed(0)
    whole, gradients = torch.randn(6, 8), [torch.randn(6, 8) for _ in range(3)]
    parameter = nn.Parameter(whole.clone())
    pieces = [nn.Parameter(piece.clone()) for piece in whole.flatten().split(20)]
    optimizers = [
        timm.optim.create_optimizer_v2(parameters, name, lr=0.1, weight_decay=0.1)
        for parameters in ([parameter], pieces)
    ]
    assert all(map(is_elementwise, optimizers))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        for piece, grad in zip(pieces, gradient.flatten().split(20), strict=True):
            piece.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([piece.detach() for piece in pieces]), parameter.flatten())


@pytest.mark.parametrize(
    "name", ["lamb", "lars", "adafactor", "muon", "cadamw", "novograd", "mars"]
)
def test_optimisers_that_need_whole_parameters_are_refused_under_zero_only(model, name):
    build_optimizer(model, name=name, lr=1e-3, weight_decay=0.1, zero_stage=0)
    with pytest.raises(ConfigError, match="ZeRO stage 1"):
        build_optimizer(model, name=name, lr=1e-3, weight_decay=0.1, zero_stage=1)


def test_an_unknown_name_gets_the_nearest_one(model):
    with pytest.raises(ConfigError, match="'adamw'"):
        build_optimizer(model, name="adamww", lr=1e-3, weight_decay=0.1)


def test_an_option_the_optimiser_does_not_take_is_named(model):
    with pytest.raises(ConfigError, match="betas"):
        build_optimizer(model, name="sgd", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.9))


class WithDecoder(nn.Module):
    """What an objective may be: a network, and parameters beside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.decoder = nn.Linear(3, 2)
        self.token = nn.Parameter(torch.zeros(1, 3))

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def test_parameters_beside_the_model_are_trained_once_and_scheduled(model):
    objective = WithDecoder(model)
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    add_parameters_beside_the_model(optimizer, objective, 0.1)
    schedule = build_schedule(
        optimizer, name="constant", total_steps=9, warmup_steps=4, warmup_lr=0.0, min_lr=0
    )
    schedule.step_update(2)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert groups.keys() == {id(p) for p in objective.parameters()}
    decays = {name: groups[id(p)]["weight_decay"] for name, p in objective.named_parameters()}
    assert decays["decoder.weight"] == 0.1
    assert decays["decoder.bias"] == decays["token"] == 0
    assert groups[id(objective.decoder.weight)]["lr"] == pytest.approx(0.5)


def test_an_objective_that_is_its_model_adds_nothing(model):
    objective = nn.ModuleDict({"model": model})
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.1)
    before = len(optimizer.param_groups)
    add_parameters_beside_the_model(optimizer, objective, 0.1)
    assert len(optimizer.param_groups) == before
