"""Scores of tokens for their routers: each token is read once each way, in the type it has.

Forward, a program reads whole rows and multiplies them with the vectors of all routes, in fp32.
Backward, a program walks over blocks of tokens and keeps its share of the gradient of one vector in
registers; the shares are summed afterwards in a fixed order, without atomics. The programs of the
first route write the gradients of the tokens, of all routes at once.

    B images, P prefix tokens, N patches, R routes, D width:  x [B, P + N, D], weight [R, D]
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from routedvit.ops.double_backward import gradients_in_graph
from routedvit.ops.router_logits import products
from routedvit.ops.row_tiles_triton import MAX_PROGRAMS, row_tile

__all__ = ["router_logits"]


@triton.jit
def router_logits_kernel(
    x_ptr, weight_ptr, out_ptr, num_patches, num_prefix, dim, stride_image, stride_token, scale,
    ROUTES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    patch = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = (patch < num_patches)[:, None] & (column < dim)[None, :]
    source = x_ptr + image * stride_image + (num_prefix + patch)[:, None] * stride_token
    x = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    for r in tl.static_range(ROUTES):
        weight = tl.load(weight_ptr + r * dim + column, mask=column < dim, other=0.0)
        logit = tl.sum(x * weight.to(tl.float32)[None, :], axis=1) * scale
        tl.store(out_ptr + (image * ROUTES + r) * num_patches + patch, logit, patch < num_patches)


@triton.jit
def router_logits_backward_kernel(
    x_ptr, weight_ptr, grad_ptr, out_ptr, partial_ptr,
    num_images, num_patches, num_prefix, dim, stride_image, stride_token, scale,
    ROUTES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[program, route] = its share of the gradient of weight[route]."""
    column = tl.arange(0, BLOCK_D)
    route = tl.program_id(1)
    share = tl.zeros((BLOCK_D,), tl.float32)
    num_tokens = tl.full((), num_prefix, tl.int64) + num_patches  # either may be a constant, if 1
    total = num_tokens * num_images
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < total:
        flat = first + tl.arange(0, ROWS)
        image = flat // num_tokens
        token = flat % num_tokens
        inside = (flat < total)[:, None] & (column < dim)[None, :]
        scored = (flat < total) & (token >= num_prefix)
        source = x_ptr + image[:, None] * stride_image + token[:, None] * stride_token
        x = tl.load(source + column[None, :], mask=inside & scored[:, None], other=0.0)
        x = x.to(tl.float32)
        place = image * ROUTES * num_patches + token - num_prefix
        grad = tl.load(grad_ptr + place + route * num_patches, mask=scored, other=0.0) * scale
        share += tl.sum(grad[:, None] * x, axis=0)
        if route == 0:
            out = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for r in tl.static_range(ROUTES):
                grad = tl.load(grad_ptr + place + r * num_patches, mask=scored, other=0.0) * scale
                weight = tl.load(weight_ptr + r * dim + column, mask=column < dim, other=0.0)
                out += grad[:, None] * weight.to(tl.float32)[None, :]
            target = out_ptr + flat[:, None] * dim + column[None, :]
            tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)
        first += tl.num_programs(0).to(tl.int64) * ROWS
    place = (tl.program_id(0).to(tl.int64) * ROUTES + route) * dim + column
    tl.store(partial_ptr + place, share, mask=column < dim)


@torch.library.custom_op("routedvit::router_logits", mutates_args=())
def router_logits(x: Tensor, weight: Tensor, scale: float, num_prefix: int) -> Tensor:
    """x [B, P + N, D], weight [R, D] -> [B, R, N] fp32."""
    batch, num_tokens, dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    num_patches = num_tokens - num_prefix
    out = x.new_empty((batch, weight.shape[0], num_patches), dtype=torch.float32)
    if out.numel() > 0:
        tile = row_tile(dim)
        with torch.cuda.device_of(x):
            router_logits_kernel[(batch, triton.cdiv(num_patches, tile["ROWS"]))](
                x, weight.contiguous(), out,
                num_patches, num_prefix, dim, x.stride(0), x.stride(1), scale,
                ROUTES=weight.shape[0], **tile,
            )  # fmt: skip
    return out


@router_logits.register_fake
def _(x: Tensor, weight: Tensor, scale: float, num_prefix: int) -> Tensor:
    shape = (x.shape[0], weight.shape[0], x.shape[1] - num_prefix)
    return x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("routedvit::router_logits_backward", mutates_args=())
def router_logits_backward(
    x: Tensor, weight: Tensor, grad: Tensor, scale: float, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, P + N, D], 0 in the prefix, and of weight [R, D] in fp32."""
    batch, num_tokens, dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty((batch, num_tokens, dim))
    routes = weight.shape[0]
    if out.numel() == 0:
        return out, x.new_zeros((routes, dim), dtype=torch.float32)
    tile = row_tile(dim)
    programs = min(triton.cdiv(batch * num_tokens, tile["ROWS"]), MAX_PROGRAMS)
    partial = x.new_empty((programs, routes, dim), dtype=torch.float32)
    with torch.cuda.device_of(x):
        router_logits_backward_kernel[(programs, routes)](
            x, weight.contiguous(), grad.contiguous(), out, partial,
            batch, num_tokens - num_prefix, num_prefix, dim, x.stride(0), x.stride(1), scale,
            ROUTES=routes, **tile,
        )  # fmt: skip
    return out, partial.sum(0)


@router_logits_backward.register_fake
def _(
    x: Tensor, weight: Tensor, grad: Tensor, scale: float, num_prefix: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.scale, ctx.num_prefix = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        plain = partial(products, scale=ctx.scale, num_prefix=ctx.num_prefix)
        return *gradients_in_graph(plain, (x, weight), grad), None, None
    grad_x, grad_weight = torch.ops.routedvit.router_logits_backward(
        x, weight, grad, ctx.scale, ctx.num_prefix
    )
    return grad_x, grad_weight.to(weight.dtype), None, None


router_logits.register_autograd(_backward, setup_context=_setup)
