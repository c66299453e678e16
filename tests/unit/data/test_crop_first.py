"""Choosing the crop before decoding changes no draw, and the pixels by a bounded little."""

from __future__ import annotations

import io

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

PIXELS = 10_000_000
SEEDS = sample_seeds(0, np.arange(24)).tolist()


def photograph(size=(500, 375), kind="JPEG", mode="RGB") -> bytes:
    image = Image.fromarray(skimage.data.astronaut()).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format=kind, quality=90)
    return buffer.getvalue()


def normalised(path, image):
    """The image in floats; the fast path leaves the last step to the device."""
    pixels = path(image)
    if path.levels is None:
        return pixels
    assert pixels.dtype == torch.uint8
    scale, shift = path.levels
    return pixels * scale - shift


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
            images.append(normalised(path, LazyImage(payload, channels, PIXELS)))
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
    [
        {"auto_augment": "3a"},
        {"color_jitter": 0.3},
        {"grayscale_prob": 0.5, "re_prob": 1.0, "re_mode": "const"},
    ],
)
def test_the_draws_are_those_of_timm(augment, channels):
    """Had one path drawn once more or less, flips, policies and erasing would fall apart."""
    mode = "L" if channels == 1 else "RGB"
    fast, exact = both(photograph((90, 80), mode=mode), channels, **augment)
    close = ((fast - exact).abs() < 12).float().mean()  # solarising turns one level into many
    assert close > 0.99


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (2, 2), (3, 3), (1, 400)])
@pytest.mark.parametrize("interpolation", ["bicubic", "random", "lanczos"])
def test_of_the_smallest_images_a_pixel_at_least_is_cropped(size, interpolation):
    """timm's draw rounds the sides of a crop to 0 there, of one pixel in a quarter of the draws."""
    fast, _ = both(photograph(size, "PNG"), size=(32, 32), interpolation=interpolation)
    assert fast.shape == (24, 3, 32, 32)
    assert fast.isfinite().all()


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


def frame(payload: bytes) -> bytes:
    """The header that says how large a JPEG is."""
    at = payload.index(b"\xff\xc0")
    return payload[at : at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")]


@pytest.mark.parametrize("order", [(400, 40), (40, 400)])
def test_an_image_of_two_sizes_is_a_bad_sample(order):
    small = photograph((40, 40))
    frames = b"".join(frame(photograph((size, size))) for size in order)
    with pytest.raises(BadSample):
        LazyImage(small.replace(frame(small), frames), 3, 2000).pixels()


def test_turbo_decodes_nothing_whose_size_it_reads_differently(monkeypatch):
    """Else an image that Pillow's reading of the header let pass could be any size."""
    simplejpeg = pytest.importorskip("simplejpeg")
    image = LazyImage(photograph((40, 40)), 3, 2000)
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda _: (400, 400, "YCbCr", "420"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    assert image.pixels().shape == (40, 40, 3)
