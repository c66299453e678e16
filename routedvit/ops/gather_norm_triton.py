"""LayerNorm or RMSNorm of gathered rows: one pass forward, one backward.

Forward, a program reads whole rows at their indices, normalises them in registers (fp32) and
writes them in order. Backward, a program owns blocks of tokens: it finds their rows by binary
search (`tokens_triton.py`), adds up the gradients of the routes that took a token, since they meet
the same normalised row, and recomputes that row's statistics instead of having saved them. Weight
gradients are summed per program, then over the programs in a fixed order: no atomics.

    B images, N tokens, R routes, K routed tokens of each, D width:  index [B, R, K], x [B, N, D]
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from routedvit.ops.double_backward import gradients_in_graph
from routedvit.ops.row_tiles_triton import MAX_PROGRAMS, row_tile
from routedvit.ops.tokens_triton import find_row

__all__ = ["gather_norm"]


@triton.jit
def _normalise(x, column, dim, eps, RMS: tl.constexpr):
    """Rows [ROWS, BLOCK_D], zero past dim -> normalised rows and 1 / standard deviation."""
    if not RMS:
        mean = tl.sum(x, axis=1) / dim
        x = tl.where((column < dim)[None, :], x - mean[:, None], 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / dim + eps)
    return x * deviation[:, None], deviation


@triton.jit
def gather_norm_kernel(
    x_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, dim, stride_image, stride_token, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (column < dim)[None, :]
    token = tl.load(index_ptr + image * num_rows + row, mask=row < num_rows, other=0)
    source = x_ptr + image * stride_image + token[:, None] * stride_token + column[None, :]
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    normal, _ = _normalise(x, column, dim, eps, RMS)
    weight = tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(tl.float32)
    out = normal * weight[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + (image * num_rows + row)[:, None] * dim + column[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gather_norm_backward_kernel(
    x_ptr, index_ptr, weight_ptr, grad_ptr, out_ptr, partial_ptr,
    num_images, num_tokens, num_routes, num_rows, dim, stride_image, stride_token, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """partial[program] = its share of the gradients of weight and bias, [2, D]."""
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    total_tokens = tl.full((), num_tokens, tl.int64) * num_images
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < total_tokens:
        flat = first + tl.arange(0, ROWS)
        image = flat // num_tokens
        token = flat % num_tokens
        present = flat < total_tokens
        inside = present[:, None] & (column < dim)[None, :]
        grad = tl.zeros((ROWS, BLOCK_D), tl.float32)
        routed = tl.zeros((ROWS,), tl.int1)
        for r in range(num_routes):
            start = (tl.where(present, image, 0) * num_routes + r) * num_rows
            row = find_row(index_ptr + start, token, num_rows)
            routed = routed | (row >= 0)
            source = grad_ptr + (start + row)[:, None] * dim + column[None, :]
            grad += tl.load(source, mask=inside & (row >= 0)[:, None], other=0.0).to(tl.float32)
        source = x_ptr + image[:, None] * stride_image + token[:, None] * stride_token
        # the others are not read: most of the traffic, and an inf in them is nobody's gradient
        x = tl.load(source + column[None, :], mask=inside & routed[:, None], other=0.0)
        x = x.to(tl.float32)
        normal, deviation = _normalise(x, column, dim, eps, RMS)
        grad_weight += tl.sum(grad * normal, axis=0)
        grad_bias += tl.sum(grad, axis=0)
        grad = grad * weight[None, :]
        out = grad - normal * (tl.sum(grad * normal, axis=1) / dim)[:, None]
        if not RMS:
            out -= (tl.sum(grad, axis=1) / dim)[:, None]
        out = out * deviation[:, None]
        target = out_ptr + flat[:, None] * dim + column[None, :]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)
        first += tl.num_programs(0).to(tl.int64) * ROWS
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * dim + column
    tl.store(partial, grad_weight, mask=column < dim)
    tl.store(partial + dim, grad_bias, mask=column < dim)


@torch.library.custom_op("routedvit::gather_norm", mutates_args=())
def gather_norm(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    """x [B, N, D], index [B, R, K], weight and bias [D] -> [B, R, K, D]."""
    batch, _, dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty((*index.shape, dim))
    if out.numel() > 0:
        tile, num_rows = row_tile(dim), index.shape[1] * index.shape[2]
        with torch.cuda.device_of(x):
            gather_norm_kernel[(batch, triton.cdiv(num_rows, tile["ROWS"]))](
                x, index.contiguous(), weight.contiguous(),
                weight if bias is None else bias.contiguous(), out,
                num_rows, dim, x.stride(0), x.stride(1), eps,
                RMS=rms, HAS_BIAS=bias is not None, **tile,
            )  # fmt: skip
    return out


@gather_norm.register_fake
def _(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    return x.new_empty((*index.shape, x.shape[-1]))


@torch.library.custom_op("routedvit::gather_norm_backward", mutates_args=())
def gather_norm_backward(
    x: Tensor, index: Tensor, weight: Tensor, grad: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, N, D] and of weight and bias, [2, D] fp32."""
    batch, num_tokens, dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty((batch, num_tokens, dim))
    if out.numel() == 0:
        return out, x.new_zeros((2, dim), dtype=torch.float32)
    tile = row_tile(dim)
    programs = min(triton.cdiv(batch * num_tokens, tile["ROWS"]), MAX_PROGRAMS)
    partial = x.new_empty((programs, 2, dim), dtype=torch.float32)
    with torch.cuda.device_of(x):
        gather_norm_backward_kernel[(programs,)](
            x, index.contiguous(), weight.contiguous(), grad.contiguous(), out, partial,
            batch, num_tokens, index.shape[1], index.shape[2], dim, x.stride(0), x.stride(1), eps,
            RMS=rms, **tile,
        )  # fmt: skip
    return out, partial.sum(0)


@gather_norm_backward.register_fake
def _(
    x: Tensor, index: Tensor, weight: Tensor, grad: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]), dtype=torch.float32)


def _plain(x: Tensor, weight: Tensor, index: Tensor, eps: float, rms: bool) -> Tensor:
    rows = torch.ops.routedvit.gather_tokens(x, index).float()
    norm = F.rms_norm if rms else F.layer_norm
    return norm(rows, weight.shape, weight.float(), eps=eps).to(x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, weight, bias, ctx.eps, ctx.rms = inputs
    ctx.save_for_backward(x, index, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        plain = partial(_plain, index=index, eps=ctx.eps, rms=ctx.rms)
        grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 1, 2)).to(ctx.bias_dtype)
        grad_x, grad_weight = gradients_in_graph(plain, (x, weight), grad)
        return grad_x, None, grad_weight, grad_bias, None, None
    grad_x, sums = torch.ops.routedvit.gather_norm_backward(
        x, index, weight, grad, ctx.eps, ctx.rms
    )
    grad_bias = None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)
    return grad_x, None, sums[0].to(weight.dtype), grad_bias, None, None


gather_norm.register_autograd(_backward, setup_context=_setup)
