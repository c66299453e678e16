"""Efficient stochastic depth: K of B images get B / K times the update; the rest cost nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from routedvit.layers import RoutedBlock
from routedvit.layers.stochastic_depth import add_to_kept_images, num_kept

GRID, TOKENS, DIM = (4, 6), 26, 16
OPTIONS = [
    {},
    {"init_values": 0.5},
    {"router": "all_heavy", "light_heads": 0, "light_mlp_ratio": 0},
    {"separate_norms": True, "route_raw": True, "null_token": True},
]


def block(drop_path: float = 0.5, **kwargs: Any) -> RoutedBlock:
    torch.manual_seed(0)
    kwargs |= {"drop_path": drop_path, "efficient_drop_path": True}
    return RoutedBlock(DIM, 4, light_window=3, num_prefix=2, **kwargs).train()


def images(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, TOKENS, DIM, generator=generator).requires_grad_()


def sublayers(made: RoutedBlock) -> dict[str, Callable[..., Tensor]]:
    return {"attn": lambda x: made.attn(x, GRID), "mlp": made.mlp}


def gradients(out: Tensor, x: Tensor, made: RoutedBlock) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    wanted = [x, *made.parameters()]
    found = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if f is None else f for w, f in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("kwargs", OPTIONS)
@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_values_and_gradients_are_those_of_a_mask_over_all_images(name, kwargs):
    made = block(**kwargs)
    x = images(5)
    found = sublayers(made)[name](x)
    kept = (found != x).flatten(1).any(1)
    assert kept.sum() == num_kept(5, 0.5) == 2
    scale = (kept * 5 / 2).view(-1, 1, 1)
    change = sublayers(made.eval())[name](x) - x
    expected = x + scale * change
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradients(found, x, made), gradients(expected, x, made), rtol=1e-4, atol=1e-5
    )


def test_every_image_has_the_same_chance_and_sublayers_draw_for_themselves():
    made, x = block(), images(6).detach()
    counts, together = torch.zeros(6), 0
    for _ in range(300):
        kept = [(layer(x) != x).flatten(1).any(1) for layer in sublayers(made).values()]
        counts += kept[0]
        together += int(torch.equal(*kept))
    assert (counts - 150).abs().max() < 5 * (300 / 4) ** 0.5
    assert 0 < together < 60  # by chance 1 in 20


@pytest.mark.parametrize(("batch", "rate", "kept"), [(1, 0.9, 1), (8, 0.05, 8), (8, 0.3, 6)])
def test_rates_are_rounded_to_whole_images_and_one_is_always_kept(batch, rate, kept):
    made, x = block(rate), images(batch)
    assert num_kept(batch, rate) == kept
    assert (made.mlp(x) != x).flatten(1).any(1).sum() == kept


def test_dropped_images_are_not_computed():
    made, seen = block(), []
    for layer in (made.attn, made.mlp):
        layer.norm.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    made(images(8), GRID)
    made.eval()(images(8), GRID)
    assert seen == [4, 4, 8, 8]


def test_each_image_keeps_its_own_positions_and_windows():
    """As a masked autoencoder uses it: every image has other patches, so another rotary table."""
    attn, x = block().attn, images(4)
    rope = torch.randn(4, TOKENS, 2 * 4)
    same_window = (torch.rand(4, 1, 24, 24) < 0.5) | torch.eye(24, dtype=torch.bool)
    change = attn(x, GRID, rope, same_window) - x
    kept = change.flatten(1).any(1).nonzero().flatten().tolist()
    assert len(kept) == 2
    for i in kept:
        own = slice(i, i + 1)
        alone = attn.update(x[own], GRID, rope[own], same_window[own])
        torch.testing.assert_close(change[own], 2 * alone, rtol=1e-4, atol=1e-5)


def test_compiled_code_draws_the_same_images_and_gives_the_same_gradients():
    made = block()
    results = []
    for forward in (made, torch.compile(made, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        x = images(6)
        results.append([out := forward(x, GRID), *gradients(out, x, made)])
    torch.testing.assert_close(*results)


def test_the_update_may_have_a_narrower_type_than_the_residual():
    x = images(4)
    found = add_to_kept_images(x, 0.5, lambda part, kept: part.bfloat16())
    assert found.dtype == torch.float32
    assert ((found - 3 * x).abs() < 0.05).flatten(1).all(1).sum() == 2
    found.sum().backward()
    assert sorted(x.grad.mean((1, 2)).tolist()) == pytest.approx([1, 1, 3, 3])
