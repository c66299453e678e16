"""Which patches masked autoencoding shows: at random, yet a function of seed and sample alone.

A generator would depend on what it drew before and on the rank that owns it. Here every (seed,
sample, patch) is hashed to an integer and the patches with the smallest ones stay visible, so a run
masks its samples alike on any number of ranks, any device and after a resume. Integer arithmetic
only: 32 bits held in int64, so that no product overflows.
"""

import torch
from torch import Tensor

__all__ = ["visible_patches"]

LOW = 0xFFFFFFFF
MULTIPLIER = 0x045D9F3B


def visible_patches(position: Tensor, *, num_patches: int, num_visible: int, seed: int) -> Tensor:
    """int64 [B, num_visible] ascending: a uniform draw without replacement for each sample.

    Args:
        position: int64 [B], what the draw of a sample depends on besides the seed.
    """
    state = torch.full_like(position, seed & LOW)
    for part in (seed >> 32, position & LOW, position >> 32):
        state = _scramble(state ^ (part & LOW))
    patches = torch.arange(num_patches, device=position.device)
    # one-to-one for each sample, so that no two patches of it are equal
    noise = _scramble(state.unsqueeze(1) ^ patches)
    return noise.argsort(1)[:, :num_visible].sort(1).values


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers whose outputs look random (T. Mueller's integer hash)."""
    for _ in range(2):
        x = ((x >> 16 ^ x) * MULTIPLIER) & LOW
    return x >> 16 ^ x
