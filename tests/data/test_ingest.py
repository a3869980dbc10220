"""What a file becomes, or why it is refused."""

import io
from pathlib import Path

import pytest
from PIL import Image

from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import ingest, key_of, stored_size
from adaconv.images import ImageError

RECIPE = RecipeConfig(short_side=64, min_side=16)
BROKEN = Path(__file__).parents[3] / "shared" / "data" / "broken"


def encoded(mode="RGB", size=(100, 80), fmt="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 40).convert(mode).save(buffer, fmt, **options)
    return buffer.getvalue()


def test_an_image_that_needs_no_change_keeps_its_bytes():
    data = encoded(size=(70, 60))
    assert ingest(data, "a.jpg", RECIPE).jpeg == data


def test_a_large_image_is_scaled_down_and_a_small_one_is_not_enlarged():
    assert stored_size(1280, 640, RECIPE) == (128, 64)
    assert stored_size(640, 1281, RECIPE) == (64, 128)
    assert stored_size(50, 40, RECIPE) == (50, 40)
    sample = ingest(encoded(size=(200, 100)), "a.jpg", RECIPE)
    with Image.open(io.BytesIO(sample.jpeg)) as stored:
        assert stored.size == (sample.width, sample.height) == (128, 64)


@pytest.mark.parametrize(
    ("data", "name", "repairs"),
    [
        (encoded(), "a.jpg", ()),
        (encoded(mode="L"), "a.jpg", ("mode_l",)),
        (encoded(mode="CMYK"), "a.jpg", ("mode_cmyk",)),
        (encoded(mode="RGBA", fmt="PNG"), "a.png", ("mode_rgba",)),
        (encoded(mode="P", fmt="PNG"), "a.png", ("mode_p",)),
        (encoded(fmt="PNG"), "a.jpg", ("wrong_extension",)),
    ],
)
def test_repairs_are_named(data, name, repairs):
    sample = ingest(data, name, RECIPE)
    assert sample.repairs == repairs
    with Image.open(io.BytesIO(sample.jpeg)) as stored:
        assert (stored.format, stored.mode) == ("JPEG", "RGB")


def test_the_first_frame_of_an_animation_is_kept_and_said():
    buffer = io.BytesIO()
    frames = [Image.effect_noise((64, 64), 40) for _ in range(3)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert "first_frame" in ingest(buffer.getvalue(), "a.gif", RECIPE).repairs


def test_orientation_is_applied_once():
    exif = Image.Exif()
    exif[0x0112] = 8
    sample = ingest(encoded(size=(60, 40), exif=exif), "a.jpg", RECIPE)
    assert (sample.width, sample.height, sample.repairs) == (40, 60, ("exif_orientation",))
    with Image.open(io.BytesIO(sample.jpeg)) as stored:
        assert stored.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"text", "not_an_image"),
        (encoded()[:2500], "truncated"),
        (encoded(size=(15, 200)), "too_thin"),
        (encoded(size=(15, 30)), "too_small"),
    ],
)
def test_refusals_are_named(data, reason):
    with pytest.raises(ImageError) as raised:
        ingest(data, "a.jpg", RECIPE)
    assert raised.value.reason == reason


def test_a_key_is_the_hash_of_the_bytes_without_dots():
    assert key_of(b"a") == "ca978112ca1bbdcafac231b39a23dc4d"


@pytest.mark.skipif(not BROKEN.is_dir(), reason="the folder of broken files is not here")
def test_every_broken_file_is_kept_repaired_or_refused_and_never_fatal():
    answers = {}
    for path in sorted(BROKEN.iterdir()):
        try:
            answers[path.name] = ingest(path.read_bytes(), path.name, RecipeConfig()).repairs
        except ImageError as error:
            answers[path.name] = error.reason
    assert len(answers) == 17
    assert any(isinstance(answer, str) for answer in answers.values())
