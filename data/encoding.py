"""What becomes of an image on its way into a shard; by default nothing: its bytes are copied.

Each image is decoded once, whether or not it is encoded anew: a photograph that was cut while it
was copied looks whole from its header, and would cost training a sample in every epoch. JPEGs are
decoded at an eighth of their size, which reads every coded byte. On one core of an AMD EPYC, for
500 x 375 pixels: JPEG 0.4 ms (1.5 progressive), WebP 2.7 ms, PNG 5.0 ms; ImageNet-1k 9 minutes.

What an image is called says nothing: its extension in the shard follows from its content. Where it
is encoded anew it is turned upright, since the EXIF tag by which phones say how they were held is
lost. So that a set lies one way, --resize and --encode encode whatever the tag would turn; without
them it is copied and, as in torchvision and timm, trains as it lies.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps

from data.decode import EXTENSION_OF_FORMAT, MAX_PIXELS, extension_of, open_image
from data.errors import BadSample
from data.lazy_image import FACTORS, LazyImage

FORMAT_OF_EXTENSION = {extension: name for name, extension in EXTENSION_OF_FORMAT.items()}


class Encoded(NamedTuple):
    """One image as it goes into a shard."""

    extension: str  # png, jpg or webp
    payload: bytes


@dataclass(frozen=True)
class Encoding:
    """What is done to an image before it is stored."""

    resize: int | None = None  # pixels of the shorter side; smaller images keep their size
    kind: str | None = None  # encode anew as jpg, png or webp; None: only what shrinks or turns
    quality: int = 90

    def apply(self, payload: bytes) -> Encoded:
        """The image as it goes into the shard. BadSample when it is none that can be read back."""
        image = open_image(payload, MAX_PIXELS)
        shrink = self.resize is not None and min(image.size) > self.resize
        turn = (self.resize or self.kind) is not None and _lies(image)
        if not (shrink or turn) and self.kind in (None, extension_of(image)):
            LazyImage(payload, 3, MAX_PIXELS).pixels(FACTORS[0])
            return Encoded(extension_of(image), payload)
        try:
            return self._encoded(image, shrink)
        except Exception as error:  # as in data.decode: hostile bytes fail in many ways
            raise BadSample(f"cannot be decoded ({type(error).__name__}: {error})") from error

    def _encoded(self, image: Image.Image, shrink: bool) -> Encoded:
        kind = self.kind or extension_of(image)
        size = image.size
        if shrink and self.resize is not None:
            scale = self.resize / min(size)
            size = (round(size[0] * scale), round(size[1] * scale))
            # a JPEG is decoded at half or a quarter of its size while that is above the one wanted
            image.draft(None, size)
        pixels = image.convert("L" if image.mode in ("L", "1") else "RGB")
        if pixels.size != size:
            pixels = pixels.resize(size, Image.Resampling.BICUBIC)
        pixels = _upright(pixels)
        buffer = io.BytesIO()
        pixels.save(buffer, format=FORMAT_OF_EXTENSION[kind], quality=self.quality)
        return Encoded(kind, buffer.getvalue())


def _lies(image: Image.Image) -> bool:
    """Whether `_upright` would turn it."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # as there
        return False


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says; as it is where that cannot be read, which damages no pixel."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # parsers fail in many ways on hostile bytes
        return image
