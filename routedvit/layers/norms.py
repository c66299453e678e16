"""Norms of routed rows: which of them the gather can do on the way, and RMSNorm fast on a CPU."""

from typing import Any

import torch
from timm import layers as timm_layers
from timm.layers import register_notrace_function
from torch import Tensor, nn

from routedvit.ops import gather_norm, rms_norm

__all__ = ["RmsNorm", "fuses_with_gather", "gather_normalised"]

register_notrace_function(gather_norm)


class RmsNorm(timm_layers.RmsNorm):
    """timm's RMSNorm by `routedvit.ops.rms_norm`: few passes on a CPU, PyTorch's own elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> like x."""
        if self.weight is None or x.dtype != self.weight.dtype or x.device.type != "cpu":
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps)


def fuses_with_gather(norm: nn.Module) -> bool:
    """Whether `routedvit.ops.gather_norm` computes this norm: LayerNorm or RMSNorm with a scale."""
    return isinstance(norm, nn.LayerNorm | timm_layers.RmsNorm) and norm.weight is not None


def gather_normalised(x: Tensor, index: Tensor, norm: Any) -> Tensor:
    """`norm` of the rows of x [B, N, D] at index [B, K] or [B, R, K], by one kernel on a GPU."""
    rms = not isinstance(norm, nn.LayerNorm)
    bias = None if rms else norm.bias
    return gather_norm(x, index, norm.weight, bias, norm.eps, rms=rms)
