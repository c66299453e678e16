"""Kernel against reference: values and gradients, with the reference's own error as the measure."""

from collections.abc import Callable

import torch
from torch import Tensor

from routedvit.ops.backend import backend, set_backend


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(function: Callable[..., Tensor], inputs: list[Tensor], name: str) -> list[Tensor]:
    """Output and gradients of the floating inputs, computed by backend `name`."""
    before = backend()
    set_backend(name)
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    out.backward(draw(*out.shape, seed=1).to(out))
    set_backend(before)
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def assert_as_exact_as_the_reference(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    device: str,
    factor: float = 3.0,
    last_places: float = 2.0,
) -> None:
    """The kernel's error against float64 is at most `factor` times that of the reference.

    `last_places` units in the last place of the largest result are granted in any case: where the
    reference happens to be exact, another order of summation need not be, and a gradient is a
    difference of numbers of that size.
    """
    placed = [t.to(device) for t in inputs]
    found = run(function, placed, "triton")
    eager = run(function, placed, "torch")
    exact = run(function, [t.double() if t.is_floating_point() else t for t in placed], "torch")
    largest = max(float(truth.abs().amax()) for truth in exact)
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == truth.shape
        last_place = torch.finfo(ours.dtype).eps * largest
        allowed = factor * (theirs.double() - truth).abs().amax() + last_places * last_place
        assert (ours.double() - truth).abs().amax() <= allowed
