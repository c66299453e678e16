"""What gets into a shard can be decoded, and is called what it is."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from data.encoding import Encoding
from data.errors import BadSample
from data.lazy_image import LazyImage


def encoded(form: str, size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form, **options)
    return buffer.getvalue()


def phone_photograph() -> bytes:
    """An MPO: two JPEGs in one file."""
    return encoded("MPO", save_all=True, append_images=[Image.new("RGB", (64, 48), "blue")])


@pytest.mark.parametrize(
    ("payload", "extension"),
    [
        (encoded("JPEG"), "jpg"),
        (encoded("PNG"), "png"),
        (encoded("WEBP"), "webp"),
        (phone_photograph(), "jpg"),
    ],
)
def test_bytes_are_copied_under_the_extension_of_their_content(payload, extension):
    assert Encoding().apply(payload) == (extension, payload)
    assert Encoding(kind=extension).apply(payload) == (extension, payload)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_cut_image_is_refused_whether_or_not_it_is_encoded_anew(form, share):
    payload = encoded(form)
    cut = payload[: int(len(payload) * share)]
    for encoding in (Encoding(), Encoding(resize=16), Encoding(kind="jpg"), Encoding(kind="png")):
        with pytest.raises(BadSample):
            encoding.apply(cut)


def test_the_photograph_of_a_phone_shrinks_like_any_jpeg():
    kind, payload = Encoding(resize=24).apply(phone_photograph())
    image = Image.open(io.BytesIO(payload))
    assert (kind, image.format, image.size) == ("jpg", "JPEG", (32, 24))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("options", [{"resize": 24}, {"kind": "png"}, {"kind": "webp"}])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_encoded_anew_stands_as_its_tag_said(form, options, orientation):
    """The tag itself is lost, so the pixels have to turn."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255  # the upper left is white
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form, exif=exif)
    if options.get("kind") == form.lower() and orientation == 1:
        assert Encoding(**options).apply(buffer.getvalue()).payload == buffer.getvalue()  # a copy
        return
    stored = Image.open(io.BytesIO(Encoding(**options).apply(buffer.getvalue()).payload))
    seen = ImageOps.exif_transpose(Image.open(buffer)).resize(stored.size)
    assert stored.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert (stored.width > stored.height) == (orientation < 5)
    assert np.abs(np.asarray(stored, float) - np.asarray(seen, float)).mean() < 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_too_small_to_shrink_is_turned_like_the_others(form):
    """Else one set would lie two ways: training looks at no tag."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lying = encoded(form, exif=exif)
    extension, payload = Encoding(resize=100).apply(lying)
    stored = Image.open(io.BytesIO(payload))
    assert (stored.format, stored.size) == (form, (48, 64))
    assert extension == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    assert Encoding().apply(lying).payload == lying
    exif[ExifTags.Base.Orientation] = 9  # which means nothing
    assert Encoding(resize=100).apply(encoded(form, exif=exif)).payload == encoded(form, exif=exif)


def test_a_tag_that_cannot_be_read_turns_nothing(monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", None)
    _, payload = Encoding(resize=24).apply(encoded("JPEG"))
    assert Image.open(io.BytesIO(payload)).size == (32, 24)


def test_the_photograph_of_a_phone_is_decoded_as_the_jpeg_in_it():
    phone, alone = (
        LazyImage(payload, 3, 10**6) for payload in (phone_photograph(), encoded("JPEG"))
    )
    assert phone.largest_factor((48, 64), (12, 12)) == alone.largest_factor((48, 64), (12, 12)) == 4
    for factor in (1, 4):
        np.testing.assert_array_equal(phone.pixels(factor), alone.pixels(factor))


@pytest.mark.parametrize("size", [(5, 5), (1, 100)])
def test_the_smallest_images_are_read_also_where_pillow_must(size):
    """At an eighth of their size they would have no pixel."""
    file = io.BytesIO()
    Image.new("CMYK", size, (0, 0, 0, 9)).save(file, "JPEG")
    assert LazyImage(file.getvalue(), 3, 10_000)._pillow(8).size
