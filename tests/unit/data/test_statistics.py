"""Statistics are of whole images: one that cannot be decoded is in none of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data import statistics
from data.decode import open_image
from data.errors import BadSample
from data.statistics import ShardStatistics
from tests.unit.data.making import png


def test_an_image_that_cannot_be_decoded_is_counted_nowhere():
    gathered, untouched = ShardStatistics(), ShardStatistics()
    payload = png(0, (64, 64))
    with pytest.raises(BadSample):
        gathered.add(open_image(payload[: len(payload) // 2], 10**6), label=1)
    np.testing.assert_array_equal(gathered.sums, untouched.sums)
    gathered.sums = untouched.sums
    assert gathered == untouched


def test_mean_and_square_are_those_of_the_pixels_per_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    gathered = ShardStatistics()
    gathered.add(Image.fromarray(pixels), label=0)
    unit = pixels.reshape(-1, 3) / 255
    # both add 63 terms of at most 1 in float64
    np.testing.assert_allclose(gathered.sums, [unit.mean(0), (unit**2).mean(0)], rtol=63 * 2.3e-16)


def test_images_above_the_limit_of_training_are_counted(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_TRAINED_PIXELS", 99)
    gathered = ShardStatistics()
    for size in ((10, 10), (9, 11)):
        gathered.add(Image.new("L", size), label=0)
    assert gathered.large == 1
