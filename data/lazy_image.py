"""An image of which only the header has been read, decoded when it is known how much is needed.

JPEGs go through libjpeg-turbo by way of simplejpeg, about twice as fast as Pillow on the same
bytes; Pillow decodes everything else, and everything where simplejpeg is missing or finds fault, so
both accept and refuse the same samples. Formats and size were checked by `data.decode.open_image`.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from PIL import Image

from data.decode import MODE_OF_CHANNELS, is_jpeg, open_image
from data.errors import BadSample

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow's pixels are the same, only later
    simplejpeg = None

FACTORS = (8, 4, 2)  # at which a JPEG's own transform can be cut short
_COLORSPACE = {("L", 1): "GRAY", ("L", 3): "RGB", ("RGB", 3): "RGB"}


class LazyImage:
    """An encoded image in the model's channels (1 or 3). BadSample when it is none we accept."""

    def __init__(self, payload: bytes, channels: int, max_pixels: int) -> None:
        self.payload = payload
        self.channels = channels
        self.header = open_image(payload, max_pixels)
        self.size = self.header.size  # width, height

    def largest_factor(self, crop: tuple[int, int], wanted: tuple[int, int]) -> int:
        """By how much the image may be reduced so that `crop` keeps `wanted` pixels (h, w)."""
        if not is_jpeg(self.header):
            return 1
        room = min(crop[0] / wanted[0], crop[1] / wanted[1])
        return next((factor for factor in FACTORS if factor <= room), 1)

    def pixels(self, factor: int = 1) -> np.ndarray:
        """uint8 [ceil(H / factor), ceil(W / factor), C]. BadSample when it cannot be decoded."""
        fast = self._turbo(factor) if self._turbo_reads_it else None
        return self._pillow(factor) if fast is None else fast

    def pillow(self) -> Image.Image:
        """The whole image for Pillow, mode 'L' or 'RGB'."""
        return as_pillow(self.pixels())

    @cached_property
    def _turbo_reads_it(self) -> bool:
        known = (self.header.mode, self.channels) in _COLORSPACE
        if simplejpeg is None or not is_jpeg(self.header) or not known:
            return False
        try:
            height, width = simplejpeg.decode_jpeg_header(self.payload)[:2]
        except ValueError:
            return False
        return (width, height) == self.size  # of two headers Pillow may have checked the other one

    def _turbo(self, factor: int) -> np.ndarray | None:
        width, height = (-(-length // factor) for length in self.size)
        try:
            return simplejpeg.decode_jpeg(
                self.payload,
                _COLORSPACE[self.header.mode, self.channels],
                min_height=height,
                min_width=width,
                min_factor=factor,
            )
        except ValueError:
            return None

    def _pillow(self, factor: int) -> np.ndarray:
        try:
            if factor > 1:
                width, height = (max(1, side // factor) for side in self.size)
                self.header.draft(None, (width, height))
            pixels = np.array(self.header.convert(MODE_OF_CHANNELS[self.channels]))
        except Exception as error:  # as in data.decode: hostile bytes fail in many ways
            raise BadSample(f"cannot be decoded ({type(error).__name__}: {error})") from error
        return pixels.reshape(*pixels.shape[:2], self.channels)


def as_pillow(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, 1 or 3] -> mode 'L' or 'RGB'."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
