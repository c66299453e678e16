"""The pixels of one picture: an image in the size of its grid, and its heavy patches highlighted.

Patches on the heavy path keep their detail, are tinted by their gate and outlined; the rest sinks
into slate. The selection stays visible where the image itself is black or white.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Color = tuple[int, int, int]

SLATE: Color = (38, 47, 62)


class Routing(Protocol):
    """The part of `model.routing(images)[name]` that a picture needs."""

    @property
    def indices(self) -> Tensor:
        """int64 [B, k]: the selected patches, prefix tokens not counted."""

    @property
    def gates(self) -> Tensor:
        """float [B, k] in [0, 1]."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 3, H, W] from images normalised with `mean` and `std` (one value per channel)."""
    images = images.detach().float().cpu()
    shape = (1, -1, 1, 1)
    pixels = images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def gate_map(routing: Routing, row: int) -> Tensor:
    """float [H', W']: the gate where a patch of image `row` took the heavy path, else NaN."""
    height, width = routing.grid
    gates_N = torch.full((height * width,), math.nan)
    gates_N[routing.indices[row].cpu()] = routing.gates[row].detach().float().cpu()
    return gates_N.view(height, width)


def as_divided(image: Tensor, grid: tuple[int, int], patch: tuple[int, int] | None) -> Tensor:
    """What of `image` [3, H, W] the patches are: a border that fills none is not seen, and one that
    was filled up (timm's dynamic_img_pad) is black.
    """
    if patch is None:
        return image
    rows, columns = (n * side for n, side in zip(grid, patch, strict=True))
    return F.pad(image, (0, columns - image.shape[-1], 0, rows - image.shape[-2]))


def fit(image: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """`image` resized so that its longer side is about `size` and every patch has whole pixels.

    Enlarging twice or more goes by a whole factor, which keeps pixels crisp (a 28 px digit stays
    a digit); all else is bicubic with antialiasing.
    """
    rows, columns = grid
    height, width = image.shape[-2:]
    factor = size // max(height, width)
    if factor > 1 and height % rows == 0 and width % columns == 0:
        return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    scale = size / max(height, width)
    target = tuple(
        n * max(1, round(side * scale / n)) for n, side in ((rows, height), (columns, width))
    )
    resized = F.interpolate(image[None].float(), target, mode="bicubic", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def highlight(image: Tensor, gates: Tensor, tint: Color) -> Tensor:
    """`image` with the patches that have a gate tinted and outlined, the others dimmed.

    Args:
        image: uint8 [3, H, W] whose sides are multiples of the grid, as `fit` returns it.
        gates: float [H', W'], NaN for patches on the light path only (`gate_map`).
        tint: colour of the heavy path; its strength grows with the gate.
    """
    height, width = image.shape[-2:]
    gates = gates.repeat_interleave(height // gates.shape[0], 0)
    gates = gates.repeat_interleave(width // gates.shape[1], 1)
    heavy = ~gates.isnan()
    pixels = image.float()
    gray = pixels.mean(0, keepdim=True)
    light = 0.40 * gray + 0.60 * color_of(SLATE)
    tinted = torch.lerp(pixels, color_of(tint).expand_as(pixels), strength(gates))
    picture = torch.where(heavy, tinted, light)
    return torch.where(_outline(heavy, max(1, max(height, width) // 96)), color_of(tint), picture)


def strength(gates: Tensor) -> Tensor:
    """How far the tint covers a patch: never so far that its content is lost."""
    return 0.06 + 0.30 * gates.nan_to_num(0).clamp(0, 1)


def _outline(heavy: Tensor, thickness: int) -> Tensor:
    """bool [H, W]: the inner rim, `thickness` pixels wide, of the region `heavy`."""
    outside = F.pad((~heavy).float(), (thickness,) * 4, value=1.0)
    return heavy & (F.max_pool2d(outside[None, None], 2 * thickness + 1, stride=1)[0, 0] > 0)


def color_of(color: Color) -> Tensor:
    return torch.tensor(color, dtype=torch.float32).view(3, 1, 1)
