"""Gather and scatter for compiled code on a GPU: plain indexing that Inductor fuses.

A kernel of ours is a wall to the compiler: what comes before it is written, and read again after
it. What a routed block moves takes a GPU about as long as what it multiplies, so in compiled code
each token learns, once per routing, as which row it was taken (`token_rows`). With that every sum
here is one over places of the *output*: a load at an index, which Inductor puts into the loop of
whatever comes next, a norm, a gate, scores. No atomics: of a route one row at most meets a token.

Left to autograd, a gather's gradient would be a scatter with atomic additions; so both have
gradients of their own, written the same way. What it saves is counted in `benchmarks/NOTES.md`.

    B images, N tokens, R routes of K routed tokens, D width
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from routedvit.ops.backend import uses_triton
from routedvit.ops.token_operators import token_rows

__all__ = ["fuses", "gather_all", "scatter_add_tokens", "settle_gradient"]


def fuses(x: Tensor) -> bool:
    """Whether what depends on x is compiled for a device of Triton's."""
    return torch.compiler.is_dynamo_compiling() and uses_triton(x)


def gather_all(x: Tensor, indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """`routedvit.ops.gather_all`."""
    x, *rows = _GatherAll.apply(x, *indices)
    return x, rows


def scatter_add_tokens(
    base: Tensor, index: Tensor, rows: Tensor, gate: Tensor, residual: Tensor | None
) -> Tensor:
    """`routedvit.ops.scatter_add_tokens`."""
    return _ScatterAdd.apply(base, index, rows, gate, residual)


def settle_gradient(x: Tensor) -> Tensor:
    """x, whose gradient is a sum of several: in compiled code on a GPU it is written as such.

    Between the sum and the backward pass of a norm Inductor else writes it in fp32, or sums up anew
    for each thing that the norm needs of it.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
        if fuses(x):
            return _SettleGradient.apply(x)
    return x


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, D], index [B, K] -> [B, K, D]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _spread(rows: Tensor, row_of: Tensor) -> Tensor:
    """rows [B, K, D] to their tokens, row_of [B, N] -> [B, N, D], 0 where no row belongs."""
    return torch.where((row_of >= 0).unsqueeze(-1), _take(rows, row_of.clamp(min=0)), 0.0)


class _GatherAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        routes = [i if i.ndim == 3 else i.unsqueeze(1) for i in indices]
        ctx.save_for_backward(*(token_rows(index, x.shape[1]) for index in routes))
        rows = (_take(x, index.flatten(1)).view(*index.shape, -1) for index in indices)
        return x.view_as(x), *rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0]
        for row_of, grad in zip(ctx.saved_tensors, grads[1:], strict=True):
            routes = grad if grad.ndim == 4 else grad.unsqueeze(1)
            for own, where in zip(routes.unbind(1), row_of.unbind(1), strict=True):
                total = total + _spread(own, where)
        return total, *(None for _ in ctx.saved_tensors)


class _ScatterAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, index: Tensor, rows: Tensor, gate: Tensor, residual: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(index, rows, gate)
        ctx.dtype, ctx.residual_dtype = base.dtype, None if residual is None else residual.dtype
        row_of = token_rows(index.unsqueeze(1), base.shape[1]).squeeze(1)
        weight = gate.float().gather(1, row_of.clamp(min=0)).unsqueeze(-1)
        total = base.float() + _spread(rows, row_of).float() * weight
        dtype = base.dtype
        if residual is not None:
            total = total + residual.float()
            dtype = torch.promote_types(dtype, residual.dtype)
        # where nothing is cast, Dynamo of torch 2.11 would give what `to` returns no gradient
        return total if total.dtype == dtype else total.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, rows, gate = ctx.saved_tensors
        (grad,) = grads
        taken = _take(grad, index).float()
        grad_rows = (taken * gate.float().unsqueeze(-1)).to(rows.dtype)
        grad_gate = (taken * rows.float()).sum(-1).to(gate.dtype)
        residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        return grad.to(ctx.dtype), None, grad_rows, grad_gate, residual


class _SettleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)  # taken out by Inductor
        settle(total)
        return total


@torch.library.custom_op("routedvit::settle", mutates_args=("x",))
def settle(x: Tensor) -> None:
    """Does nothing. But it might write to x, so that x has to be in memory, in its own type."""


@settle.register_fake
def _(x: Tensor) -> None:
    return None
