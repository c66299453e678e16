"""Soft top-k of whole rows, with masks and a fractional k per row, forward and backward.

Forward it is the routing kernel without its selection; backward, one pass over the saved gates.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from routedvit.ops.routing_triton import TINY, free_gates, launch_routing
from routedvit.ops.row_tiles_triton import row_blocks
from routedvit.ops.soft_topk import gates_gradient

__all__ = ["soft_topk"]


@triton.jit
def soft_topk_backward_kernel(
    gates_ptr, grad_ptr, out_ptr, grad_k_ptr, n, eps,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = gate / eps * (g - sum g * gate / sum gate) over gates below 1; that mean is dL/dk."""
    row = tl.program_id(0).to(tl.int64)
    gates_ptr += row * n
    grad_ptr += row * n
    out_ptr += row * n
    lane = tl.arange(0, BLOCK)
    held = free_gates(gates_ptr, lane, lane < n)
    held_grad = tl.load(grad_ptr + lane, mask=lane < n, other=0.0)
    weights = held
    products = held * held_grad
    for block in range(1, NUM_BLOCKS):
        column = block * BLOCK + lane
        gate = free_gates(gates_ptr, column, column < n)
        weights += gate
        products += gate * tl.load(grad_ptr + column, mask=column < n, other=0.0)
    mean = tl.sum(products) / tl.maximum(tl.sum(weights), TINY)
    tl.store(grad_k_ptr + row, mean)
    for block in range(NUM_BLOCKS):
        column = block * BLOCK + lane
        gate = held
        grad = held_grad
        if NUM_BLOCKS > 1:
            gate = free_gates(gates_ptr, column, column < n)
            grad = tl.load(grad_ptr + column, mask=column < n, other=0.0)
        tl.store(out_ptr + column, gate * (grad - mean) / eps, mask=column < n)


@torch.library.custom_op("routedvit::soft_topk", mutates_args=())
def soft_topk(logits: Tensor, k: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """logits [..., n], k [..., 1] fp32, bool mask like logits -> all gates [..., n] fp32."""
    if mask is not None:
        mask = mask.expand_as(logits).contiguous().view(torch.uint8)
    return launch_routing(logits, mask, k.contiguous(), (), (0,), eps)[0]


@soft_topk.register_fake
def _(logits: Tensor, k: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@torch.library.custom_op("routedvit::soft_topk_backward", mutates_args=())
def soft_topk_backward(gates: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the logits [..., n] and of k [..., 1]."""
    n = gates.shape[-1]
    out, grad_k = torch.empty_like(gates), gates.new_empty((*gates.shape[:-1], 1))
    if out.numel() > 0:
        with torch.cuda.device_of(gates):
            soft_topk_backward_kernel[(gates.numel() // n,)](
                gates, grad.contiguous(), out, grad_k, n, eps, **row_blocks(n)
            )
    return out, grad_k


@soft_topk_backward.register_fake
def _(gates: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gates), gates.new_empty((*gates.shape[:-1], 1))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.eps, ctx.dtype = inputs[2], inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (gates,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        grad_logits, grad_k = gates_gradient(gates, grad, ctx.eps)
    else:
        grad_logits, grad_k = torch.ops.routedvit.soft_topk_backward(gates, grad, ctx.eps)
    return grad_logits.to(ctx.dtype), grad_k, None, None


soft_topk.register_autograd(_backward, setup_context=_setup)
