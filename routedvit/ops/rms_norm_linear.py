"""RMSNorm and a linear layer in one (Zhang and Sennrich, arXiv 1910.07467).

    y = s * z + b,   z = x (W diag(g))^T,   s = 1 / rms(x)

The norm divides the output, so normalised tokens are neither written nor differentiated. With u the
gradient of y, all that the norm adds to that of a linear layer is narrow or a single pass:

    dx = (s u) W diag(g) - s^2 / D (u . s z) x
    F = (s u)^T x,   dW = F diag(g),   dg = sum of F * W over the outputs

and the pass over x is what the product then adds to.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops.backend import differentiates_itself
from routedvit.ops.double_backward import gradients_in_graph

__all__ = ["rms_norm_linear"]


def rms_norm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """linear(x / rms(x) * norm_weight).

    Args:
        x: [..., D].
        norm_weight: [D].
        weight: [E, D].
        bias: [E] or None.
        eps: added to the mean square.

    Returns:
        [..., E].
    """
    if x.is_meta or x.dtype != weight.dtype or differentiates_itself():
        return _plain(x, norm_weight, weight, bias, eps)
    if torch.is_autocast_enabled(x.device.type):
        return _plain(x, norm_weight, weight, bias, eps)
    return _RmsNormLinear.apply(x, norm_weight, weight, bias, eps)


def _plain(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    y = F.linear(x, weight * norm_weight)
    # fp16 ends at 65,504, and times infinity a row of zeros would be NaN
    scale = _inverse_rms(x, eps).clamp(max=torch.finfo(y.dtype).max).to(y.dtype)
    return y * scale if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return (length.square() / x.shape[-1] + eps).rsqrt()


class _RmsNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = _inverse_rms(flat, eps)  # fp32 also beside bf16, which is what is then rounded
        y = (flat @ (weight * norm_weight).t()).mul_(scale)
        ctx.save_for_backward(x, norm_weight, weight, scale, y)
        ctx.has_bias, ctx.eps = bias is not None, eps
        return (y if bias is None else y + bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, norm_weight, weight, scale, y = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        if torch.is_grad_enabled():  # create_graph=True
            plain = partial(_plain, bias=None, eps=ctx.eps)
            found = gradients_in_graph(plain, (whole, norm_weight, weight), grads[0])
            return *found, grad.sum(0) if ctx.has_bias else None, None
        x = whole.reshape(-1, whole.shape[-1])
        dot = (grad * y).sum(-1, keepdim=True, dtype=scale.dtype)
        shrink = dot.mul_(scale.square()).div_(-x.shape[-1])
        grad_bias = grad.sum(0) if ctx.has_bias else None
        scaled = torch.mul(grad, scale, out=torch.empty_like(grad))
        grad_x = torch.mul(x, shrink, out=torch.empty_like(x))
        grad_x.addmm_(scaled, weight * norm_weight)
        grad_folded = scaled.t() @ x
        grad_norm = (grad_folded * weight).sum(0)
        return grad_x.view(whole.shape), grad_norm, grad_folded.mul_(norm_weight), grad_bias, None
