"""A card: pictures of one size in rows and columns, with a title, column heads and a legend."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from routedvit.drawing.pixels import Color, color_of, strength

AnyFont = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND: Color = (15, 19, 26)
TITLE: Color = (238, 241, 246)
CAPTION: Color = (152, 163, 180)


def compose(
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
    covered = strength(torch.linspace(0, 1, 6 * text))
    strip = torch.lerp(torch.full(size, 110.0), color_of(tint).expand(size), covered)
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
