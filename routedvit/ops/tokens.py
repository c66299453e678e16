"""Rows out, rows in: gather the routed tokens, add what became of them to where they came from.

    B images, N tokens, K routed tokens, D width:  x_BND, index_BK

Both work on the flat [B * N, D] view: on a CPU `index_select` / `index_add` there run 2 to 4 times
faster than `gather` / `scatter_add` with an expanded index. Indices are unique within an image, so
the sums have one term each and are bitwise reproducible on every device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops import fused_tokens
from routedvit.ops.backend import differentiates_itself, plain_pytorch, uses_triton
from routedvit.ops.fused_tokens import fuses
from routedvit.ops.token_operators import flat_index

__all__ = ["gather_all", "gather_tokens", "prepend_prefix", "scatter_add_tokens"]


def _as_operator(x: Tensor) -> bool:
    """Whether to call the operators of `token_operators.py`: for the kernels, or when compiling for
    a CPU.
    """
    if uses_triton(x):
        return True
    return torch.compiler.is_dynamo_compiling() and not plain_pytorch() and x.is_cpu


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The routed rows of each image.

    Args:
        x: [B, N, D].
        index: [B, K], or [B, R, K] for R routes that may take the same token; int64, ascending
            within a route as `route` returns it (the Triton backward searches it).

    Returns:
        [B, K, D] or [B, R, K, D].
    """
    if not torch.jit.is_scripting():
        if fuses(x):
            return fused_tokens.gather_all(x, [index])[1][0]
        if _as_operator(x):
            routes = index if index.ndim == 3 else index.unsqueeze(1)
            rows = torch.ops.routedvit.gather_tokens(x, routes)
            return rows if index.ndim == 3 else rows.squeeze(1)
    batch, num_tokens, dim = x.shape
    flat = flat_index(index.flatten(1), num_tokens)
    rows = x.reshape(batch * num_tokens, dim).index_select(0, flat)
    return rows.view(index.shape + (dim,))  # noqa: RUF005 -- TorchScript


def gather_all(x: Tensor, indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """`gather_tokens` at each of `indices`, and x itself for whoever reads all of it next.

    Read on through the x that comes back: on a GPU, and in eager mode on a CPU, the gradients
    of the rows are then added to that of x where they belong, instead of to zeros of the size of x,
    one per index, that are summed up afterwards.
    """
    if fuses(x):
        return fused_tokens.gather_all(x, indices)
    if uses_triton(x):
        x, *rows = _GatherAllByKernel.apply(x, *indices)
        return x, rows
    if _as_operator(x) or not x.is_cpu or differentiates_itself():
        return x, [gather_tokens(x, index) for index in indices]
    x, *rows = _GatherAll.apply(x, *indices)
    return x, rows


class _GatherAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        positions = [flat_index(index.flatten(1), x.shape[1]) for index in indices]
        ctx.save_for_backward(*positions)
        flat = x.reshape(-1, x.shape[-1])
        rows = (flat.index_select(0, position) for position in positions)
        shapes = ((*index.shape, x.shape[-1]) for index in indices)
        return x.view_as(x), *(r.view(shape) for r, shape in zip(rows, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        flat = total.view(-1, total.shape[-1])
        positions = ctx.saved_tensors
        for position, grad in zip(positions, grads[1:], strict=True):
            flat.index_add_(0, position, grad.reshape(-1, total.shape[-1]))
        return total, *(None for _ in positions)


class _GatherAllByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*indices)
        return x.view_as(x), *(gather_tokens(x, index) for index in indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        indices = [i if i.ndim == 3 else i.unsqueeze(1) for i in ctx.saved_tensors]
        rows = [g.unflatten(0, (-1, 1)) if g.ndim == 3 else g for g in grads[1:]]
        total = grads[0]
        if torch.is_grad_enabled():  # create_graph=True
            for index, grad in zip(indices, rows, strict=True):
                total = total + torch.ops.routedvit.gather_tokens_backward(
                    index, grad, total.shape[1]
                )
            return total, *(None for _ in indices)
        total = torch.ops.routedvit.gather_all_backward(total, indices, rows)
        return total, *(None for _ in indices)


def scatter_add_tokens(
    base: Tensor, index: Tensor, rows: Tensor, gate: Tensor, residual: Tensor | None = None
) -> Tensor:
    """base [B, N, D] with gate * rows added at `index`, plus the residual.

    Args:
        base: [B, N, D].
        index: [B, K] int64, unique and ascending within an image.
        rows: [B, K, D]; under autocast of another type than base where the light path is missing
            or a parameter is added to one of them.
        gate: [B, K], one factor per row, cast to the type of base.
        residual: [B, N, D], another summand, which may have another type: one pass with the rest
            in the kernel.
    """
    if not torch.jit.is_scripting():
        if fuses(base):
            return fused_tokens.scatter_add_tokens(base, index, rows, gate, residual)
        if _as_operator(base):
            return torch.ops.routedvit.scatter_add_tokens(base, index, rows, gate, residual)
    batch, num_tokens, dim = base.shape
    weighted = (rows * gate.unsqueeze(-1).to(rows.dtype)).reshape(-1, dim)
    flat = base.reshape(batch * num_tokens, dim)
    positions = flat_index(index, num_tokens)
    if residual is None:
        out = flat.index_add(0, positions, weighted.to(flat.dtype))
        return out.view(batch, num_tokens, dim)
    # into the fresh sum, in place: one pass over [B, N, D] less
    total = flat + residual.reshape(batch * num_tokens, dim)
    return total.index_add_(0, positions, weighted.to(total.dtype)).view(batch, num_tokens, dim)


def prepend_prefix(index: Tensor, gate: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Make the prefix tokens (cls, registers) heavy: first, with gate 1, outside every capacity.

    Args:
        index: [..., k] patch indices, 0 = first patch.
        gate: [..., k] their gates.
        num_prefix: number of prefix tokens P in front of the patches.

    Returns:
        token indices and gates, [..., P + k] each.
    """
    if num_prefix == 0:
        return index, gate
    prefix = F.pad(torch.arange(num_prefix, device=index.device), (0, index.shape[-1]))
    index = F.pad(index + num_prefix, (num_prefix, 0)) + prefix
    return index, F.pad(gate, (num_prefix, 0), value=1.0)
