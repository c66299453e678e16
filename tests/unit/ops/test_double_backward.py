"""Every operator of `routedvit.ops` can be differentiated twice, with kernels too."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops import (
    coordinate_descent,
    gather_all,
    gather_norm,
    gather_tokens,
    rms_norm,
    rms_norm_linear,
    route_all,
    router_logits,
    scatter_add_tokens,
    set_backend,
    soft_topk,
)
from tests.unit.ops.comparing import draw


def index_for(x: Tensor) -> Tensor:
    return torch.tensor([[0, 2, 5], [1, 2, 3]], device=x.device)


def two_routes_for(x: Tensor) -> Tensor:
    return torch.stack([index_for(x), index_for(x) + 1], 1)


def route_gates(logits: Tensor) -> Tensor:
    return torch.cat([gates for _, gates in route_all(logits, [2, 5])], -1)


def route_one(logits: Tensor) -> Tensor:
    return route_all(logits, [3])[0][1]


def gather_with_source(x: Tensor) -> Tensor:
    x, rows = gather_all(x, [index_for(x), two_routes_for(x)])
    return torch.cat([x.flatten(1), *(own.flatten(1) for own in rows)], 1).sin()


def gather_and_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gather_norm(x, two_routes_for(x), weight, bias)


def gather_and_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return gather_norm(x, index_for(x), weight, rms=True)


def scatter(base: Tensor, rows: Tensor, gate: Tensor) -> Tensor:
    return scatter_add_tokens(base, index_for(base), rows, gate, residual=base).sin()


def scatter_with_gates_of_one(base: Tensor, rows: Tensor) -> Tensor:
    ones = torch.ones(2, 3, device=base.device)
    return scatter_add_tokens(base, index_for(base), rows, ones).sin()


def gates_of_fractional_k(logits: Tensor) -> Tensor:
    return soft_topk(logits, 2.5, eps=0.7)


# function, shapes of its differentiable inputs
KERNELS: list[tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = [
    (route_one, [(2, 1, 9)]),
    (route_gates, [(2, 2, 9)]),
    (gates_of_fractional_k, [(3, 9)]),
    (lambda x: gather_tokens(x, index_for(x)).sin(), [(2, 7, 4)]),
    (gather_with_source, [(2, 7, 4)]),
    (gather_and_norm, [(2, 7, 4), (4,), (4,)]),
    (gather_and_rms_norm, [(2, 7, 4), (4,)]),
    (scatter, [(2, 7, 4), (2, 3, 4), (2, 3)]),
    (scatter_with_gates_of_one, [(2, 7, 4), (2, 3, 4)]),
    (lambda x, w: router_logits(x, w, 0.5, 2).sin(), [(2, 7, 4), (3, 4)]),
    (lambda x: coordinate_descent(x, torch.full_like(x[:, :1], 3)), [(2, 9)]),
]
REFERENCES: list[tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = [
    *KERNELS,
    (lambda x, w: rms_norm(x, w, 1e-6), [(2, 3, 4), (4,)]),
    (lambda *args: rms_norm_linear(*args, 1e-6), [(2, 3, 4), (4,), (5, 4), (5,)]),
    (lambda x, *args: rms_norm_linear(x.mT, *args, None, 1e-6), [(2, 4, 3), (4,), (5, 4)]),
]


@pytest.mark.parametrize(("function", "shapes"), REFERENCES)
def test_second_derivatives_are_those_of_finite_differences(function, shapes):
    leaves = [draw(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradgradcheck(function, leaves)


def second_gradients(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], device: str
) -> list[Tensor]:
    leaves = [draw(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(shapes)]
    out = function(*leaves)
    grad = torch.sin(torch.arange(out.numel(), device=device)).view_as(out)
    first = torch.autograd.grad(out, leaves, grad, create_graph=True)
    total = sum((g * g.detach().cos()).sum() for g in first)
    # linear in some inputs: nothing depends on them any more
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize(("function", "shapes"), KERNELS)
def test_kernels_leave_the_second_derivative_to_the_reference(function, shapes, device):
    found = second_gradients(function, shapes, device)
    set_backend("torch")
    expected = second_gradients(function, shapes, device)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_low_precision_scores_can_be_differentiated_twice():
    """Their copy in full precision is made again in the backward pass."""
    found = []
    for function in (lambda x, w: router_logits(x, w, 1.0, 0), lambda x, w: F.linear(x.float(), w)):
        x, w = draw(2, 5, 4).bfloat16().requires_grad_(), draw(1, 4, seed=1).requires_grad_()
        grads = torch.autograd.grad(function(x, w).square().sum(), (x, w), create_graph=True)
        found.append(torch.autograd.grad(sum(g.float().square().sum() for g in grads), (x, w)))
    torch.testing.assert_close(*found)
