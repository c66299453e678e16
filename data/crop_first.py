"""timm's training transform, with the crop chosen before a pixel is decoded.

timm decodes, then crops, then resizes. Here the crop is drawn first, from the size in the header:
the same draws in the same order, so a position gets the same crop, flip and policy either way. Then

1. a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop keeps the pixels it needs;
2. torch resizes the crop (its uint8 kernel is about four times as fast as Pillow's);
3. the bytes go to the device as they are, a quarter of what floats would be, and are normalised
   there; only erasing, which timm does on floats, has them normalised here.

What lies between (RandAugment, jitter, ...) and random erasing are timm's own. Transforms that do
not begin with a random resized crop get the whole image. Differences to timm's pixels are bounded
in tests/unit/data/test_crop_first.py; `data.decode: exact` is timm's own path to the letter.
"""

from __future__ import annotations

import random
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode, Normalize
from torchvision.transforms import RandomHorizontalFlip as HorizontalFlip
from torchvision.transforms import RandomVerticalFlip as VerticalFlip
from torchvision.transforms.functional import pil_modes_mapping

from data.lazy_image import LazyImage, as_pillow
from data.transforms import Transform

_PILLOW_MODE = pil_modes_mapping
_TORCH_MODE = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}


class FromEncoded(Protocol):
    """An image still encoded -> normalised float32 [C, H, W], or bytes that are to be normalised.

    levels: None for floats, else (scale, shift) [C, 1, 1]: bytes * scale - shift is what is meant.
    """

    levels: tuple[torch.Tensor, torch.Tensor] | None

    def __call__(self, image: LazyImage) -> torch.Tensor: ...


def from_encoded(transform: Transform, decode: str) -> FromEncoded:
    """`transform` (of Pillow images) for images still encoded; `decode` is 'fast' or 'exact'."""
    steps = getattr(transform, "transforms", [])
    if decode == "fast" and steps and isinstance(steps[0], RandomResizedCropAndInterpolation):
        return CropFirst(steps)
    return _Whole(transform)


class _Whole:
    """The transform of the whole image."""

    levels: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, image: LazyImage) -> torch.Tensor:
        return self.transform(image.pillow())


class CropFirst:
    """A random resized crop, any steps on bytes; where steps on floats follow, to floats first."""

    def __init__(self, steps: list[Any]) -> None:
        border = next(n for n, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        normalize = steps[border + 1]
        assert isinstance(normalize, Normalize)
        self.crop = steps[0]
        self.on_bytes = steps[1:border]
        self.on_floats = steps[border + 2 :]
        self.flips_only = all(isinstance(s, HorizontalFlip | VerticalFlip) for s in self.on_bytes)
        mean, std = (
            torch.as_tensor(values).view(-1, 1, 1) for values in (normalize.mean, normalize.std)
        )
        self.scale, self.shift = 1 / (255 * std), mean / std
        self.levels = None if self.on_floats else (self.scale, self.shift)

    def __call__(self, image: LazyImage) -> torch.Tensor:
        pixels = self._cropped(image)
        if self.flips_only:
            for step in self.on_bytes:
                pixels = step(pixels)
        elif self.on_bytes:
            picture = as_pillow(pixels.permute(1, 2, 0).numpy())
            for step in self.on_bytes:
                picture = step(picture)
            pixels = _channels_first(np.asarray(picture))
        if self.levels is not None:
            return pixels
        floats = torch.empty(pixels.shape).copy_(pixels).mul_(self.scale).sub_(self.shift)
        for step in self.on_floats:
            floats = step(floats)
        return floats

    def _cropped(self, image: LazyImage) -> torch.Tensor:
        """uint8 [C, *size], a random crop of the image resized."""
        size = self.crop.size
        # timm asks a Pillow image for its size alone, and the header knows it
        drawn = self.crop.get_params(image.header, self.crop.scale, self.crop.ratio)
        top, left, height, width = _with_a_pixel(drawn, image.size[::-1])
        mode = self.crop.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        factor = image.largest_factor((height, width), size)
        pixels = image.pixels(factor)
        if factor > 1:  # the crop's borders fall between pixels, which torch cannot express
            rows, columns = pixels.shape[:2]
            right, bottom = (left + width) / factor, (top + height) / factor
            box = (left / factor, top / factor, min(right, columns), min(bottom, rows))
            resized = as_pillow(pixels).resize(size[::-1], _PILLOW_MODE[mode], box)
            return _channels_first(np.asarray(resized))
        pixels = pixels[top : top + height, left : left + width]
        if mode in _TORCH_MODE:
            return torch.nn.functional.interpolate(
                _channels_first(pixels)[None], size, mode=_TORCH_MODE[mode], antialias=True
            )[0]
        return _channels_first(np.asarray(as_pillow(pixels).resize(size[::-1], _PILLOW_MODE[mode])))


def _with_a_pixel(
    crop: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) that holds a pixel at least, inside an image of `size` (h, w).

    timm rounds what it draws, in images of up to three pixels also to nothing.
    """
    top, left, height, width = crop
    height, width = max(1, height), max(1, width)
    return min(top, size[0] - height), min(left, size[1] - width), height, width


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W] or [H, W, C] -> [C, H, W], without a copy where the array may be written."""
    array = pixels if pixels.flags.writeable else pixels.copy()
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
