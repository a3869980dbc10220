import io

import numpy as np
import pytest
import torch
from PIL import Image

from adaconv.images import ImageError, decode, encode_jpeg, open_header, to_rgb, to_tensor, to_uint8, upright


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(ImageError) as raised:
        decode(data, **options)
    return raised.value.reason


def test_every_refusal_has_its_reason():
    picture = png(Image.effect_noise((64, 64), 50))
    assert reason_of(b"") == "empty"
    assert reason_of(b"hello, I am text named .jpg") == "not_an_image"
    assert reason_of(picture[: len(picture) // 2]) == "truncated"
    assert reason_of(picture, max_pixels=64 * 64 - 1) == "too_many_pixels"


def test_a_bomb_is_refused_from_its_header_alone(monkeypatch):
    """A few kilobytes that would decode to gigabytes: no pixel is decoded."""
    bomb = png(Image.new("1", (30_000, 30_000)))
    assert len(bomb) < 200_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError) as raised:
        open_header(bomb)
    assert raised.value.reason == "too_many_pixels"


def test_a_picture_may_be_as_large_as_the_caller_says():
    """Beyond Pillow's own limit of 179 megapixels, which stays what it was."""
    large = png(Image.new("1", (20_000, 10_000)))
    limit = Image.MAX_IMAGE_PIXELS
    with open_header(large, max_pixels=10**9) as image:
        assert image.size == (20_000, 10_000)
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match="20000x10000 exceeds 40000000 pixels"):
        open_header(large)


def test_formats_with_risky_decoders_are_not_recognised():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    assert reason_of(buffer.getvalue()) == "not_an_image"


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (2, 2), (0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bits_are_scaled_not_cut():
    ramp = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    assert [to_rgb(ramp).getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([[0, 127.5, 255, 300]], np.float32), [0, 128, 255, 255]),
        (np.array([[-1, 0.5, 1, np.nan]], np.float32), [0, 128, 255, 0]),
        (np.array([[0, 100, 200, 255]], np.int32), [0, 100, 200, 255]),
        (np.array([[0, 257, 32768, 65535]], np.int32), [0, 1, 128, 255]),
    ],
)
def test_wide_pixels_are_scaled_by_what_they_hold(values, wanted):
    assert [to_rgb(Image.fromarray(values)).getpixel((x, 0))[0] for x in range(4)] == wanted


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = decode(png(Image.new("RGB", (4, 2), "red"), exif=exif))
    assert upright.size == (2, 4)


def test_xmp_says_nothing_of_orientation():
    """Browsers ask EXIF alone, and so does libvips; a TIFF is turned by Pillow itself."""
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    for kind, how in (("JPEG", {"xmp": xmp}), ("TIFF", {"tiffinfo": {700: xmp}})):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 2), "red").save(buffer, kind, **how)
        with Image.open(buffer) as image:
            assert upright(image).size == (4, 2)
            assert image.info["xmp"] == xmp


def test_pixels_survive_the_round_trip_through_floats():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.float32
    assert tensor.min() >= 0
    assert tensor.max() <= 1
    assert np.array_equal(to_uint8(tensor), pixels)
    assert to_uint8(torch.full((3, 1, 1), 1.7)).max() == 255  # clamped


def test_jpeg_keeps_colour_resolution():
    with Image.open(io.BytesIO(encode_jpeg(Image.new("RGB", (16, 16), "red"), quality=95))) as jpeg:
        assert {(h, v) for _, h, v, _ in jpeg.layer} == {(1, 1)}
