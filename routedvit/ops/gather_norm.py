"""Gather of routed tokens fused with their normalisation: what a heavy path with a norm of its own
reads.

A heavy path that shares the light path's norm gathers normalised tokens instead (`gather_tokens`),
which is cheaper still: the norm is paid once. Fused, the gathered rows are never written between
the two steps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops.backend import uses_triton
from routedvit.ops.fused_tokens import fuses
from routedvit.ops.rms_norm import rms_norm
from routedvit.ops.tokens import gather_all, gather_tokens

__all__ = ["gather_norm", "gather_norm_all"]


def gather_norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
) -> Tensor:
    """LayerNorm, or RMSNorm, of the gathered rows.

    Args:
        x: [B, N, D].
        index: [B, K] or [B, R, K], as in `gather_tokens`.
        weight: [D].
        bias: [D] or None; RMSNorm has none.
        eps: added to the variance, or to the mean square.
        rms: RMSNorm.

    Returns:
        [B, K, D] or [B, R, K, D], of the type of x.

    Raises:
        ValueError: a bias with rms=True.
    """
    if rms and bias is not None:
        raise ValueError("bias must be None with rms=True: RMSNorm has none")
    if uses_triton(x) and not fuses(x):
        routes = index if index.ndim == 3 else index.unsqueeze(1)
        rows = torch.ops.routedvit.gather_norm(x, routes, weight, bias, eps, rms)
        return rows if index.ndim == 3 else rows.squeeze(1)
    return _normalise(gather_tokens(x, index), weight, bias, eps, rms)


def gather_norm_all(
    x: Tensor,
    indices: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`gather_norm` at each of `indices`, and x for its next reader, as in `gather_all`."""
    if uses_triton(x) and not fuses(x):
        return x, [gather_norm(x, index, weight, bias, eps, rms=rms) for index in indices]
    x, rows = gather_all(x, indices)
    return x, [_normalise(own, weight, bias, eps, rms) for own in rows]


def _normalise(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    if rms and rows.dtype != weight.dtype:  # fp32 weights in autocast
        return F.rms_norm(rows.float(), weight.shape, weight.float(), eps).to(rows.dtype)
    if rms:
        return rms_norm(rows, weight, eps).to(rows.dtype)
    return F.layer_norm(rows, weight.shape, weight, bias, eps).to(rows.dtype)
