"""Pictures of what the routers chose: which patches of an image took the heavy path.

One picture, the *sheet*, serves TensorBoard, the README and `python -m routedvit.visualize`: a row
per image, the image itself in the first column and one column per block. Patches on the heavy path
keep their detail, are tinted by their gate and outlined; the rest sinks into slate. The selection
stays visible where the image itself is black or white.

Any image size, patch grid (square or not) and 1 or 3 channels. torch computes pixels, PIL sets the
text. Nothing here knows a model: a routing is anything with `indices`, `gates` and `grid`.

Shapes: images [B, C, H, W]; indices, gates [B, k]; grid (H', W') patches; pictures uint8 [3, H, W].
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

Color = tuple[int, int, int]
AnyFont = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND: Color = (15, 19, 26)
SLATE: Color = (38, 47, 62)
TITLE: Color = (238, 241, 246)
CAPTION: Color = (152, 163, 180)
TINTS: dict[str, Color] = {"ffn": (255, 176, 46), "q": (56, 201, 230), "kv": (236, 98, 190)}
PATHS = {"ffn": "heavy feed-forward", "q": "heavy queries", "kv": "heavy keys and values"}


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
    light = 0.40 * gray + 0.60 * _color(SLATE)
    tinted = torch.lerp(pixels, _color(tint).expand_as(pixels), _strength(gates))
    picture = torch.where(heavy, tinted, light)
    return torch.where(_outline(heavy, max(1, max(height, width) // 96)), _color(tint), picture)


def _strength(gates: Tensor) -> Tensor:
    """How far the tint covers a patch: never so far that its content is lost."""
    return 0.06 + 0.30 * gates.nan_to_num(0).clamp(0, 1)


def _outline(heavy: Tensor, thickness: int) -> Tensor:
    """bool [H, W]: the inner rim, `thickness` pixels wide, of the region `heavy`."""
    outside = F.pad((~heavy).float(), (thickness,) * 4, value=1.0)
    return heavy & (F.max_pool2d(outside[None, None], 2 * thickness + 1, stride=1)[0, 0] > 0)


def _color(color: Color) -> Tensor:
    return torch.tensor(color, dtype=torch.float32).view(3, 1, 1)


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
    return _compose(rows, columns, f"{title}  ·  {subtitle}" if title else subtitle, tint)


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
        hidden = _color(SLATE).to(torch.uint8).expand_as(true)
        rows.append([true, torch.where(shown, true, hidden), torch.where(shown, true, told)])
    subtitle = f"{visible.shape[1]} of {math.prod(grid)} patches visible"
    columns = ["image", "visible", "reconstruction"]
    return _compose(rows, columns, f"{title}  ·  {subtitle}" if title else subtitle, None)


def _is(name: str, router: str) -> bool:
    return name.rpartition(".")[2] == router


def _resize_like(picture: Tensor, other: Tensor) -> Tensor:
    """`picture` as uint8 in the size of `other` (blocks may differ in their grid)."""
    if picture.shape != other.shape:
        picture = F.interpolate(picture[None], other.shape[-2:], mode="nearest")[0]
    return picture.round().to(torch.uint8)


def _compose(
    rows: Sequence[Sequence[Tensor]], columns: Sequence[str], title: str, tint: Color | None
) -> Tensor:
    """Tiles of equal size on a dark card with a title, column heads and the legend of a gate."""
    height, width = rows[0][0].shape[-2:]
    text = min(18, max(14, round(width / 9)))
    gap, margin = max(4, width // 24), max(10, width // 9)
    head = margin + round(1.5 * text) + gap + round(1.3 * text)
    legend = round(1.6 * text) if tint else 0
    tiles_width = len(columns) * (width + gap)  # the input stands one more gap apart
    card_width = 2 * margin + max(tiles_width, 14 * text)
    card_height = head + len(rows) * (height + gap) + legend + margin
    card = Image.new("RGB", (card_width, card_height), BACKGROUND)
    draw = ImageDraw.Draw(card)
    font = ImageFont.load_default(text)
    title_font = _font_that_fits(title, text + 2, card_width - 2 * margin)
    draw.text((margin, margin), title, TITLE, title_font)

    def left(column: int) -> int:
        return margin + column * (width + gap) + (gap if column else 0)

    for column, name in enumerate(columns):
        draw.text((left(column), head - round(1.4 * text)), name, CAPTION, font)
    for r, row in enumerate(rows):
        for column, tile in enumerate(row):
            card.paste(to_pil(tile), (left(column), head + r * (height + gap)))
    if tint:
        _draw_legend(card, (margin, card_height - margin - text), text, tint)
    pixels = torch.frombuffer(bytearray(card.tobytes()), dtype=torch.uint8)
    return pixels.view(card_height, card_width, 3).permute(2, 0, 1).contiguous()


def _font_that_fits(text: str, size: int, width: int) -> AnyFont:
    """The default font at `size`, or smaller so that `text` fits into `width` pixels."""
    font = ImageFont.load_default(size)
    return ImageFont.load_default(max(8, int(size * min(1.0, width / font.getlength(text)))))


def _draw_legend(card: Image.Image, position: tuple[int, int], text: int, tint: Color) -> None:
    """'gate 0 [colours] 1' at `position`, on the mid-grey that a patch might have."""
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(text)
    x, y = position
    draw.text((x, y), "gate 0", CAPTION, font)
    x += round(font.getlength("gate 0")) + text // 2
    size = (3, text, 6 * text)
    strength = _strength(torch.linspace(0, 1, 6 * text))
    strip = torch.lerp(torch.full(size, 110.0), _color(tint).expand(size), strength)
    card.paste(to_pil(strip.byte()), (x, y + text // 6))
    draw.text((x + 6 * text + text // 2, y), "1", CAPTION, font)


def to_png(picture: Tensor) -> bytes:
    """A PNG file of uint8 [3, H, W], written for speed rather than for size."""
    file = io.BytesIO()
    to_pil(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def to_pil(picture: Tensor) -> Image.Image:
    """A PIL image from uint8 [3, H, W]."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
