"""Square windows over the token grid, by one reshape and one permutation.

    B images, H x W grid, windows of w x w, C channels:  x_BNC with N = H * W in raster order

A grid that the window does not divide is padded at the right and at the bottom;
`window_padding_mask` tells attention which keys are real. The top-left token of every window is
real, so no query is left without a key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "merge_windows",
    "needs_padding",
    "partition_windows",
    "shared_windows",
    "window_padding_mask",
]


def needs_padding(height: int, width: int, window: int) -> bool:
    """Whether the window leaves a remainder; True when export only knows the grid symbolically."""
    even = height % window + width % window == 0
    if torch.jit.is_scripting():
        return not even
    if torch.jit.is_tracing():  # a tensor; what is traced is for this grid
        return not bool(even)
    return not statically_known_true(even)


def partition_windows(x: Tensor, height: int, width: int, window: int) -> Tensor:
    """[B, H * W, C] -> [B * windows, w * w, C], windows in raster order, zeros where padded."""
    # rounded up without negative numbers: export formats disagree on how to divide those
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    batch, _, channels = x.shape
    x = x.reshape(batch, height, width, channels)
    if needs_padding(height, width, window):
        x = F.pad(x, (0, 0, 0, columns * window - width, 0, rows * window - height))
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(batch * rows * columns, window * window, channels)


def merge_windows(x: Tensor, height: int, width: int, window: int) -> Tensor:
    """Inverse of `partition_windows`: [B * windows, w * w, C] -> [B, H * W, C], padding dropped."""
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    batch, channels = x.shape[0] // (rows * columns), x.shape[-1]
    x = x.reshape(batch, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(batch, rows * window, columns * window, channels)
    if needs_padding(height, width, window):
        # pad by a negative amount, not slice: a slice may happen to be contiguous, and an export
        # that asked would be tied to grids without padding
        x = F.pad(x, (0, 0, 0, width - columns * window, 0, height - rows * window))
    return x.reshape(batch, height * width, channels)


def window_padding_mask(
    batch: int, height: int, width: int, window: int, device: torch.device
) -> Tensor:
    """[B * windows, 1, 1, w * w] bool, True where a key is a real token."""
    real = torch.ones(1, height * width, 1, dtype=torch.bool, device=device)
    windows = partition_windows(real, height, width, window)
    return windows.transpose(1, 2).unsqueeze(1).repeat(batch, 1, 1, 1)


def shared_windows(patches: Tensor, width: int, window: int) -> Tensor:
    """Which of some patches of a grid lie in one window: indices [B, N] -> bool [B, 1, N, N]."""
    row, column = patches // width // window, patches % width // window
    own = row * width + column
    return (own.unsqueeze(1) == own.unsqueeze(2)).unsqueeze(1)
