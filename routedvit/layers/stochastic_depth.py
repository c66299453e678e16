"""Stochastic depth that computes only what it keeps (DINOv2, arXiv 2304.07193, section 5).

timm's drop-path computes a sublayer for all images and then zeroes some of what it added. Here a
sublayer is given the images that it keeps; the others pass by on the residual. Compute and saved
activations fall by the drop rate. How many are kept is fixed, only which is drawn, so shapes are
static: nothing waits for the host, nothing is compiled twice, and every rank runs every sublayer,
as ZeRO-3 needs it. The price: rates are rounded to whole images of the micro-batch.

To the operators that move tokens, a batch is one image of B tokens, each N * D wide.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from routedvit.ops import gather_all, scatter_add_tokens

__all__ = ["add_to_kept_images", "num_kept"]


def num_kept(batch: int, drop_prob: float) -> int:
    """How many of `batch` images a sublayer with this drop rate computes: at least one."""
    return max(1, round(batch * (1 - drop_prob)))


def add_to_kept_images(
    x: Tensor, drop_prob: float, update: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """x [B, N, D] with B / K times an update added to K of its images, drawn uniformly.

    Args:
        x: [B, N, D].
        drop_prob: share of the images to leave as they are, in [0, 1).
        update: given K images [K, N, D] and which they are, int64 [K], ascending: what to add,
            [K, N, D]. Its factor B / K keeps the expectation, like timm's `scale_by_keep`.
    """
    batch = int(x.shape[0])  # a tensor to torch.jit.trace
    count = num_kept(batch, drop_prob)
    if count >= batch:  # of no images none
        return x + update(x, torch.arange(batch, device=x.device))
    kept = torch.randperm(batch, device=x.device)[:count].sort().values
    index = kept.unsqueeze(0)
    whole, rows = gather_all(x.reshape(1, batch, -1), [index])
    added = update(rows[0].view(count, *x.shape[1:]), kept).to(x.dtype)
    scale = torch.full((1, count), batch / count, device=x.device)
    return scatter_add_tokens(whole, index, added.reshape(1, count, -1), scale).view(x.shape)
