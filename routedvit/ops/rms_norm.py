"""RMSNorm in few passes over memory (Zhang and Sennrich, arXiv 1910.07467).

PyTorch has a fused kernel for GPUs only; on a CPU `F.rms_norm` and its gradient are a chain of some
twenty elementwise operators, each a pass over [..., D], and a routed model that norms its light and
its heavy rows apart spends more time in them than in its matrix products. Here it is three passes
forward and six backward: with r = 1 / rms(x), u = g * x,

    dw = sum r u,   dx = r (g * w) - r^3 (u . w) / D * x

where both sums over u are matrix-vector products. Left out: everything but a CPU in eager mode,
where PyTorch's own operator is at least as good, and low precision, whose squares may overflow.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops.backend import differentiates_itself
from routedvit.ops.double_backward import gradients_in_graph

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension.

    Args:
        x: [..., D].
        weight: [D], of the type of x.
        eps: added to the mean square.
    """
    if torch.jit.is_scripting():
        return _plain(x, weight, eps)
    if x.device.type != "cpu" or x.dtype.itemsize < 4 or differentiates_itself():
        return _plain(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def _plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *gradients_in_graph(partial(_plain, eps=ctx.eps), (x, weight), grads[0]), None
        grad, dim = grads[0].reshape(-1, x.shape[-1]), x.shape[-1]
        flat, scale = x.reshape(-1, dim), scale.reshape(-1, 1)
        product = grad * flat
        grad_weight = scale.view(-1) @ product
        shrink = (product @ weight).unsqueeze_(1).mul_(scale.pow(3)).div_(dim)
        out = torch.mul(grad, scale, out=product).mul_(weight).addcmul_(flat, shrink, value=-1)
        return out.view_as(x), grad_weight, None
