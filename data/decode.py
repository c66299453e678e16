"""Encoded bytes to a Pillow image in the model's channels, and nothing else.

Pillow knows forty formats, some of which start other programs; what a file is called says nothing
about what it is. So the formats are an allow-list, the size is read from the header and refused
before a pixel is decoded, and whatever goes wrong marks the sample bad instead of ending the run.
A JPEG may have thousands of scans of ten bytes, each of which passes over all its pixels (20 kB at
50 megapixels took 53 s): they are counted first, 10 us for 80 kB.
"""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image

from data.errors import BadSample

EXTENSION_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
FORMATS = tuple(EXTENSION_OF_FORMAT)
MAX_PIXELS = 170_000_000  # for tools; Pillow itself refuses from 178,956,971 on
MAX_IMAGE_BYTES = 1 << 28  # encoded
MAX_SCANS = 100  # of a JPEG; encoders write some ten, and libjpeg-turbo's fuzzers allow 500
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG: a segment follows, or its end
MODE_OF_CHANNELS = {1: "L", 3: "RGB"}
# Deeper modes (I;16, I, F) convert to 8 bits by clipping, which whitens the image without a word.
EIGHT_BIT_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}
)

# `open_image` has a limit of its own. Set once and not around each image: whenever filters change
# Python forgets what it warned of, and would say of every image with odd EXIF that it is so.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def open_image(payload: bytes, max_pixels: int) -> Image.Image:
    """The image with only its header read. BadSample when it is not an image we accept."""
    try:
        image = Image.open(io.BytesIO(payload), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample(f"too many pixels: {error}") from error
    except Exception as error:  # parsers fail in many ways on hostile bytes; all mean the same
        raise BadSample(f"no JPEG, PNG or WebP image ({type(error).__name__})") from error
    if image.width * image.height > max_pixels:
        raise BadSample(f"{image.width} x {image.height} pixels; {max_pixels} are allowed")
    if image.mode not in EIGHT_BIT_MODES:
        raise BadSample(f"mode {image.mode} has more than 8 bits per channel; convert it first")
    if is_jpeg(image) and (scans := _scans(payload)) > MAX_SCANS:
        raise BadSample(f"a JPEG of {scans} scans; {MAX_SCANS} are allowed")
    return image


def _scans(payload: bytes) -> int:
    """The scans of a JPEG; where there cannot be too many, an upper bound for them.

    Coded bytes never look as a scan begins, but what phones keep behind a picture may: a film.
    """
    # `bytes.count` takes seven times as long
    pairs = (np.frombuffer(payload, "<u2", (len(payload) - at) // 2, at) for at in (0, 1))
    bound = sum(int(np.count_nonzero(found == 0xDAFF)) for found in pairs)  # the bytes FF DA
    return bound if bound <= MAX_SCANS else _scans_before_its_end(payload)


def _scans_before_its_end(payload: bytes) -> int:
    scans, at = 0, 2
    while (marker := _MARKER.search(payload, at)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(payload[marker.end() : marker.end() + 2])  # its segment
    return scans


def is_jpeg(image: Image.Image) -> bool:
    """Also an MPO, as phones write it: a JPEG with more pictures behind the first."""
    return image.format in ("JPEG", "MPO")


def extension_of(image: Image.Image) -> str:
    """jpg, png or webp: what the image is, whatever its file is called."""
    return EXTENSION_OF_FORMAT["JPEG" if is_jpeg(image) else image.format or ""]


def decode(payload: bytes, channels: int, max_pixels: int) -> Image.Image:
    """The decoded image: mode 'L' for 1 channel, 'RGB' for 3. BadSample when it cannot be."""
    return converted(open_image(payload, max_pixels), channels)


def converted(image: Image.Image, channels: int) -> Image.Image:
    """`decode`, from an image whose header has been read."""
    try:
        return image.convert(MODE_OF_CHANNELS[channels])
    except Exception as error:
        raise BadSample(f"cannot be decoded ({type(error).__name__}: {error})") from error
