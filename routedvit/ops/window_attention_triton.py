"""Attention inside windows, each read where its tokens lie in the sequence.

A program holds one head of one window in registers: queries, keys and values of at most 64 tokens,
and the weights of all pairs. The backward pass makes the weights again from them, so that nothing
else is kept. A token lies in one window, hence no two programs write to one place. The prefix
tokens are one window more, in which each attends to itself alone.

    B images, P prefix tokens, N = H * W patches, E = heads * head_dim:  qkv [B, P + N, 3 * E]
"""

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
def _window(
    window, height, width, num_prefix, SIDE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Where the tokens of a window lie in the sequence, which are real, who may look at whom.

    Rows that are no token look everywhere: they are not written, and must not become NaN.
    """
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
    return token.to(tl.int64), real, allowed


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
    height, width, num_prefix, num_tokens, head_dim, stride_image, stride_token, scale,
    HEADS: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    token, real, allowed = _window(tl.program_id(1), height, width, num_prefix, SIDE, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (d < head_dim)[None, :]
    inner = HEADS * head_dim
    column = (tl.program_id(2) * head_dim + d)[None, :]
    source = qkv_ptr + image * stride_image + token[:, None] * stride_token + column
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + inner, mask=inside, other=0.0)
    v = tl.load(source + 2 * inner, mask=inside, other=0.0)
    weights = _weights(q, k, allowed, scale, INTERPRETED)
    out = _product(weights.to(v.dtype), v, INTERPRETED)
    target = out_ptr + (image * num_tokens + token)[:, None] * inner + column
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def window_attention_backward_kernel(
    qkv_ptr, grad_ptr, out_ptr,
    height, width, num_prefix, num_tokens, head_dim, stride_image, stride_token, scale,
    HEADS: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """With weights A and the gradient G of the output, all of one window:

    dV = A^T G,   dS = A * (G V^T - rowsum(A * G V^T)),   dQ = dS K * scale,   dK = dS^T Q * scale
    """
    image = tl.program_id(0).to(tl.int64)
    token, real, allowed = _window(tl.program_id(1), height, width, num_prefix, SIDE, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (d < head_dim)[None, :]
    inner = HEADS * head_dim
    column = (tl.program_id(2) * head_dim + d)[None, :]
    source = qkv_ptr + image * stride_image + token[:, None] * stride_token + column
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + inner, mask=inside, other=0.0)
    v = tl.load(source + 2 * inner, mask=inside, other=0.0)
    place = image * num_tokens + token
    grad = tl.load(grad_ptr + place[:, None] * inner + column, mask=inside, other=0.0)
    target = out_ptr + place[:, None] * 3 * inner + column
    weights = _weights(q, k, allowed, scale, INTERPRETED)
    grad_v = _product(tl.trans(weights).to(grad.dtype), grad, INTERPRETED)
    tl.store(target + 2 * inner, grad_v.to(out_ptr.dtype.element_ty), mask=inside)
    # a NaN of one token is no gradient of those that may not look at it
    grad_weights = _product(grad, tl.trans(v), INTERPRETED)
    grad_weights = tl.where(allowed, grad_weights, 0.0)
    mean = tl.sum(weights * grad_weights, axis=1)
    grad_scores = (weights * (grad_weights - mean[:, None]) * scale).to(q.dtype)
    grad_q = _product(grad_scores, k, INTERPRETED)
    tl.store(target, grad_q.to(out_ptr.dtype.element_ty), mask=inside)
    grad_k = _product(tl.trans(grad_scores), q, INTERPRETED)
    tl.store(target + inner, grad_k.to(out_ptr.dtype.element_ty), mask=inside)


_INTERPRETED = not isinstance(window_attention_kernel, triton.JITFunction)


def _launch_options(side: int, head_dim: int, num_prefix: int) -> dict[str, Any]:
    tokens = max(side * side, num_prefix)
    return {
        "SIDE": side,
        "BLOCK_T": max(16, triton.next_power_of_2(tokens)),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "INTERPRETED": _INTERPRETED,
        "num_warps": 4,
    }


def _grid(batch: int, height: int, width: int, side: int, heads: int, prefix: int) -> Any:
    windows = triton.cdiv(height, side) * triton.cdiv(width, side)
    return batch, windows + (prefix > 0), heads


@torch.library.custom_op("routedvit::window_attention", mutates_args=())
def window_attention(
    qkv: Tensor, height: int, width: int, window: int, num_heads: int, num_prefix: int
) -> Tensor:
    """qkv [B, P + N, 3 * E] -> [B, P + N, E]."""
    batch, num_tokens, inner = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    out = qkv.new_empty((batch, num_tokens, inner))
    if out.numel() > 0:
        head_dim = inner // num_heads
        with torch.cuda.device_of(qkv):
            window_attention_kernel[_grid(batch, height, width, window, num_heads, num_prefix)](
                qkv, out, height, width, num_prefix, num_tokens, head_dim,
                qkv.stride(0), qkv.stride(1), head_dim**-0.5,
                HEADS=num_heads, **_launch_options(window, head_dim, num_prefix),
            )  # fmt: skip
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
    batch, num_tokens, inner = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape)
    if out.numel() > 0:
        head_dim = inner // num_heads
        grid = _grid(batch, height, width, window, num_heads, num_prefix)
        with torch.cuda.device_of(qkv):
            window_attention_backward_kernel[grid](
                qkv, grad.contiguous(), out, height, width, num_prefix, num_tokens, head_dim,
                qkv.stride(0), qkv.stride(1), head_dim**-0.5,
                HEADS=num_heads, **_launch_options(window, head_dim, num_prefix),
            )  # fmt: skip
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
