"""Attention inside windows, each read where its tokens lie in the sequence.

A program holds one head of one window in registers: queries, keys and values of at most 64 tokens,
and the weights of all pairs. The backward pass makes the weights again from them, so that nothing
else is kept. A token lies in one window, hence no two programs write to one place. The prefix
tokens are one window more, in which each attends to itself alone.

    B images, P prefix tokens, N = H * W patches, E = heads * head_dim:  qkv [B, P + N, 3 * E]
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from routedvit.ops.double_backward import gradients_in_graph
from routedvit.ops.window_attention import window_attention_reference

__all__ = ["window_attention"]


@triton.jit
def _window(height, width, num_prefix, SIDE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Where the tokens of this program's window lie in the sequence, which are real, who may look
    at whom.

    Rows that are no token look everywhere: they are not written, and must not become NaN.
    """
    window = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    columns = (width + SIDE - 1) // SIDE
    row = (window // columns) * SIDE + t // SIDE
    column = (window % columns) * SIDE + t % SIDE
    num_windows = columns * ((height + SIDE - 1) // SIDE)
    is_prefix = window == num_windows
    token = tl.where(is_prefix, t, num_prefix + row * width + column)
    in_grid = (t < SIDE * SIDE) & (row < height) & (column < width)
    real = tl.where(is_prefix, t < num_prefix, in_grid)
    at_each_other = (t[:, None] == t[None, :]) | (window < num_windows)
    allowed = (real[None, :] & at_each_other) | ~real[:, None]
    return token.to(tl.int64)[:, None], real[:, None], allowed


@triton.jit
def _read(qkv_ptr, token, real, inner, head_dim, stride_image, stride_token, BLOCK_D: tl.constexpr):
    """Queries, keys and values of this program's head, zero where there are none; which columns
    of the output they are, and where it has entries.
    """
    d = tl.arange(0, BLOCK_D)
    inside = real & (d < head_dim)[None, :]
    column = (tl.program_id(2) * head_dim + d)[None, :]
    image = tl.program_id(0).to(tl.int64)
    source = qkv_ptr + image * stride_image + token * stride_token + column
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + inner, mask=inside, other=0.0)
    v = tl.load(source + 2 * inner, mask=inside, other=0.0)
    return q, k, v, column, inside


@triton.jit
def _product(a, b, INTERPRETED: tl.constexpr):
    """a b in fp32."""
    if INTERPRETED:  # as integers the interpreter would multiply the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _weights(q, k, allowed, scale, INTERPRETED: tl.constexpr):
    """softmax(q k^T), in fp32."""
    scores = _product(q, tl.trans(k), INTERPRETED) * scale
    scores = tl.where(allowed, scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def window_attention_kernel(
    qkv_ptr, out_ptr,
    height, width, num_prefix, num_tokens, inner, head_dim, stride_image, stride_token, scale,
    SIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    token, real, allowed = _window(height, width, num_prefix, SIDE, BLOCK_T)
    q, k, v, column, inside = _read(
        qkv_ptr, token, real, inner, head_dim, stride_image, stride_token, BLOCK_D
    )
    weights = _weights(q, k, allowed, scale, INTERPRETED)
    out = _product(weights.to(v.dtype), v, INTERPRETED)
    place = tl.program_id(0).to(tl.int64) * num_tokens + token
    tl.store(out_ptr + place * inner + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def window_attention_backward_kernel(
    qkv_ptr, grad_ptr, out_ptr,
    height, width, num_prefix, num_tokens, inner, head_dim, stride_image, stride_token, scale,
    SIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """With weights A and the gradient G of the output, all of one window:

    dV = A^T G,   dS = A * (G V^T - rowsum(A * G V^T)),   dQ = dS K * scale,   dK = dS^T Q * scale
    """
    token, real, allowed = _window(height, width, num_prefix, SIDE, BLOCK_T)
    q, k, v, column, inside = _read(
        qkv_ptr, token, real, inner, head_dim, stride_image, stride_token, BLOCK_D
    )
    place = tl.program_id(0).to(tl.int64) * num_tokens + token
    grad = tl.load(grad_ptr + place * inner + column, mask=inside, other=0.0)
    target = out_ptr + place * 3 * inner + column
    weights = _weights(q, k, allowed, scale, INTERPRETED)
    grad_v = _product(tl.trans(weights).to(grad.dtype), grad, INTERPRETED)
    tl.store(target + 2 * inner, grad_v.to(out_ptr.dtype.element_ty), mask=inside)
    # a NaN of one token is no gradient of those that may not look at it
    grad_weights = tl.where(allowed, _product(grad, tl.trans(v), INTERPRETED), 0.0)
    mean = tl.sum(weights * grad_weights, axis=1)
    grad_scores = (weights * (grad_weights - mean[:, None]) * scale).to(q.dtype)
    grad_q = _product(grad_scores, k, INTERPRETED)
    tl.store(target, grad_q.to(out_ptr.dtype.element_ty), mask=inside)
    grad_k = _product(tl.trans(grad_scores), q, INTERPRETED)
    tl.store(target + inner, grad_k.to(out_ptr.dtype.element_ty), mask=inside)


_INTERPRETED = not isinstance(window_attention_kernel, triton.JITFunction)


def _launch(
    kernel: Any,
    qkv: Tensor,
    others: Sequence[Tensor],
    height: int,
    width: int,
    side: int,
    num_heads: int,
    num_prefix: int,
) -> None:
    """Run `kernel` on qkv and the other tensors, which are contiguous; the last is the output."""
    if qkv.numel() == 0:
        return
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    batch, num_tokens, inner = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    head_dim = inner // num_heads
    windows = triton.cdiv(height, side) * triton.cdiv(width, side) + (num_prefix > 0)
    with torch.cuda.device_of(qkv):
        kernel[(batch, windows, num_heads)](
            qkv, *others, height, width, num_prefix, num_tokens, inner, head_dim,
            qkv.stride(0), qkv.stride(1), head_dim**-0.5,
            SIDE=side, BLOCK_T=max(16, triton.next_power_of_2(max(side * side, num_prefix))),
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)), INTERPRETED=_INTERPRETED,
            num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("routedvit::window_attention", mutates_args=())
def window_attention(
    qkv: Tensor, height: int, width: int, window: int, num_heads: int, num_prefix: int
) -> Tensor:
    """qkv [B, P + N, 3 * E] -> [B, P + N, E]."""
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))
    shape = (height, width, window, num_heads, num_prefix)
    _launch(window_attention_kernel, qkv, [out], *shape)
    return out


@window_attention.register_fake
def _(qkv: Tensor, height: int, width: int, window: int, num_heads: int, num_prefix: int) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


@torch.library.custom_op("routedvit::window_attention_backward", mutates_args=())
def window_attention_backward(
    qkv: Tensor,
    grad: Tensor,
    height: int,
    width: int,
    window: int,
    num_heads: int,
    num_prefix: int,
) -> Tensor:
    """Gradient of qkv [B, P + N, 3 * E] from that of the output [B, P + N, E]."""
    out = qkv.new_empty(qkv.shape)
    shape = (height, width, window, num_heads, num_prefix)
    _launch(window_attention_backward_kernel, qkv, [grad.contiguous(), out], *shape)
    return out


@window_attention_backward.register_fake
def _(
    qkv: Tensor,
    grad: Tensor,
    height: int,
    width: int,
    window: int,
    num_heads: int,
    num_prefix: int,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, *ctx.shape = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (qkv,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        height, width, window, num_heads, num_prefix = ctx.shape
        plain = partial(
            window_attention_reference, height=height, width=width, window=window,
            num_heads=num_heads, num_prefix=num_prefix,
        )  # fmt: skip
        (found,) = gradients_in_graph(plain, (qkv,), grad)
    else:
        found = torch.ops.routedvit.window_attention_backward(qkv, grad, *ctx.shape)
    return found, *(None for _ in ctx.shape)


window_attention.register_autograd(_backward, setup_context=_setup)
