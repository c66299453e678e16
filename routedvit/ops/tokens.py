"""Rows out, rows in: gather the routed tokens, add what became of them to where they came from.

    B images, N tokens, K routed tokens, D width:  x_BND, index_BK

Both work on the flat [B * N, D] view: on a CPU `index_select` / `index_add` there run 2 to 4 times
faster than `gather` / `scatter_add` with an expanded index. Indices are unique within an image, so
the sums have one term each and are bitwise reproducible on every device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gather_tokens", "prepend_prefix", "scatter_add_tokens"]


def _flat_index(index: Tensor, num_tokens: int) -> Tensor:
    """[B, K] indices within an image -> [B * K] rows of the flat [B * N, D] view."""
    offset = torch.arange(index.shape[0], device=index.device) * num_tokens
    return (index + offset.unsqueeze(1)).flatten()


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, D], index [B, K] int64 -> x[b, index[b]], [B, K, D]."""
    batch, num_tokens, dim = x.shape
    rows = x.reshape(batch * num_tokens, dim).index_select(0, _flat_index(index, num_tokens))
    return rows.view(batch, index.shape[1], dim)


def scatter_add_tokens(base: Tensor, index: Tensor, rows: Tensor, gate: Tensor) -> Tensor:
    """base [B, N, D] with gate * rows added at `index`.

    Args:
        base: [B, N, D].
        index: [B, K] int64, unique within an image.
        rows: [B, K, D] of the type of base.
        gate: [B, K], one factor per row, cast to the type of base.
    """
    batch, num_tokens, dim = base.shape
    weighted = (rows * gate.unsqueeze(-1).to(rows.dtype)).reshape(-1, dim)
    flat = base.reshape(batch * num_tokens, dim).index_add(
        0, _flat_index(index, num_tokens), weighted
    )
    return flat.view(batch, num_tokens, dim)


def prepend_prefix(index: Tensor, gate: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Make the prefix tokens (cls, registers) heavy: first, with gate 1, outside every capacity.

    Args:
        index: [..., k] patch indices, 0 = first patch.
        gate: [..., k] their gates.
        num_prefix: number of prefix tokens P in front of the patches.

    Returns:
        token indices and gates, [..., P + k] each.
    """
    if num_prefix == 0:
        return index, gate
    prefix = F.pad(torch.arange(num_prefix, device=index.device), (0, index.shape[-1]))
    index = F.pad(index + num_prefix, (num_prefix, 0)) + prefix
    return index, F.pad(gate, (num_prefix, 0), value=1.0)
