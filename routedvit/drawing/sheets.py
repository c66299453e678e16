"""The sheets: a row per image, the image itself first and then what was made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from routedvit.drawing.card import compose
from routedvit.drawing.pixels import (
    SLATE,
    Color,
    Routing,
    as_divided,
    color_of,
    fit,
    gate_map,
    highlight,
)

TINTS: dict[str, Color] = {"ffn": (255, 176, 46), "q": (56, 201, 230), "kv": (236, 98, 190)}
PATHS = {"ffn": "heavy feed-forward", "q": "heavy queries", "kv": "heavy keys and values"}


def router_kind(router: str) -> str:
    """'ffn', 'q' or 'kv' of a router's name: 'kv0' and 'kv1' are routes of one kind."""
    return router.rstrip("0123456789")


def routing_sheet(
    images: Tensor,
    routing: Mapping[str, Routing],
    *,
    router: str = "ffn",
    title: str = "",
    size: int = 140,
    max_blocks: int = 12,
    patch: tuple[int, int] | None = None,
) -> Tensor:
    """The sheet of one router: a row per image, a column for the image and one per block.

    Args:
        images: uint8 [B, 3, H, W], as `denormalize` returns them.
        routing: what `model.routing(images)` returned; names end in '.q', '.kv0', '.ffn', ...
        router: which of them to draw.
        title: first line of the sheet, such as 'step 1200'.
        size: longer side of one picture in pixels, about.
        max_blocks: with more blocks than this, that many at even distances are drawn.
        patch: height and width of a patch in pixels; None: the patches fill the images.

    Returns:
        uint8 [3, H, W].

    Raises:
        ValueError: no router of that name; the text names those that exist.
    """
    blocks = {name[: -len(router) - 1]: r for name, r in routing.items() if _is(name, router)}
    if not blocks:
        known = sorted({name.rpartition(".")[2] for name in routing})
        raise ValueError(f"router={router!r} is not in this model; it has {', '.join(known)}")
    names = list(blocks)
    if len(names) > max_blocks:
        steps = torch.linspace(0, len(names) - 1, max_blocks).round().int().tolist()
        names = [names[i] for i in steps]
    tint = TINTS.get(router_kind(router), TINTS["ffn"])
    rows = []
    for i, image in enumerate(images):
        grids = {blocks[name].grid for name in names}
        fits = {grid: fit(as_divided(image, grid, patch), grid, size) for grid in grids}
        fitted = fits[blocks[names[0]].grid]
        row = [fitted]
        for name in names:
            block = blocks[name]
            picture = highlight(fits[block.grid], gate_map(block, i), tint)
            row.append(_resize_like(picture, fitted))
        rows.append(row)
    counts = sorted({blocks[name].indices.shape[1] for name in names})
    count = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    path = PATHS.get(router_kind(router), router)
    subtitle = f"tinted: {path}, {count} of {math.prod(blocks[names[0]].grid)} patches"
    columns = ["image", *(name.replace("blocks.", "block ") for name in names)]
    return compose(rows, columns, f"{title}  ·  {subtitle}" if title else subtitle, tint)


def reconstruction_sheet(
    images: Tensor,
    predictions: Tensor,
    visible: Tensor,
    grid: tuple[int, int],
    *,
    title: str = "",
    size: int = 140,
) -> Tensor:
    """What a masked autoencoder sees and makes of it: image, visible patches, reconstruction.

    Args:
        images: uint8 [B, 3, H, W].
        predictions: uint8 [B, 3, H, W]; shown where the image was hidden.
        visible: int64 [B, V], the patches that were not.
        grid: (H', W') patches.
        title: first line of the sheet.
        size: longer side of one picture in pixels, about.

    Returns:
        uint8 [3, H, W].
    """
    seen = torch.zeros(len(images), grid[0] * grid[1], dtype=torch.bool)
    seen = seen.scatter_(1, visible.cpu(), True).view(-1, 1, *grid)
    rows = []
    for image, prediction, mask in zip(images, predictions, seen, strict=True):
        true, told = fit(image, grid, size), fit(prediction, grid, size)
        height, width = true.shape[1] // grid[0], true.shape[2] // grid[1]
        shown = mask.repeat_interleave(height, 1).repeat_interleave(width, 2)
        hidden = color_of(SLATE).to(torch.uint8).expand_as(true)
        rows.append([true, torch.where(shown, true, hidden), torch.where(shown, true, told)])
    subtitle = f"{visible.shape[1]} of {math.prod(grid)} patches visible"
    columns = ["image", "visible", "reconstruction"]
    return compose(rows, columns, f"{title}  ·  {subtitle}" if title else subtitle, None)


def _is(name: str, router: str) -> bool:
    return name.rpartition(".")[2] == router


def _resize_like(picture: Tensor, other: Tensor) -> Tensor:
    """`picture` as uint8 in the size of `other` (blocks may differ in their grid)."""
    if picture.shape != other.shape:
        picture = F.interpolate(picture[None], other.shape[-2:], mode="nearest")[0]
    return picture.round().to(torch.uint8)
