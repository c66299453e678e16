"""Scores of tokens for their routers: dot products in fp32, whatever type the tokens have.

A router is one vector, so this is a matrix-vector product: it is worth no more than the read of its
tokens. In PyTorch that takes an fp32 copy of bf16 tokens for each router, kept for the backward
pass: more memory than the rest of the block saves. The kernel casts in registers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops.backend import uses_triton

__all__ = ["router_logits"]


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
        return _products(x, weight, scale, num_prefix)
    if uses_triton(x):
        return torch.ops.routedvit.router_logits(x, weight, scale, num_prefix)
    with torch.autocast(x.device.type, enabled=False):
        return _products(x, weight, scale, num_prefix)


def _products(x: Tensor, weight: Tensor, scale: float, num_prefix: int) -> Tensor:
    """The prefix is cut off the narrow result: cutting it off x would copy all of x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype) * scale)[:, num_prefix:].transpose(1, 2)
