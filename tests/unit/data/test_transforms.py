"""Augmentation follows (seed, position), works on grey images, and leaves other draws alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from data.config import AugmentConfig
from data.errors import DataError
from data.transforms import (
    borrowed_generators,
    eval_transform,
    sample_seeds,
    seed_generators,
    train_transform,
)

EVERYTHING = {"color_jitter": 0.3, "vflip": 0.5, "gaussian_blur_prob": 0.5, "re_prob": 0.5}
AUGMENTS = [
    {"mode": "none"},
    {"mode": "light"},
    {"mode": "timm"},
    {"mode": "timm", "interpolation": "random", "grayscale_prob": 0.5} | EVERYTHING,
    {"mode": "timm", "auto_augment": "rand-m9-mstd0.5-inc1"} | EVERYTHING,
    {"mode": "timm", "auto_augment": "3a"} | EVERYTHING,
    {"mode": "timm", "auto_augment": "original"} | EVERYTHING,
]


def picture(channels: int) -> Image.Image:
    shape = (40, 36) if channels == 1 else (40, 36, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_position_is_augmented_the_same_whenever_it_is_met(augment, channels):
    """All of timm's operations on grey and colour, 40 positions each, forwards and backwards."""
    transform = train_transform(
        AugmentConfig.model_validate(augment),
        size=(28, 28),
        mean=(0.4,) * channels,
        std=(0.3,) * channels,
        interpolation="bicubic",
    )
    image, seeds = picture(channels), sample_seeds(0, np.arange(40)).tolist()

    def at(position: int) -> torch.Tensor:
        seed_generators(seeds[position])
        return transform(image)

    forwards = [at(position) for position in range(40)]
    backwards = [at(position) for position in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert all(tensor.shape == (channels, 28, 28) for tensor in forwards)
    assert all(tensor.dtype == torch.float32 for tensor in forwards)
    different = len({tensor.numpy().tobytes() for tensor in forwards})
    assert different == 1 if augment["mode"] == "none" else different > 30


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"auto_augment": "bogus"}, "'bogus' is no policy of timm .*write one such as 'rand-m9"),
        ({"auto_augment": "rand-m9-q5"}, "'rand-m9-q5' is no policy of timm"),
        ({"auto_augment": "rand-m9.5"}, "'rand-m9.5' is no policy of timm"),
        ({"auto_augment": "random"}, "'random' is no policy of timm;"),
        ({"auto_augment": "augmix-q3"}, "'augmix-q3' is no policy of timm"),
        ({"auto_augment": "augmix-a0"}, "'augmix-a0' is no policy of timm .alpha <= 0"),
    ],
    ids=str,
)
def test_a_policy_that_is_not_applied_is_refused(augment, words):
    with pytest.raises(DataError, match=rf"^data\.augment\.auto_augment = .*{words}"):
        train_transform(
            AugmentConfig.model_validate(augment),
            size=(28, 28),
            mean=(0.4,),
            std=(0.3,),
            interpolation="bicubic",
        )


def test_images_are_normalised_by_mean_and_std():
    white = Image.new("L", (28, 28), 255)
    transform = eval_transform(
        size=(28, 28), mean=(0.25,), std=(0.5,), interpolation="bicubic", crop_pct=0.9
    )
    assert torch.allclose(transform(white), torch.full((1, 28, 28), 1.5))


def test_evaluation_crops_the_middle():
    image = Image.new("L", (40, 40), 0)
    image.paste(255, (10, 10, 30, 30))
    transform = eval_transform(
        size=(20, 20), mean=(0.0,), std=(1.0,), interpolation="nearest", crop_pct=0.5
    )
    assert torch.equal(transform(image), torch.ones(1, 20, 20))


def test_seeds_differ_by_position_and_by_run_and_never_change():
    seeds = np.concatenate([sample_seeds(run, np.arange(10_000)) for run in range(3)])
    assert len(np.unique(seeds)) == 30_000
    assert sample_seeds(0, np.array([0])).tolist() == [0xA706DD2F4D197E6F]


def test_borrowed_generators_are_given_back():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_generators(1)
    undisturbed = [draw(), draw()]
    seed_generators(1)
    before = draw()
    with borrowed_generators():
        seed_generators(99)
        draw()
    assert [before, draw()] == undisturbed


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
@pytest.mark.parametrize("magnitude", [0, 5, 10, 15])
def test_posterize_works_at_every_magnitude(name: str, magnitude: int) -> None:
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    options = {"magnitude_std": 0, "magnitude_max": 15}
    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=options)
    assert len(set(np.asarray(operation(image)).flatten())) >= 2
