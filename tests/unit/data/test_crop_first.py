"""Choosing the crop before decoding changes no draw, and the pixels by a bounded little."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from data import lazy_image
from data.config import AugmentConfig
from data.crop_first import CropFirst, from_encoded
from data.errors import BadSample
from data.lazy_image import LazyImage
from data.transforms import sample_seeds, seed_generators, train_transform
from tests.unit.data.test_decode import mutated

PIXELS = 10_000_000
SEEDS = sample_seeds(0, np.arange(24)).tolist()


def photograph(size=(500, 375), kind="JPEG", mode="RGB") -> bytes:
    image = Image.fromarray(skimage.data.astronaut()).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format=kind, quality=90)
    return buffer.getvalue()


def both(payload, channels=3, size=(64, 64), **augment):
    """Levels (0 to 255) of the fast and the exact path, [24, C, H, W] each."""
    transform = train_transform(
        AugmentConfig.model_validate({"color_jitter": 0.0} | augment),
        size=size, mean=(0.4,) * channels, std=(0.3,) * channels, interpolation="bicubic",
    )  # fmt: skip
    found = []
    for decode in ("fast", "exact"):
        path = from_encoded(transform, decode)
        assert isinstance(path, CropFirst) == (decode == "fast")
        images = []
        for seed in SEEDS:
            seed_generators(seed)
            images.append(path(LazyImage(payload, channels, PIXELS)))
        found.append((torch.stack(images) * 0.3 + 0.4) * 255)
    return found


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random", "lanczos"])
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB")])
def test_unreduced_crops_differ_by_the_rounding_of_the_resize_alone(kind, mode, interpolation):
    """224 of 300 pixels allow no reduction. Bicubic overshoots, and rounds and clips in two passes:
    a few levels at rare pixels beside hard edges, measured 7 and 0.035 on average.
    """
    fast, exact = both(
        photograph((300, 280), kind, mode), size=(224, 224), interpolation=interpolation, vflip=0.5
    )
    most = {"bilinear": 1, "lanczos": 0}.get(interpolation, 8)
    assert (fast - exact).abs().max() < most + 0.01
    assert (fast - exact).abs().mean() < 0.05


def test_reduced_crops_stay_close():
    """A reduced decode is another low-pass filter: measured 1.3 levels, 2.0 in the worst crop."""
    fast, exact = both(photograph((1600, 1200)), size=(96, 96), scale=(0.2, 1.0))
    differences = (fast - exact).abs()
    assert differences.mean() < 2
    assert differences.flatten(1).mean(1).max() < 3
    for one, other in zip(fast, exact, strict=True):
        both_flat = torch.stack([one.flatten(), other.flatten()])
        assert torch.corrcoef(both_flat)[0, 1] > 0.98


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [{"auto_augment": "3a"}, {"color_jitter": 0.3}, {"grayscale_prob": 0.5, "re_prob": 1.0}],
)
def test_the_draws_are_those_of_timm(augment, channels):
    """Had one path drawn once more or less, flips, policies and erasing would fall apart."""
    mode = "L" if channels == 1 else "RGB"
    fast, exact = both(photograph((90, 80), mode=mode), channels, re_mode="const", **augment)
    close = ((fast - exact).abs() < 12).float().mean()  # solarising turns one level into many
    assert close > 0.99


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_pillow_stands_in_for_turbo_with_the_same_pixels(monkeypatch, factor):
    pytest.importorskip("simplejpeg")
    payload = photograph((501, 375))
    turbo = LazyImage(payload, 3, PIXELS).pixels(factor)
    monkeypatch.setattr(lazy_image, "simplejpeg", None)
    pillow = LazyImage(payload, 3, PIXELS).pixels(factor)
    assert turbo.shape == pillow.shape == (-(-375 // factor), -(-501 // factor), 3)
    assert np.abs(turbo.astype(int) - pillow).max() <= 2


def test_the_reduction_leaves_the_crop_the_pixels_it_needs():
    image = LazyImage(photograph((1600, 1200)), 3, PIXELS)
    wanted = (224, 224)
    crops = [(223, 900), (447, 448), (448, 448), (900, 896), (1200, 1600)]
    assert [image.largest_factor(crop, wanted) for crop in crops] == [1, 1, 2, 4, 4]
    assert LazyImage(photograph(kind="PNG"), 3, PIXELS).largest_factor((375, 500), (9, 9)) == 1


@pytest.mark.parametrize("with_turbo", [True, False])
def test_both_decoders_refuse_what_is_cut(monkeypatch, with_turbo):
    if not with_turbo:
        monkeypatch.setattr(lazy_image, "simplejpeg", None)
    payload = photograph()
    with pytest.raises(BadSample, match="cannot be decoded"):
        LazyImage(payload[: len(payload) // 2], 3, PIXELS).pixels()


@pytest.mark.parametrize("with_turbo", [True, False])
@pytest.mark.parametrize(
    ("order", "words"), [("large small", "cannot be decoded"), ("small large", "2000 are allowed")]
)
def test_a_second_header_does_not_get_past_the_pixel_cap(monkeypatch, order, words, with_turbo):
    """Pillow goes by the last frame header; a decoder that went by the first must not be asked."""
    if not with_turbo:
        monkeypatch.setattr(lazy_image, "simplejpeg", None)
    payloads = {"small": photograph((40, 40)), "large": photograph((400, 400))}

    def frame(payload: bytes) -> bytes:
        at = payload.index(b"\xff\xc0")
        return payload[at : at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")]

    both_frames = b"".join(frame(payloads[name]) for name in order.split())
    twice = payloads["small"].replace(frame(payloads["small"]), both_frames)
    with pytest.raises(BadSample, match=words):
        LazyImage(twice, 3, 2000).pixels()


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("L", 3)])
def test_mutated_jpegs_decode_to_the_size_they_claim_or_are_bad_samples(mode, channels):
    """On the path that training takes, turbo first, at every reduction."""
    pytest.importorskip("simplejpeg")
    content, rng = photograph((61, 47), mode=mode), random.Random(0)
    decoded = refused = by_turbo = 0
    for _ in range(1500):
        factor = rng.choice((1, 2, 4, 8))
        try:
            image = LazyImage(mutated(content, rng), channels, 1_000_000)
            by_turbo += image._turbo_reads_it and image._turbo(factor) is not None
            pixels = image.pixels(factor)
        except BadSample:
            refused += 1
        else:
            width, height = (-(-length // factor) for length in image.size)
            assert pixels.shape == (height, width, channels)
            decoded += 1
    assert min(decoded, refused, by_turbo) > 150
