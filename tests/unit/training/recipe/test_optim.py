"""Optimisers and schedules: groups as the model asks, steps as the recipe says."""

import math

import pytest
import timm
import timm.optim
import torch
from torch import nn

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.config.run import ConfigError
from routedvit.training.recipe.optim import (
    REFUSED_FROM,
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


def rates(steps, **recipe):
    """The schedule's values at `steps`, of a run of 110 steps with 10 of warm-up from 0.1 to 1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    recipe = {"total_steps": 110, "warmup_steps": 10, "warmup_lr": 0.1, "min_lr": 0.01} | recipe
    schedule = build_schedule(optimizer, **recipe)
    values = []
    for step in steps:
        schedule.step_update(step)
        values.append(learning_rate(optimizer))
    return values


def test_every_shape_has_the_same_warm_up():
    for name in ("cosine", "linear", "wsd", "rsqrt", "constant"):
        assert rates([0, 5, 10], name=name) == pytest.approx([0.1, 0.55, 1.0]), name


def test_linear_is_the_straight_line():
    expected = [0.01 + 0.99 * (1 - (step - 10) / 100) for step in (10, 35, 60, 109)]
    assert rates([10, 35, 60, 109], name="linear") == pytest.approx(expected)


def test_constant_stays():
    assert rates([10, 60, 109], name="constant") == [1.0, 1.0, 1.0]


SHAPES_OF_DECAY = {  # of the share d of the decay that is over, 2405.18392
    None: lambda d: 1 - math.sqrt(d),
    "1-sqrt": lambda d: 1 - math.sqrt(d),
    "linear": lambda d: 1 - d,
    "cosine": lambda d: (1 + math.cos(math.pi * d)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES_OF_DECAY)
def test_wsd_is_constant_and_then_decays(shape):
    """Of 100 steps after the warm-up the last 30 decay."""
    steps = [11, 50, 80, 81, 95, 109]
    short = rates([2, 3], name="wsd", decay=0.1, total_steps=3, warmup_steps=0, decay_shape=shape)
    assert short == pytest.approx([1.0, 0.01])  # a fall of less than a step is one of a step
    values = rates(steps, name="wsd", decay=0.3, decay_shape=shape)
    factors = [SHAPES_OF_DECAY[shape](max(0, step - 80) / 30) for step in steps]
    assert values == pytest.approx([0.01 + 0.99 * factor for factor in factors])


def test_rsqrt_is_that_of_big_vision():
    """lr / sqrt((step - warm-up + timescale) / timescale), times the linear cooldown."""
    steps = [10, 14, 30, 90, 100, 109]
    values = rates(steps, name="rsqrt", decay=0.2, timescale_steps=4, min_lr=0.0)
    expected = [((s - 10 + 4) / 4) ** -0.5 * min(1, (110 - s) / 20) for s in steps]
    assert values == pytest.approx(expected)


def test_rsqrt_takes_the_warm_up_as_its_timescale():
    assert rates([40], name="rsqrt", decay=0.2) == pytest.approx([0.5])
    with pytest.raises(ConfigError, match="timescale_epochs"):
        rates([40], name="rsqrt", warmup_steps=0)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "rsqrt", "constant"])
def test_every_shape_keeps_the_scale_of_the_layers(model, name):
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    schedule = build_schedule(
        optimizer, name=name, total_steps=10, warmup_steps=4, warmup_lr=0.1, min_lr=0.01
    )
    for step in (0, 3, 6, 9):
        schedule.step_update(step)
        top = learning_rate(optimizer)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(top * group["lr_scale"])
        assert len({group["lr"] for group in optimizer.param_groups}) > 3


def test_a_warm_up_as_long_as_the_run_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="warmup_epochs"):
        build_schedule(
            optimizer, name="cosine", total_steps=10, warmup_steps=10, warmup_lr=0, min_lr=0
        )


SHAPES, DECAYS, LENGTH = [(24, 20), (20,), (6, 3, 4, 4), (130, 7)], [0.1, 0.0, 0.1, 0.0], 97


def timm_names() -> list[str]:
    infos = map(timm.optim.get_optimizer_info, timm.optim.list_optimizers())
    return [i.name for i in infos if not i.second_order and not isinstance(i.opt_class, str)]


def trained(name: str, step) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """Weights after some steps: whole for `step` None, else in flat pieces that `step` steps."""
    generator = torch.Generator().manual_seed(0)
    pieces = [
        [nn.Parameter(piece.clone()) for piece in whole.flatten().split(LENGTH)]
        if step
        else [nn.Parameter(whole)]
        for whole in (torch.randn(shape, generator=generator) for shape in SHAPES)
    ]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(pieces, DECAYS, strict=True)]
    optimizer = timm.optim.create_optimizer_v2(groups, name, lr=0.01)
    for _ in range(12):  # AdamP projects now and then only
        for parts, shape in zip(pieces, SHAPES, strict=True):
            gradient = 3 * torch.randn(shape, generator=generator)
            split = gradient.flatten().split(LENGTH) if step else [gradient]
            for part, values in zip(parts, split, strict=True):
                part.grad = values.clone()
        step(optimizer) if step else optimizer.step()
    return [torch.cat([part.detach().flatten() for part in parts]) for parts in pieces], optimizer


def step_as_stage_1_and_2(optimizer: torch.optim.Optimizer) -> None:
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups


def step_as_stage_3(optimizer: torch.optim.Optimizer) -> None:
    """One piece after the other, the other groups empty."""
    held = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []
    for group, parts in zip(optimizer.param_groups, held, strict=True):
        for part in parts:
            group["params"] = [part]
            optimizer.step()
        group["params"] = []
    for group, parts in zip(optimizer.param_groups, held, strict=True):
        group["params"] = parts


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
@pytest.mark.parametrize("name", [name for name in timm_names() if "kron" not in name])
def test_what_is_allowed_under_zero_is_the_same_on_flat_pieces(name):
    """The claim behind the lists, for all of timm's: cut and stepped as ZeRO does, same numbers."""
    whole, optimizer = trained(name, None)
    for stage, step in ((1, step_as_stage_1_and_2), (3, step_as_stage_3)):
        cut, _ = trained(name, step)
        same = all(
            torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(whole, cut, strict=True)
        )
        refused, why = REFUSED_FROM.get(type(optimizer).__name__, (4, ""))
        allowed = is_elementwise(optimizer) and (stage < refused or "DeepSpeed" in why)
        assert same == allowed, f"{name}, stage {stage}"


@pytest.mark.parametrize(
    "name", ["lamb", "lars", "adafactor", "muon", "cadamw", "novograd", "mars", "adagrad"]
)
def test_optimisers_that_need_whole_parameters_are_refused_under_zero_only(model, name):
    build_optimizer(model, name=name, lr=1e-3, weight_decay=0.1, zero_stage=0)
    with pytest.raises(ConfigError, match="ZeRO stage 1"):
        build_optimizer(model, name=name, lr=1e-3, weight_decay=0.1, zero_stage=1)


def test_adan_counts_its_steps_per_group_so_it_is_refused_from_stage_3(model):
    build_optimizer(model, name="adan", lr=1e-3, weight_decay=0.1, zero_stage=2)
    with pytest.raises(ConfigError, match="steps once for each group"):
        build_optimizer(model, name="adan", lr=1e-3, weight_decay=0.1, zero_stage=3)


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("name", ["muon", "nmuon", "adamuon"])
def test_muon_takes_the_matrices_in_the_blocks_and_nothing_else(name, layer_decay):
    routed = timm.create_model(
        "colt5_vit_test", num_classes=10, null_kv=True, null_token=True, mlp_layer="swiglu"
    )
    optimizer = build_optimizer(
        routed, name=name, lr=1e-3, weight_decay=0.1, layer_decay=layer_decay
    )
    for parameter in routed.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    muon = {n for n, p in routed.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    expected = {
        name
        for name, p in routed.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2 and "router" not in name
    }
    assert muon == expected
    assert len(muon) >= 10 * len(routed.blocks)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(
    ("options", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, None)]
)
def test_torchs_own_optimisers_are_fused_unless_told_otherwise(model, name, options, fused):
    optimizer = build_optimizer(model, name=name, lr=1e-3, weight_decay=0, options=options)
    assert [group["fused"] for group in optimizer.param_groups] == [fused] * len(
        optimizer.param_groups
    )


def test_further_options_reach_the_optimiser(model):
    optimizer = build_optimizer(
        model, name="sgd", lr=0.1, weight_decay=0.0, options={"momentum": 0.95, "nesterov": False}
    )
    assert optimizer.defaults["momentum"] == 0.95
    assert not optimizer.defaults["nesterov"]
    with pytest.raises(ConfigError, match="momentun"):
        build_optimizer(model, name="sgd", lr=0.1, weight_decay=0.0, options={"momentun": 0.95})


def test_an_option_that_needs_whole_parameters_is_seen(model):
    with pytest.raises(ConfigError, match="ZeRO stage 2"):
        build_optimizer(
            model, name="lion", lr=0.1, weight_decay=0.0, options={"caution": True}, zero_stage=2
        )


def test_the_number_of_betas_is_checked(model):
    build_optimizer(model, name="adan", lr=0.1, weight_decay=0.0, betas=(0.9, 0.9, 0.9))
    for betas in [(0.9,), (0.9, 0.9, 0.9)]:
        with pytest.raises(ConfigError, match=r"optim\.betas.*takes 2"):
            build_optimizer(model, name="adamw", lr=0.1, weight_decay=0.0, betas=betas)


def test_an_unknown_name_gets_the_nearest_one(model):
    with pytest.raises(ConfigError, match="'adamw'"):
        build_optimizer(model, name="adamww", lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("option", [{"betas": (0.9, 0.9)}, {"eps": 1e-6}])
def test_an_option_the_optimiser_does_not_take_is_named(model, option):
    with pytest.raises(ConfigError, match=rf"optim\.{next(iter(option))}"):
        build_optimizer(model, name="sgd", lr=1e-3, weight_decay=0.1, **option)


def test_second_derivatives_are_refused(model):
    with pytest.raises(ConfigError, match="needs second derivatives"):
        build_optimizer(model, name="adahessian", lr=1e-3, weight_decay=0.1)


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
