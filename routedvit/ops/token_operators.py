"""Gather and scatter as operators: what `tokens.py` calls on a GPU and in compiled code.

torch.compile would break the plain indexing of `tokens.py` down to loops with atomic additions; on
a CPU those run at a third of the speed of `index_select` and `index_add_`. As operators the two
stay whole, and a Triton kernel can take their place behind the same signature.

    B images, N tokens, R routes of K routed tokens, D width
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from routedvit.ops.backend import uses_triton

__all__ = ["flat_index", "token_rows"]


def flat_index(index: Tensor, num_tokens: int) -> Tensor:
    """[B, K] indices within an image -> [B * K] rows of the flat [B * N, D] view."""
    offset = torch.arange(index.shape[0], device=index.device) * num_tokens
    return (index + offset.unsqueeze(1)).flatten()


@torch.library.custom_op("routedvit::token_rows", mutates_args=())
def token_rows(index: Tensor, num_tokens: int) -> Tensor:
    """index [B, R, K] -> [B, R, N]: as which row each route took a token, or -1. int64."""
    if uses_triton(index):
        from routedvit.ops import tokens_triton

        return tokens_triton.token_rows(index, num_tokens)
    rows = torch.arange(index.shape[-1], device=index.device).expand(index.shape)
    return index.new_full((*index.shape[:-1], num_tokens), -1).scatter_(-1, index, rows)


@token_rows.register_fake
def _(index: Tensor, num_tokens: int) -> Tensor:
    return index.new_empty((*index.shape[:-1], num_tokens))


@torch.library.custom_op("routedvit::gather_tokens", mutates_args=())
def gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, D], index [B, R, K] -> [B, R, K, D]."""
    if uses_triton(x):
        from routedvit.ops import tokens_triton

        return tokens_triton.gather(x, index)
    rows = x.flatten(0, 1).index_select(0, flat_index(index.flatten(1), x.shape[1]))
    return rows.view(*index.shape, x.shape[-1])


@gather.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, x.shape[-1]))


@torch.library.custom_op("routedvit::gather_tokens_backward", mutates_args=())
def gather_backward(index: Tensor, grad: Tensor, num_tokens: int) -> Tensor:
    """index [B, R, K], grad [B, R, K, D] -> gradient of x [B, N, D]."""
    if uses_triton(grad):
        from routedvit.ops import tokens_triton

        return tokens_triton.gather_backward(index, grad, num_tokens)
    batch, dim = grad.shape[0], grad.shape[-1]
    out = grad.new_zeros((batch * num_tokens, dim))
    out.index_add_(0, flat_index(index.flatten(1), num_tokens), grad.reshape(-1, dim))
    return out.view(batch, num_tokens, dim)


@gather_backward.register_fake
def _(index: Tensor, grad: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty((grad.shape[0], num_tokens, grad.shape[-1]))


@torch.library.custom_op("routedvit::gather_all_backward", mutates_args=())
def gather_all_backward(grad: Tensor, indices: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """grad [B, N, D] plus, at each index [B, R, K], what came back for its rows [B, R, K, D]."""
    total = grad.clone(memory_format=torch.contiguous_format)
    for index, rows in zip(indices, grads, strict=True):
        index, rows = index.contiguous(), rows.contiguous()
        for r in range(index.shape[1]):  # one after the other: routes may share tokens
            if uses_triton(grad):
                from routedvit.ops import tokens_triton

                tokens_triton.add_rows(total, index[:, r], rows[:, r])
            else:
                flat = flat_index(index[:, r], total.shape[1])
                total.flatten(0, 1).index_add_(0, flat, rows[:, r].flatten(0, 1))
    return total


@gather_all_backward.register_fake
def _(grad: Tensor, indices: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save_index(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.num_tokens = inputs[0].shape[1]


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.routedvit.gather_tokens_backward(index, grad, ctx.num_tokens), None


gather.register_autograd(_gather_gradient, setup_context=_save_index)


def _save_index_alone(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gather_second_gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
    return None, torch.ops.routedvit.gather_tokens(grad, *ctx.saved_tensors), None


gather_backward.register_autograd(_gather_second_gradient, setup_context=_save_index_alone)


@torch.library.custom_op("routedvit::scatter_add_tokens", mutates_args=())
def scatter_add(
    base: Tensor, index: Tensor, rows: Tensor, gate: Tensor, residual: Tensor | None
) -> Tensor:
    """base [B, N, D], index [B, K], rows [B, K, D], gate [B, K] -> [B, N, D]."""
    if uses_triton(base):
        from routedvit.ops import tokens_triton

        return tokens_triton.scatter_add(base, index, rows, gate, residual)
    dim = base.shape[-1]
    out = base.clone() if residual is None else base + residual
    out = out.contiguous()
    weighted = (rows * gate.unsqueeze(-1).to(rows.dtype)).reshape(-1, dim).to(out.dtype)
    out.view(-1, dim).index_add_(0, flat_index(index, base.shape[1]), weighted)
    return out


@scatter_add.register_fake
def _(base: Tensor, index: Tensor, rows: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
    dtype = base.dtype if residual is None else torch.promote_types(base.dtype, residual.dtype)
    return torch.empty_like(base, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("routedvit::scatter_add_tokens_backward", mutates_args=())
def scatter_add_backward(
    index: Tensor, rows: Tensor, gate: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows [B, K, D] and gate [B, K]; those of base and residual are grad itself."""
    if uses_triton(rows):
        from routedvit.ops import tokens_triton

        return tokens_triton.scatter_add_backward(index, rows, gate, grad)
    flat = grad.flatten(0, 1).index_select(0, flat_index(index, grad.shape[1]))
    grad_out = flat.view(rows.shape).to(rows.dtype)
    grad_gate = torch.linalg.vecdot(grad_out, rows).to(gate.dtype)
    return grad_out.mul_(gate.unsqueeze(-1).to(rows.dtype)), grad_gate


@scatter_add_backward.register_fake
def _(index: Tensor, rows: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        torch.empty_like(gate, memory_format=torch.contiguous_format),
    )


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, index, rows, gate, residual = inputs
    # only the gradient of the gates needs the rows
    ctx.save_for_backward(index, rows if ctx.needs_input_grad[3] else None, gate)
    ctx.base_dtype, ctx.rows_dtype = base.dtype, rows.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, rows, gate = ctx.saved_tensors
    if rows is None:
        taken = torch.ops.routedvit.gather_tokens(grad, index.unsqueeze(1)).squeeze(1)
        # in place: out of place fp32 gates would make an fp32 copy of bf16 rows
        grad_rows, grad_gate = taken.mul_(gate.unsqueeze(-1)).to(ctx.rows_dtype), None
    elif torch.is_grad_enabled():  # create_graph=True
        taken = torch.ops.routedvit.gather_tokens(grad, index.unsqueeze(1)).squeeze(1)
        taken = taken.to(rows.dtype)
        grad_rows = taken * gate.unsqueeze(-1).to(rows.dtype)
        grad_gate = torch.linalg.vecdot(taken, rows).to(gate.dtype)
    else:
        backward = torch.ops.routedvit.scatter_add_tokens_backward
        grad_rows, grad_gate = backward(index, rows, gate, grad)
    residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return grad.to(ctx.base_dtype), None, grad_rows, grad_gate, residual


scatter_add.register_autograd(_scatter_gradient, setup_context=_save_rows)
