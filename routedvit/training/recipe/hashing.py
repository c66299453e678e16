"""Random numbers that follow from seed and sample position alone, on any rank, device and restart.

A generator would depend on what it drew before and on the rank that owns it. Here every (seed,
position, column) is hashed to an integer. Integer arithmetic only: 32 bits held in int64, so that
no product overflows.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIER = 0x045D9F3B


def hashed(position: Tensor, columns: int, *, seed: int) -> Tensor:
    """int64 [B, columns] of 32 random bits each, all different in a row, for position int64 [B]."""
    state = torch.full_like(position, seed & LOW)
    for part in (seed >> 32, position, position >> 32):
        state = _scramble(state ^ (part & LOW))
    return _scramble(state.unsqueeze(1) ^ torch.arange(columns, device=position.device))


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers whose outputs look random (T. Mueller's integer hash)."""
    for _ in range(2):
        x = ((x >> 16 ^ x) * MULTIPLIER) & LOW
    return x >> 16 ^ x
