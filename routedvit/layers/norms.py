"""Rows of the heavy path, gathered and normalised on the way; an RMSNorm that is fast on CPUs."""

from typing import Any

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import RmsNorm as TimmRmsNorm
from torch import Tensor, nn

from routedvit.layers.wrapped import is_plain
from routedvit.ops import gather_all, gather_norm_all, rms_norm

__all__ = ["RmsNorm", "gather_rows"]


class RmsNorm(TimmRmsNorm):
    """timm's RMSNorm by `routedvit.ops.rms_norm`: few passes on a CPU, PyTorch's own elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> like x."""
        if self.weight is None or x.dtype != self.weight.dtype or x.device.type != "cpu":
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps)


FUSED = (nn.LayerNorm, TimmLayerNorm, TimmRmsNorm, RmsNorm)


def gather_rows(x: Tensor, indices: list[Tensor], norm: Any) -> tuple[Tensor, list[Tensor]]:
    """Rows for the heavy path: `norm` of those of x [B, N, D] at each index, [B, K] or [B, R, K].

    LayerNorm and RMSNorm are done by the kernel that gathers. Also returns x for whoever reads all
    of it next, see `routedvit.ops.gather_all`.
    """
    rms = isinstance(norm, TimmRmsNorm)
    if is_plain(norm, *FUSED) and norm.weight is not None:
        bias = None if rms else norm.bias
        return gather_norm_all(x, indices, norm.weight, bias, norm.eps, rms=rms)
    x, rows = gather_all(x, indices)
    return x, [norm(own) for own in rows]
