"""Capacities by step: exact at both ends, few levels, drawn from seed and step, at rest between."""

from collections import Counter
from fractions import Fraction

import pytest
import timm
import torch

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.config.run import CapacityConfig, ConfigError
from routedvit.training.recipe.capacity import CapacityDial, anneal, levels, sample, scheduled

FACTORS = [Fraction(1, 2), Fraction(1), Fraction(2)]


@pytest.fixture(scope="module")
def model():
    return timm.create_model(
        "colt5_vit_test", q_capacity=0.25, kv_capacity="1/2", ffn_capacity=[1 / 8, 0.25, 0.5] * 2
    ).eval()


def shares(model):
    return {n: Fraction(r.numerator, r.denominator) for n, r in model.routers().items()}


def test_levels_are_exact_small_ratios():
    assert levels(0.1, 0.5, 5) == [Fraction(n, 10) for n in (1, 2, 3, 4, 5)]
    assert levels(4, 1, 4) == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("recipe", "factors"),
    [
        ({}, [1]),
        ({"schedule": "sample", "factors": [0.1, 2]}, [Fraction(1, 10), 2]),
        ({"schedule": "anneal", "start": 2, "levels": 3}, [2, Fraction(3, 2), 1]),
    ],
)
def test_the_factors_are_those_of_the_recipe(recipe, factors):
    assert scheduled(CapacityConfig(**recipe)) == factors


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_annealing_goes_from_start_to_end_and_stays(shape):
    factor = anneal(levels(4, 1, 4), 100, shape)
    values = [factor(step) for step in range(150)]
    assert values[0] == 4
    assert values[100:] == [1] * 50
    assert values == sorted(values, reverse=True)
    assert set(values) == {4, 3, 2, 1}
    assert values[50] in (2, 3)


def test_cosine_lingers_at_both_ends():
    linear, cosine = (anneal(levels(0, 1, 101), 100, s) for s in ("linear", "cosine"))
    assert cosine(25) == Fraction(15, 100)  # (1 - cos(pi / 4)) / 2 = 0.146
    assert linear(25) == Fraction(25, 100)


def test_draws_follow_from_seed_and_step_and_reach_every_level_alike():
    factor = sample(FACTORS, seed=3)
    draws = [factor(step) for step in range(600)]
    assert draws == [sample(FACTORS, seed=3)(step) for step in range(600)]
    assert draws != [sample(FACTORS, seed=4)(step) for step in range(600)]
    assert all(160 < count < 240 for count in Counter(draws).values())
    assert len(Counter(draws)) == 3
    # these never change: a resumed run goes on as it began
    assert draws[:8] == [FACTORS[i] for i in (2, 1, 2, 1, 2, 2, 1, 0)]


def test_the_factor_acts_on_every_router_and_is_at_most_the_whole_image(model):
    nominal = shares(model)
    dial = CapacityDial(model, lambda step: [Fraction(1, 2), Fraction(4)][step])
    dial.turn(0)
    assert shares(model) == {name: share / 2 for name, share in nominal.items()}
    dial.turn(1)
    assert shares(model) == {name: min(1, 4 * share) for name, share in nominal.items()}
    assert dial.scalars() == {"train/capacity_factor": 4.0}
    dial.rest()
    assert shares(model) == nominal
    assert dial.setting() == "capacity x 4"  # of the latest step


def test_the_number_of_routed_patches_follows_and_the_exported_capacity_stays(model):
    image = torch.randn(1, 3, *model.patch_embed.img_size)
    patches = model.patch_embed.num_patches
    exported = dict(model._model_args)
    dial = CapacityDial(model, lambda step: Fraction(2))
    dial.turn(0)
    routing = model.routing(image)
    assert routing["blocks.0.q"].indices.shape[1] == -(-patches // 2)
    assert model._model_args == exported
    dial.rest()
    assert model.routing(image)["blocks.0.q"].indices.shape[1] == -(-patches // 4)


def test_a_model_without_routers_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"capacity\.schedule"):
        CapacityDial(torch.nn.Linear(1, 1), lambda step: Fraction(1))


@pytest.mark.slow
def test_compiled_blocks_are_compiled_once_per_factor_and_right():
    kwargs = {"img_size": 64, "depth": 2}
    compiled, plain = (timm.create_model("colt5_vit_test", **kwargs) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in compiled.blocks:
        block.compile(backend=backend)
    factors = levels(0.5, 2, 4)
    dials = [CapacityDial(m, lambda step: factors[step % 4]) for m in (compiled, plain)]
    image = torch.randn(2, 3, 64, 64)
    for step in range(8):
        for dial in dials:
            dial.turn(step)
        torch.testing.assert_close(compiled(image), plain(image))
        assert len(graphs) == min(step + 1, 4), "one graph per factor, shared by the blocks"
