"""Attention inside square windows of the token grid: what the light path runs on all tokens.

The reference moves the narrow queries, keys and values into windows and the output back, and gives
PyTorch's fused attention a mask where windows are padded. The kernel in its place reads a window
where its tokens lie: no copies, no padding, no mask, and nothing kept but its input.

Prefix tokens stand outside the grid: their window is themselves, so attention returns their own
value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from routedvit.ops.backend import uses_triton
from routedvit.ops.windows import (
    merge_windows,
    needs_padding,
    partition_windows,
    window_padding_mask,
)

__all__ = ["attention_among", "window_attention", "window_attention_reference"]

# Of the kernel, which holds a window and a head in registers; those of fp32 would not do.
MAX_TOKENS, MAX_HEAD_DIM = 64, 128
LOW_PRECISION = (torch.bfloat16, torch.float16)


def window_attention(
    qkv: Tensor, height: int, width: int, window: int, num_heads: int, num_prefix: int
) -> Tensor:
    """Each token attends to its own window, which need not divide the grid.

    Args:
        qkv: [B, P + N, 3 * heads * head_dim], the P prefix tokens before N = height * width patches
            in raster order; queries, keys and values one after the other.
        height, width: of the grid.
        window: side of a window, in patches.
        num_heads: heads.
        num_prefix: P.

    Returns:
        [B, P + N, heads * head_dim].
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
        if _fits(qkv, window, num_heads, num_prefix) and uses_triton(qkv):
            return torch.ops.routedvit.window_attention(
                qkv, height, width, window, num_heads, num_prefix
            )
    return window_attention_reference(qkv, height, width, window, num_heads, num_prefix)


def window_attention_reference(
    qkv: Tensor, height: int, width: int, window: int, num_heads: int, num_prefix: int
) -> Tensor:
    """`window_attention` in PyTorch, with sizes that may be symbolic."""
    mask: Tensor | None = None
    if needs_padding(height, width, window):
        mask = window_padding_mask(qkv.shape[0], height, width, window, qkv.device)
    windows = partition_windows(qkv[:, num_prefix:], height, width, window)
    out = merge_windows(_attend(windows, mask, num_heads), height, width, window)
    return _after_prefix(qkv, out, num_prefix)


def attention_among(qkv: Tensor, allowed: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    """Attention of any patches of a grid, who may look at whom being told.

    Args:
        qkv, num_heads, num_prefix: as in `window_attention`.
        allowed: [B, 1, N, N] bool, see `shared_windows`.

    Returns:
        [B, P + N, heads * head_dim].
    """
    return _after_prefix(qkv, _attend(qkv[:, num_prefix:], allowed, num_heads), num_prefix)


def _attend(qkv: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """qkv [B, N, 3 * heads * head_dim] -> [B, N, heads * head_dim]."""
    parts = qkv.unflatten(2, (3, num_heads, qkv.shape[2] // (3 * num_heads)))
    # the gradient of an unbind where the parts lie is one copy; permuted first, it would be two
    q, k, v = parts.unbind(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _after_prefix(qkv: Tensor, out: Tensor, num_prefix: int) -> Tensor:
    """The values of the prefix, then out."""
    if num_prefix == 0:
        return out
    return torch.cat([qkv[:, :num_prefix, -out.shape[2] :], out], 1)


def _fits(qkv: Tensor, window: int, num_heads: int, num_prefix: int) -> bool:
    """Whether the kernel takes it."""
    tokens, head_dim = max(window * window, num_prefix), qkv.shape[2] // (3 * num_heads)
    small = tokens <= MAX_TOKENS and head_dim <= MAX_HEAD_DIM
    return small and qkv.dtype in LOW_PRECISION
