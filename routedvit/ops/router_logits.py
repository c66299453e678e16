"""Scores of tokens for their routers: dot products in fp32, whatever type the tokens have.

A router is one vector, so this is a matrix-vector product: it is worth no more than the read of its
tokens. In PyTorch bf16 tokens are copied to fp32 for each router; kept for the backward pass, the
copies would be more memory than the rest of the block saves, so they are made again there. The
kernel casts in registers, and so do the sums in its place in compiled code, which Inductor computes
in the loop of the norm before them. (On a GPU the reference's products are TF32 where torch allows
that.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops.backend import differentiates_itself, uses_triton
from routedvit.ops.fused_tokens import fuses

__all__ = ["products", "router_logits"]


def router_logits(x: Tensor, weight: Tensor, scale: float, num_prefix: int) -> Tensor:
    """scale * x . weight of each patch and route, in fp32 also in autocast.

    Args:
        x: [B, P + N, D].
        weight: [R, D], of any floating type.
        scale: factor on the products.
        num_prefix: P, the tokens in front that do not compete.

    Returns:
        [B, R, N] fp32, or float64 where x is.
    """
    if torch.jit.is_scripting() or x.is_meta:
        return products(x, weight, scale, num_prefix)
    if fuses(x):
        return _fused(x, weight, scale, num_prefix)
    if uses_triton(x):
        return torch.ops.routedvit.router_logits(x, weight, scale, num_prefix)
    with torch.autocast(x.device.type, enabled=False):
        return products(x, weight, scale, num_prefix)


def _fused(x: Tensor, weight: Tensor, scale: float, num_prefix: int) -> Tensor:
    """Sums, not products of matrices, which would be calls that nothing fuses with."""
    vectors = weight.float() * scale
    sums = [(x.float() * vector).sum(-1) for vector in vectors.unbind(0)]
    return torch.stack(sums, 1)[..., num_prefix:]


def products(x: Tensor, weight: Tensor, scale: float, num_prefix: int) -> Tensor:
    """The prefix is cut off the narrow result: cutting it off x would copy all of x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = weight.to(dtype) * scale
    if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
        if x.dtype != dtype and x.requires_grad and not differentiates_itself():
            in_full: Tensor = _ProductsInFull.apply(x, weight)
            return in_full[:, num_prefix:].transpose(1, 2)
    return F.linear(x.to(dtype), weight)[:, num_prefix:].transpose(1, 2)


class _ProductsInFull(torch.autograd.Function):
    """x [B, T, D] of a low precision, weight [R, D] fp32 -> their products [B, T, R] in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, 1)
        return (grad @ weight).to(x.dtype), flat.t() @ x.flatten(0, 1).float()
