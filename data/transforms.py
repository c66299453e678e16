"""Image transforms: timm's, a light one for digits, and the random state they draw from.

timm's transforms draw from three global generators (Python, numpy, torch). Each sample seeds all
three from (seed, position) before it is transformed, so that the augmentation of a position is the
same on any world, with any number of workers and after any resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms

from data.config import AugmentConfig
from data.errors import DataError

Transform = Callable[[Image.Image], torch.Tensor]


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, but one bit stays: magnitude 10 keeps none, which Pillow refuses since 13."""
    return auto_augment.posterize(image, max(1, bits_to_keep))


# every policy looks its operations up here
auto_augment.NAME_TO_OP |= {
    name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")
}


def train_transform(
    augment: AugmentConfig,
    *,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
) -> Transform:
    """Pillow image -> normalised float32 [C, *size], augmented.

    DataError for a policy that timm does not know.
    """
    check_policy(augment)
    interpolation = augment.interpolation or interpolation
    if augment.mode == "timm":
        return create_transform(
            size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            # 0 would jitter by nothing, at a price; timm takes None and does not say so
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
            grayscale_prob=augment.grayscale_prob,
            gaussian_blur_prob=augment.gaussian_blur_prob,
            auto_augment=augment.auto_augment,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=augment.re_prob,
            re_mode=augment.re_mode,
            re_count=augment.re_count,
        )
    plain = create_transform(
        size, is_training=True, no_aug=True, interpolation=interpolation, mean=mean, std=std
    )
    if augment.mode == "none":
        return plain
    wiggle = transforms.RandomAffine(
        augment.rotate,
        translate=(augment.translate, augment.translate),
        scale=augment.zoom,
        shear=augment.shear,
        interpolation=transforms.InterpolationMode.BILINEAR,
    )
    return transforms.Compose([wiggle, plain])


def check_policy(augment: AugmentConfig) -> None:
    """Refuse a `data.augment.auto_augment` that timm cannot read."""
    policy = augment.auto_augment
    if not policy:
        return
    try:
        transform = create_transform(32, is_training=True, auto_augment=policy)
        with borrowed_generators():  # 'augmix-a0' fails when it is called
            transform(Image.new("RGB", (32, 32)))
    except (AssertionError, ValueError) as error:  # timm asserts the sections of a policy
        raise DataError(
            f"data.augment.auto_augment = {policy!r} is no policy of timm"
            f"{f' ({error})' if str(error) else ''}; write one such as 'rand-m9-mstd0.5-inc1', "
            "'augmix-m3-w3', '3a' or 'original', or null for none"
        ) from error


def eval_transform(
    *,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_pct: float,
) -> Transform:
    """Pillow image -> normalised float32 [C, *size]: resize to size / crop_pct, centre crop."""
    return create_transform(
        size,
        is_training=False,
        interpolation="bilinear" if interpolation == "random" else interpolation,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
    )


def sample_seeds(seed: int, positions: np.ndarray) -> np.ndarray:
    """One 64-bit seed per position (uint64 [n]): SplitMix64 of the seed, then of the position."""
    with np.errstate(over="ignore"):
        base = _split_mix(np.array([seed], dtype=np.uint64))
        return _split_mix(base + positions.astype(np.uint64))


def _split_mix(words: np.ndarray) -> np.ndarray:
    # Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def seed_generators(state: int) -> None:
    """Seed the three global generators. Not torch.manual_seed: that queues work for CUDA too."""
    random.seed(state)
    np.random.seed(state & 0xFFFFFFFF)
    torch.default_generator.manual_seed(state & 0x7FFFFFFFFFFFFFFF)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Give the three global generators back as they were: dropout must not follow the data."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
