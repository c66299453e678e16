"""Positions that timm's `VisionTransformer` lacks: sin-cos, rotary with a prefix or per image."""

import torch
from timm.layers import build_sincos2d_pos_embed, register_notrace_function
from torch import Tensor

from routedvit.ops import gather_tokens

__all__ = ["add_sincos", "prefix_rope", "take_rope"]


@register_notrace_function
def add_sincos(x: Tensor, height: int, width: int) -> Tensor:
    """Add the fixed 2-d sin-cos table to x [B, ..., D] of H x W patches -> [B, N, D]."""
    table = build_sincos2d_pos_embed([height, width], x.shape[-1], device=x.device, dtype=x.dtype)
    return x.reshape(x.shape[0], -1, x.shape[-1]) + table


@register_notrace_function
def prefix_rope(table: Tensor, num_prefix: int) -> Tensor:
    """sin | cos table [N, 2 * head_dim] -> [P + N, ...]: the prefix rotates by nothing (0 | 1)."""
    sin, cos = table[:1].chunk(2, -1)
    still = torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], -1)
    return torch.cat([still.expand(num_prefix, -1), table], 0)


@register_notrace_function
def take_rope(rope: Tensor, index: Tensor) -> Tensor:
    """Rows [B, K] or [B, R, K] of a table that all images share, or of one table per image.

    rope [N, 2 * head_dim] or [B, N, 2 * head_dim] -> index.shape + [2 * head_dim].
    """
    return gather_tokens(rope, index) if rope.dim() == 3 else rope[index]
