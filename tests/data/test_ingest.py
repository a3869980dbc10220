"""What a file becomes, or why it is refused."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageFilter

from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import (
    Header,
    Refusal,
    Sample,
    check_codecs,
    ingest,
    key_of,
    look,
    perceptual_hash,
    recipe_of,
    stored_size,
)
from adaconv.data.synthetic import generate_photos
from adaconv.errors import DatasetError
from adaconv.images import scale_down

RECIPE = RecipeConfig(short_side=64, min_side=16)
DATA = Path(__file__).parents[3] / "shared" / "data"
needs_real_images = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real images is not here")


def encoded(mode="RGB", size=(60, 50), fmt="JPEG", **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, fmt, **options)
    return buffer.getvalue()


def saved(image: Image.Image, fmt="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def oriented(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(size=(60, 40), exif=exif)


# What turns an upright picture into one stored with a value of EXIF's orientation.
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def animated() -> bytes:
    frames = [Image.effect_noise((64, 64), 40) for _ in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def profile_of(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def swapped_profile() -> bytes:
    """sRGB's own profile with red and blue exchanged, and a name that is not sRGB's."""
    data = bytearray(profile_of("sRGB"))
    red, blue = (data.index(tag, 128) for tag in (b"rXYZ", b"bXYZ"))
    data[red : red + 1], data[blue : blue + 1] = b"b", b"r"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "demo".encode("utf-16-be"))


def with_stray_bytes(marker: bytes, stray: bytes, **options) -> bytes:
    """In front of a segment that begins with a marker."""
    data = encoded(**options)
    place = data.rindex(marker)
    return data[:place] + stray + data[place:]


def with_overwritten_bytes(seed: int, **options) -> bytes:
    """Four of them, in the scan of the first frame."""
    data, chance = bytearray(encoded(size=(200, 150), **options)), np.random.default_rng(seed)
    place = chance.integers(data.index(SCAN) + 20, data.index(END, data.index(SCAN)) - 100)
    data[place : place + 4] = chance.integers(0, 255, 4, dtype=np.uint8).tobytes()
    return bytes(data)


def ended_early(**options) -> bytes:
    data = encoded(size=(200, 150), **options)
    begin = data.index(SCAN)
    return data[: (begin + data.index(END, begin)) // 2] + END


def with_overwritten_scan() -> bytes:
    """The marker of the end, early and often."""
    data = bytearray(encoded(size=(400, 300)))
    data[4000:4600] = b"\xff\xd9" * 300
    return bytes(data)


def with_a_flipped_byte(fmt: str) -> bytes:
    data = bytearray(encoded(fmt=fmt, size=(200, 150)))
    data[len(data) // 3] ^= 0x55
    return bytes(data)


SCAN, END = b"\xff\xda", b"\xff\xd9"
ON_ITS_SIDE = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
PHONE = {"fmt": "MPO", "save_all": True, "append_images": [Image.new("RGB", (200, 150))]}
GOOD = encoded()

# kind -> (file name, bytes, what becomes of it: repairs, or a refusal's reason)
DEFECTS = {
    "nothing wrong": ("a.jpg", GOOD, ()),
    "upper case extension": ("a.JPEG", GOOD, ()),
    "png": ("a.png", encoded(fmt="PNG", mode="RGB"), ()),
    "webp": ("a.webp", encoded(fmt="WEBP"), ()),
    "bmp": ("a.bmp", encoded(fmt="BMP"), ()),
    "tiff": ("a.tif", encoded(fmt="TIFF"), ()),
    "progressive": ("a.jpg", encoded(progressive=True), ()),
    "srgb profile": ("a.jpg", encoded(icc_profile=profile_of("sRGB")), ()),
    "grey": ("a.jpg", encoded(mode="L"), ("mode_l",)),
    "cmyk": ("a.jpg", encoded(mode="CMYK"), ("mode_cmyk",)),
    "alpha": ("a.png", encoded(mode="RGBA", fmt="PNG"), ("mode_rgba",)),
    "grey with alpha": ("a.png", encoded(mode="LA", fmt="PNG"), ("mode_la",)),
    "palette": ("a.png", encoded(mode="P", fmt="PNG"), ("mode_p",)),
    "one bit": ("a.png", encoded(mode="1", fmt="PNG"), ("mode_1",)),
    "sixteen bit": ("a.png", saved(Image.fromarray(np.full((50, 60), 25700, np.uint16))), ("mode_i_16",)),
    "floats": ("a.tif", encoded(mode="F", fmt="TIFF"), ("mode_f",)),
    "png named jpg": ("a.jpg", encoded(fmt="PNG"), ("wrong_extension",)),
    "animated": ("a.gif", animated(), ("first_frame", "mode_p")),
    "on its side": ("a.jpg", oriented(8), ("exif_orientation",)),
    "on its side by XMP alone": ("a.jpg", encoded(size=(60, 40), xmp=ON_ITS_SIDE), ()),  # no viewer asks that
    "a tiff on its side by XMP alone": ("a.tif", encoded(size=(60, 40), fmt="TIFF", tiffinfo={700: ON_ITS_SIDE}), ()),
    "impossible orientation": ("a.jpg", oriented(99), ("exif_invalid",)),
    "another colour space": ("a.jpg", encoded(icc_profile=swapped_profile()), ("icc_profile",)),
    "profile of another mode": ("a.jpg", encoded(icc_profile=profile_of("LAB")), ("icc_unreadable",)),
    "profile of noise": ("a.jpg", encoded(icc_profile=bytes(200)), ("icc_unreadable",)),
    "of a phone": ("a.jpg", encoded(**PHONE), ("first_frame",)),
    "stray bytes before the scan": ("a.jpg", with_stray_bytes(SCAN, b"\0\1\2\3"), ("stray_bytes",)),
    "stray bytes before a table": ("a.jpg", with_stray_bytes(b"\xff\xdb", bytes(9)), ("stray_bytes",)),
    "grey with stray bytes": ("a.jpg", with_stray_bytes(SCAN, bytes(9), mode="L"), ("mode_l", "stray_bytes")),
    "zeros behind the scan": ("a.jpg", with_stray_bytes(END, bytes(500)), ("stray_bytes",)),
    "zero bytes": ("a.jpg", b"", "empty"),
    "text": ("a.jpg", b"I am text.", "not_an_image"),
    "a web page": ("a.jpg", b"<!doctype html><html><body>404</body></html>", "not_an_image"),
    "svg": ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
    "header only": ("a.png", encoded(fmt="PNG")[:33], "damaged_header"),
    "cut in the header": ("a.jpg", GOOD[:100], "damaged_header"),
    "cut early": ("a.jpg", GOOD[: len(GOOD) // 3 + 400], "truncated"),
    "cut in the middle": ("a.jpg", GOOD[: len(GOOD) // 2 + 300], "truncated"),
    "cut late": ("a.jpg", GOOD[:-40], "truncated"),
    "cut png": ("a.png", encoded(fmt="PNG")[:-900], "truncated"),
    "png of a flipped byte": ("a.png", with_a_flipped_byte("PNG"), "truncated"),
    "cut webp": ("a.webp", encoded(fmt="WEBP")[:-300], "damaged_header"),
    "overwritten": ("a.jpg", with_overwritten_scan(), "corrupt_data"),
    "zeros where a block was lost": ("a.jpg", with_stray_bytes(END, bytes(2_000_000) + b"\1"), "corrupt_data"),
    "left over behind the scan": ("a.jpg", with_stray_bytes(END, bytes(range(1, 100))), "corrupt_data"),
    "grey that ends early": ("a.jpg", ended_early(mode="L"), "corrupt_data"),
    "cmyk that ends early": ("a.jpg", ended_early(mode="CMYK"), "corrupt_data"),
    "of a phone, ends early": ("a.jpg", ended_early(**PHONE), "corrupt_data"),
    "bomb": ("a.png", saved(Image.new("1", (9000, 9000))), "too_many_pixels"),
    "one pixel": ("a.jpg", encoded(size=(1, 1)), "too_small"),
    "small": ("a.jpg", encoded(size=(15, 30)), "too_small"),
    "thin": ("a.jpg", encoded(size=(15, 200)), "too_thin"),
    "invisible": ("a.png", saved(Image.new("RGBA", (50, 50), (255, 0, 0, 0))), "transparent"),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_every_defect_has_its_answer(kind):
    name, data, wanted = DEFECTS[kind]
    answer = ingest(data, name, RECIPE)
    assert ingest(data, name, RECIPE) == answer
    if isinstance(wanted, str):
        assert isinstance(answer, Refusal), answer
        assert answer.reason == wanted
        assert answer.detail
        assert " at 0x" not in answer.detail  # an address would differ from run to run
    else:
        assert isinstance(answer, Sample), answer
        assert answer.repairs == wanted
        with Image.open(io.BytesIO(answer.jpeg)) as stored:
            assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (answer.width, answer.height))
            stored.load()


def test_the_defects_are_of_at_least_25_kinds():
    assert sum(wanted != () for _, _, wanted in DEFECTS.values()) >= 25


def test_the_header_alone_refuses_what_it_can(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    for kind in ("zero bytes", "text", "header only", "bomb"):
        _, data, wanted = DEFECTS[kind]
        answer = look(data, RECIPE)
        assert isinstance(answer, Refusal)
        assert answer.reason == wanted
    assert look(GOOD, RECIPE) == Header(60, 50)


def test_what_is_refused_for_its_looks_is_shown():
    for kind, shown in (("thin", True), ("invisible", True), ("small", True), ("text", False), ("cut late", False)):
        name, data, _ = DEFECTS[kind]
        assert bool(ingest(data, name, RECIPE).thumbnail) == shown, kind


def test_an_image_that_needs_no_change_keeps_its_bytes():
    assert ingest(GOOD, "a.jpg", RECIPE).jpeg == GOOD
    with_stray = with_stray_bytes(SCAN, bytes(9))
    mended = ingest(with_stray, "a.jpg", RECIPE).jpeg
    assert mended != with_stray
    with Image.open(io.BytesIO(with_stray)) as stored, Image.open(io.BytesIO(mended)) as picture:
        stored.info.clear()
        assert mended == saved(stored, "JPEG", quality=RECIPE.jpeg_quality, subsampling=0)
        assert picture.size == stored.size


@pytest.mark.parametrize("options", [{}, {"mode": "L"}, {"mode": "CMYK"}, PHONE], ids=["rgb", "grey", "cmyk", "phone"])
def test_pixels_that_libjpeg_made_up_are_refused(options):
    """Whatever it warns of: left-over bytes, too, are those of a scan that ended early."""

    def warning(data):
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if options.get("mode") == "CMYK" else "GRAY")
        except ValueError as error:
            return str(error)

    damaged = [with_overwritten_bytes(seed, **options) for seed in range(30)]
    warned = {data: said for data in damaged if (said := warning(data))}
    assert sum("extraneous bytes" in said for said in warned.values()) >= 3
    for data, said in warned.items():
        assert ingest(data, "a.jpg", RECIPE).reason == "corrupt_data", said


def test_a_large_image_is_scaled_down_and_a_small_one_is_not_enlarged():
    assert stored_size(1280, 640, RECIPE) == (128, 64)
    assert stored_size(640, 1281, RECIPE) == (64, 128)
    assert stored_size(50, 40, RECIPE) == (50, 40)
    sample = ingest(encoded(size=(200, 100)), "a.jpg", RECIPE)
    with Image.open(io.BytesIO(sample.jpeg)) as stored:
        assert stored.size == (sample.width, sample.height) == (128, 64)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize(("fmt", "name"), [("JPEG", "a.jpg"), ("PNG", "a.png"), ("WEBP", "a.webp"), ("TIFF", "a.tif")])
@pytest.mark.parametrize("scale", [1, 5])
def test_orientation_is_applied_once(fmt, name, value, scale):
    """An L of light at the upper left, as the camera saw it, that is turned as the tag says: upright it is another."""
    seen = np.zeros((40, 60, 3), np.uint8)
    seen[:30, :10] = seen[:10, :40] = 255
    stored = np.asarray(Image.fromarray(seen).transpose(TURNED[value])) if value > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = value
    picture = Image.fromarray(stored.repeat(scale, 0).repeat(scale, 1))
    sample = ingest(saved(picture, fmt, exif=exif, quality=95), name, RECIPE)
    with Image.open(io.BytesIO(sample.jpeg)) as upright:
        assert upright.getexif().get(0x0112, 1) == 1
        assert upright.size == (sample.width, sample.height) == ((60, 40) if scale == 1 else (96, 64))
        assert np.abs(np.asarray(upright.resize((60, 40))).astype(int) - seen).mean() < 6


def test_colours_of_another_profile_become_srgb():
    """With red and blue exchanged in the profile, a red picture is to be shown blue."""
    data = saved(Image.new("RGB", (40, 40), (250, 10, 10)), icc_profile=swapped_profile())
    with Image.open(io.BytesIO(ingest(data, "a.png", RECIPE).jpeg)) as stored:
        red, green, blue = stored.getpixel((20, 20))
        assert blue > 200
        assert max(red, green) < 60
        assert "icc_profile" not in stored.info


PILLOWS = {
    "linear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
    "lanczos3": Image.Resampling.LANCZOS,
}
SCALING = """
import hashlib, numpy, adaconv.images
pixels = numpy.random.default_rng(0).integers(0, 256, (721, 977, 3), numpy.uint8)
for kernel in ("linear", "cubic", "lanczos3"):
    for width, height in ((694, 512), (87, 64)):
        small = adaconv.images.scale_down(pixels, width, height, kernel=kernel)
        print(hashlib.sha256(small.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("kernel", PILLOWS)
def test_scaling_down_is_pillows_to_a_few_levels(tmp_path, kernel):
    """libvips rounds between its two passes, and places its samples by 64ths of a pixel."""
    generate_photos(tmp_path, 1, seed=3, size=400)
    with Image.open(next(tmp_path.iterdir())) as photo:
        picture = photo.convert("RGB").resize((401, 300))
    for width, height in ((267, 200), (150, 100), (33, 25)):
        wanted = np.asarray(picture.resize((width, height), PILLOWS[kernel]), dtype=float)
        error = scale_down(np.asarray(picture), width, height, kernel=kernel) - wanted
        assert error.shape == (height, width, 3)
        assert abs(error.mean()) < 0.5
        assert np.sqrt((error**2).mean()) < 2.0


def test_scaling_down_gives_the_same_bytes_whatever_instructions_a_machine_has():
    """libvips takes the widest vectors there are; a bit of VIPS_VECTOR allows one kind, VIPS_NOVECTOR none."""
    given = {
        subprocess.run(
            [sys.executable, "-c", SCALING], env={**os.environ, **limit}, capture_output=True, text=True, check=True
        ).stdout
        for limit in ({}, {"VIPS_NOVECTOR": "1"}, {"VIPS_VECTOR": "512"}, {"VIPS_CONCURRENCY": "7"})
    }
    assert len(given) == 1
    assert len(set(given.pop().split())) == 6


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("resample", PILLOWS)
def test_a_much_larger_jpeg_is_decoded_at_a_fraction_and_looks_as_it_would(monkeypatch, tmp_path, resample, turned):
    generate_photos(tmp_path, 1, seed=2, size=400)
    exif = Image.Exif()
    exif[0x0112] = turned
    with Image.open(next(tmp_path.iterdir())) as photo:
        picture = photo.convert("RGB").resize((500, 360))
    data = saved(picture, "JPEG", quality=95, exif=exif)
    decoded = []
    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: decoded.append(decode_jpeg(*a, **k)) or decoded[-1])
    recipe = RecipeConfig(short_side=64, min_side=16, resample=resample)
    sample = ingest(data, "a.jpg", recipe)
    assert [pixels.shape for pixels in decoded] == [(135, 188, 3)]  # three eighths: still twice what is wanted
    upright = picture if turned == 1 else picture.transpose(Image.Transpose.ROTATE_270)
    wanted = upright.resize(stored_size(*upright.size, recipe), PILLOWS[resample])
    with Image.open(io.BytesIO(sample.jpeg)) as stored:
        assert stored.size == wanted.size == (sample.width, sample.height)
        error = np.asarray(stored).astype(float) - np.asarray(wanted)
    assert np.sqrt((error**2).mean()) < 3.0


def test_a_version_of_other_rules_is_not_added_to():
    recipe = recipe_of(RECIPE)
    check_codecs(recipe)
    with pytest.raises(DatasetError, match=f"expected images judged by rules {recipe.pop('rules')}, found rules 1"):
        check_codecs(recipe)


def test_a_key_is_the_hash_of_the_bytes_without_dots():
    assert key_of(hashlib.sha256(b"a").hexdigest()) == "ca978112ca1bbdcafac231b39a23dc4d"


def test_a_perceptual_hash_survives_scaling_and_encoding_and_tells_pictures_apart(tmp_path):
    generate_photos(tmp_path, 12, seed=1, size=400)
    hashes = []
    for path in sorted(tmp_path.iterdir()):
        picture = Image.open(path).convert("RGB")
        width, height = picture.size
        small = saved(picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)), "JPEG", quality=60)
        hashes.append(perceptual_hash(picture))
        for changed in (
            Image.open(io.BytesIO(small)),
            picture.convert("L"),
            picture.point(lambda v: v * 0.9 + 10),
            picture.filter(ImageFilter.GaussianBlur(1)),
            picture.resize((width * 3, height * 3), Image.Resampling.BICUBIC),
            picture.resize((width * 5 // 7, height * 5 // 7), Image.Resampling.BILINEAR),
            picture.crop((width // 200, height // 200, width - width // 200, height - height // 200)),
        ):
            assert (perceptual_hash(changed) ^ hashes[-1]).bit_count() <= 4
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 8


@pytest.mark.parametrize("side", [100, 240, 427, 900])
def test_a_picture_that_keeps_its_bytes_has_the_hash_of_all_its_pixels(tmp_path, side):
    """It is decoded at a fraction of its size."""
    generate_photos(tmp_path, 6, seed=2, size=side)
    for path in tmp_path.iterdir():
        picture = Image.open(path).convert("RGB")
        data = saved(picture, "JPEG", quality=90)
        sample = ingest(data, "a.jpg", RecipeConfig(short_side=1000, min_side=50))
        assert isinstance(sample, Sample)
        assert sample.jpeg == data
        assert (sample.phash ^ perceptual_hash(picture)).bit_count() <= 4


# What becomes of the files in broken/, with the least side lowered to 100 pixels so that all kinds are seen.
BROKEN = {
    "animated_palette.gif": ("first_frame", "mode_p"),
    "bomb_30000x30000.png": "too_many_pixels",
    "bomb_warning_10000x10000.png": "too_many_pixels",
    "cmyk.jpg": ("mode_cmyk",),
    "corrupt_middle.jpg": (),  # the bytes written over its scan are valid codes: no decoder can tell
    "exif_orientation_6.jpg": ("exif_orientation",),
    "fully_transparent.png": "transparent",
    "gray16.png": ("mode_i_16",),
    "header_only.png": "damaged_header",
    "jpeg_wrong_extension.png": ("wrong_extension",),
    "name with spaces é 写真 (1).jpg": (),
    "one_pixel.jpg": "too_small",
    "picture.webp": (),
    "text_renamed.jpg": "not_an_image",
    "thin_3000x3.png": "too_thin",
    "truncated.jpg": "truncated",
    "zero_byte.jpg": "empty",
}


@needs_real_images
def test_every_broken_file_gets_its_right_answer():
    answers = {}
    for path in (DATA / "broken").iterdir():
        answer = ingest(path.read_bytes(), path.name, RecipeConfig(min_side=100))
        answers[path.name] = answer.reason if isinstance(answer, Refusal) else answer.repairs
    assert answers == BROKEN


@needs_real_images
@pytest.mark.parametrize("kind", ["photos", "paintings"])
def test_no_good_image_is_refused(kind):
    """Every sixth one; all of them where shards are built, in tests/orchestration."""
    for path in sorted((DATA / kind).iterdir())[::6]:
        answer = ingest(path.read_bytes(), path.name, RecipeConfig(min_side=200))
        assert isinstance(answer, Sample), (path.name, answer)


def pixels_of_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 20}]
)
@pytest.mark.parametrize("size", [(64, 48), (61, 33)])
def test_pixels_of_a_jpeg_are_pillows_to_the_bit(options, size):
    colours = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    data = saved(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC), "JPEG", **options)
    assert np.array_equal(simplejpeg.decode_jpeg(data, "RGB"), pixels_of_pillow(data))


@needs_real_images
def test_pixels_of_real_jpegs_are_pillows_to_the_bit():
    compared = 0
    for path in [*sorted((DATA / "photos").glob("*.jpg"))[::16], *sorted((DATA / "paintings").glob("*.jpg"))[::16]]:
        data = path.read_bytes()
        if Image.open(io.BytesIO(data)).mode == "RGB":
            assert np.array_equal(simplejpeg.decode_jpeg(data, "RGB"), pixels_of_pillow(data)), path.name
            compared += 1
    assert compared > 150
