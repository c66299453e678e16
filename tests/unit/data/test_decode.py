"""Hostile bytes cost little and do nothing: no crash, no other program, no memory to speak of."""

from __future__ import annotations

import contextlib
import io
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import lazy_image
from data.decode import decode
from data.errors import BadSample, DataError
from data.lazy_image import LazyImage
from data.tar_index import read_index
from tests.unit.data.making import pair, write_tar
from tests.unit.data.test_faults import bomb, many_scans

ROOT = Path(__file__).resolve().parents[3]


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_every_usual_mode_becomes_the_models_channels(kind, mode, channels):
    image = decode(encoded(kind, mode), channels, 10_000)
    assert (image.mode, image.size) == ({1: "L", 3: "RGB"}[channels], (64, 48))


def test_what_pillow_warns_of_is_said_once_and_not_of_every_image():
    image = encoded("PNG", "P", transparency=bytes(range(256)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            decode(image, 3, 10_000)
    assert len(said) == 1


def mutated(content: bytes, rng: random.Random) -> bytes:
    spoiled = bytearray(content)
    for _ in range(rng.choice((1, 3, 20))):
        where = rng.randrange(len(spoiled))
        action = rng.randrange(4)
        if action == 0:
            spoiled[where] ^= 1 << rng.randrange(8)
        elif action == 1:
            spoiled[where : where + 4] = rng.choice((b"\xff" * 4, bytes(4)))
        elif action == 2:
            del spoiled[where : where + rng.randrange(1, 40)]
        else:
            spoiled[where:where] = spoiled[: rng.randrange(40)]
        if len(spoiled) < 2:
            break
    return bytes(spoiled)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_mutated_images_decode_or_are_bad_samples(kind):
    content, rng, decoded = encoded(kind), random.Random(0), 0
    for _ in range(400):
        with contextlib.suppress(BadSample):
            decode(mutated(content, rng), 3, 1_000_000)
            decoded += 1
    assert decoded < 300
    assert decoded > 50 or kind == "PNG"  # whose checksums give nearly all away


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("L", 3), ("CMYK", 3)])
def test_mutated_jpegs_become_pixels_of_their_size_or_bad_samples(monkeypatch, mode, channels):
    """Through turbo and its fallback, whole and reduced: 4,000 images, and both decoders met."""
    content, rng = encoded("JPEG", mode), random.Random(0)
    asked = Counter()
    for name in ("_turbo", "_pillow"):
        monkeypatch.setattr(LazyImage, name, counted(getattr(LazyImage, name), asked, name))
    for number in range(1000):
        factor = (1, 2, 4, 8)[number % 4]
        with contextlib.suppress(BadSample):
            image = LazyImage(mutated(content, rng), channels, 1_000_000)
            height, width = (-(-length // factor) for length in image.size[::-1])
            assert image.pixels(factor).shape == (height, width, channels)
            asked["pixels"] += 1
    assert asked["pixels"] > 300
    assert asked["_pillow"] > 100
    assert asked["_turbo"] > 300 or mode == "CMYK" or lazy_image.simplejpeg is None


def counted(method, counts, name):
    """The method, with its calls counted."""

    def call(*arguments):
        counts[name] += 1
        return method(*arguments)

    return call


def test_mutated_shards_are_indexed_or_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [member for n in range(6) for member in pair(f"s{n}", n, 0)])
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        path.write_bytes(mutated(content, rng))
        try:
            index = read_index(path, 6)
        except DataError:
            refused += 1
        else:
            assert len(index) == 6
    assert refused > 100


def test_a_bomb_is_refused_from_its_header_in_no_time():
    started = time.perf_counter()
    for _ in range(20):
        with pytest.raises(BadSample, match="pixels"):
            decode(bomb(10_000, 9_000), 3, 50_000_000)
    assert (time.perf_counter() - started) / 20 < 0.05


@pytest.mark.parametrize("progressive", [True, False])
def test_a_jpeg_of_thousands_of_scans_is_refused_before_they_are_decoded(progressive):
    """At 50 megapixels each would cost milliseconds, for ten bytes."""
    with pytest.raises(BadSample, match="a JPEG of 50000 scans"):
        decode(many_scans(50_000, progressive), 3, 1000)
    assert decode(many_scans(100, progressive), 3, 1000).size == (16, 16)


def test_what_a_phone_keeps_behind_a_picture_is_no_scan_of_it():
    film = np.random.default_rng(0).bytes(2000) + b"\xff\xda" * 600
    assert decode(encoded("JPEG", progressive=True) + film, 3, 10_000).size == (64, 48)


MEMORY = """
import resource, sys
from data.decode import decode
from data.errors import BadSample
payloads = [open(name, "rb").read() for name in sys.argv[1:]]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for payload in payloads:
    try:
        decode(payload, 3, 50_000_000)
    except BadSample:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_take_no_memory(tmp_path):
    """A claimed 196 megapixels would be 600 MB; a text chunk that inflates to 1 GB is cut short."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("comment", "a" * 300_000_000, zip=True)
    (tmp_path / "text.png").write_bytes(encoded("PNG", pnginfo=text))
    (tmp_path / "pixels.png").write_bytes(bomb(14_000, 14_000))
    (tmp_path / "large.png").write_bytes(bomb(12_000, 12_000))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *sorted(map(str, tmp_path.iterdir()))],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert int(done.stdout) < 100_000  # KiB
