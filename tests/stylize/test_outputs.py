import contextlib
import io
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms, TiffImagePlugin, TiffTags

from adaconv import storage
from adaconv.errors import UsageError
from adaconv.stylize import large, outputs
from adaconv.stylize.gallery import Failure, Picture, render
from adaconv.stylize.outputs import (
    INDEX,
    Metadata,
    Published,
    Recipe,
    encode,
    hash_of,
    is_whole,
    publish_index,
    read_recipe,
    slug,
)
from adaconv.stylize.pictures import thumbnail
from adaconv.stylize.raster import FileRaster

RECIPE = Recipe(
    content="a/cat.jpg",
    content_sha256="1" * 64,
    style="Impressionism/monet.jpg",
    style_sha256="2" * 64,
    pack_digest="3" * 64,
    model="models:/adaconv/1",
    model_digest="4" * 64,
    options={"content_side": 256},
)


def test_a_name_reads_well_and_is_safe():
    assert re.fullmatch(r"images/monet/cat-[0-9a-f]{16}\.png", RECIPE.name)
    assert slug("x/..") == "image"
    assert slug("../../etc/passwd") == "passwd"
    assert slug("a b:c*?.jpg") == "a-b-c"
    assert slug("写真 (1).jpg") == "写真-1"
    assert len(slug("x" * 300 + ".jpg")) == 50


@pytest.mark.parametrize(
    ("field", "value", "other_name"),
    [
        ("content_sha256", "9" * 64, True),
        ("pack_digest", "9" * 64, True),
        ("model_digest", "9" * 64, True),
        ("options", {"content_side": 128}, True),
        ("model", "models:/adaconv/2", False),  # the same weights under another name
        ("content", "b/cat.jpg", False),
    ],
)
def test_a_name_changes_with_what_determines_the_picture(field, value, other_name):
    assert (replace(RECIPE, **{field: value}).name != RECIPE.name) == other_name


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_the_recipe_travels_in_the_file(kind):
    recipe = replace(RECIPE, options={"format": kind, "quality": 80}, made={"tile": None}, content='a/"<cät>&.jpg')
    image = Image.effect_noise((20, 10), 50).convert("RGB")
    data = encode(image, recipe)
    assert data == encode(image, recipe)
    assert read_recipe(data) == recipe
    with Image.open(io.BytesIO(data)) as again:
        assert again.format == kind.upper()
        assert again.size == image.size
        assert (again.convert("RGB").tobytes() == image.tobytes()) == (kind in ("png", "tiff"))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    assert read_recipe(buffer.getvalue()) is None


def encoded(recipe, metadata, folder):
    return encode(Image.new("RGB", (5, 9)), recipe, metadata=metadata)


def packed(recipe, metadata, folder):
    raster = FileRaster(folder / "raw", 3, 9, 5, torch.uint8)
    large.pack(raster, folder / "output", recipe, metadata=metadata)
    raster.close()
    return (folder / "output").read_bytes()


@pytest.mark.parametrize("write", [encoded, packed])
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_metadata_is_kept_on_request_but_for_the_orientation(kind, write, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a maker", 6
    exif.get_ifd(0x8769)[0x920A] = 50.0  # focal length
    exif.get_ifd(0x8825)[0x0001] = "N"
    Image.new("RGB", (9, 5)).save(tmp_path / "x.jpg", exif=exif, icc_profile=profile)
    recipe = replace(RECIPE, options={"format": kind})
    with Image.open(tmp_path / "x.jpg") as content:
        metadata = Metadata.of(content)
    data = write(recipe, metadata, tmp_path)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.convert("RGB").getextrema()) == ((5, 9), ((0, 0),) * 3)
        assert image.info["icc_profile"] == profile
        kept = image.getexif()
        assert (kept[0x010F], kept.get(0x0112, 1)) == ("a maker", 1)
        assert (kept.get_ifd(0x8769)[0x920A], kept.get_ifd(0x8825)[0x0001]) == (50.0, "N")
    assert read_recipe(data) == recipe
    with Image.open(io.BytesIO(write(recipe, None, tmp_path))) as image:
        assert "icc_profile" not in image.info
        assert 0x010F not in image.getexif()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_exif_never_stands_in_the_way_of_an_output(kind, tmp_path):
    """A TIFF's own layout is no EXIF; what a format has no room for is left behind."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[0x010F], info[65000] = "a maker", b"x" * 100_000
    info.tagtype[65000] = TiffTags.UNDEFINED
    Image.new("RGB", (9, 5)).save(tmp_path / "x.tif", tiffinfo=info)
    with Image.open(tmp_path / "x.tif") as content:
        metadata = Metadata.of(content)
    exif = Image.Exif()
    exif.load(metadata.exif)
    assert sorted(exif) == [0x010F, 65000]
    data = encode(Image.new("RGB", (9, 5)), replace(RECIPE, options={"format": kind}), metadata=metadata)
    assert read_recipe(data).content == RECIPE.content


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_cut_file_is_not_whole(tmp_path, kind):
    recipe = replace(RECIPE, options={"format": kind})
    data = encode(Image.effect_noise((9, 9), 50).convert("RGB"), recipe)
    path = tmp_path / recipe.name.rpartition("/")[2]
    assert not is_whole(str(path))
    for size, whole in ((0, False), (5, False), (len(data) - 1, False), (len(data), True)):
        path.write_bytes(data[:size])
        assert is_whole(str(path)) == whole


def test_an_object_of_a_store_is_asked_for_once(monkeypatch):
    """A job that is done asks for a million of them when it is run again."""
    sizes, asked = {"s3://b/there.png": 9, "s3://b/empty.png": 0}, []

    def size_of(uri):
        asked.append(uri)
        if uri not in sizes:
            raise FileNotFoundError(uri)
        return sizes[uri]

    monkeypatch.setattr(storage, "size_of", size_of)
    monkeypatch.setattr(storage, "_filesystem", None)  # no other request
    uris = ["s3://b/there.png", "s3://b/empty.png", "s3://b/absent.png"]
    assert [is_whole(uri) for uri in uris] == [True, False, False]
    assert asked == uris


def test_a_listing_of_a_store_tells_which_outputs_are_there(bucket, tmp_path):
    styles = ("monet/water lilies.jpg", "a.jpg", "no/where/é.png")
    recipes = [replace(RECIPE, style=styles[n % 3], content_sha256=f"{n:064x}") for n in range(60)]
    names = [recipe.name for recipe in recipes]
    assert not [name for name in names if name in Published.of(bucket)]
    for number, name in enumerate(names[:40]):
        storage.publish_bytes(f"{bucket}/{name}", b"" if number == 7 else b"x")
    there = Published.of(bucket)
    assert [name for name in names if name in there] == [name for n, name in enumerate(names[:40]) if n != 7]
    storage.publish_bytes(str(tmp_path / names[0]), b"x")
    assert names[0] not in Published.of(str(tmp_path))  # whose end must be looked at
    assert there.others(map(hash_of, names[:20])) == 20
    assert Published.listed(str(tmp_path)).others([]) == 1
    assert Published.listed(str(tmp_path)).others([hash_of(names[0])]) == 0


def test_a_long_index_is_written_a_few_thousand_rows_at_a_time(tmp_path, monkeypatch):
    row = dict.fromkeys(INDEX.names) | {"state": "done", "thumbnail": b"of the gallery"}
    rows = [row | {"output": str(number)} for number in range(40_000)]
    table, tables = pa.Table, []
    counting = SimpleNamespace(from_pylist=lambda r, schema: tables.append(len(r)) or table.from_pylist(r, schema))
    monkeypatch.setattr(outputs.pa, "Table", counting)
    read = pq.read_table(publish_index(str(tmp_path), rows))
    assert read["output"].to_pylist() == [row["output"] for row in rows]
    assert read.schema.equals(INDEX)
    assert max(tables) < 20_000


def test_the_index_has_a_row_for_every_pair(tmp_path):
    rows = [
        dict.fromkeys(INDEX.names, "") | {"width": 1, "height": 2, "tile": 0, "seconds": 0.5, "state": s, "extra": 1}
        for s in "ab"
    ]
    table = pq.read_table(publish_index(str(tmp_path), rows))
    assert table.schema.equals(INDEX)
    assert table["state"].to_pylist() == ["a", "b"]


def test_a_gallery_is_one_file_that_escapes_what_it_shows():
    jpeg = thumbnail(Image.new("RGB", (400, 200)), side=64)
    with Image.open(io.BytesIO(jpeg)) as small:
        assert small.size == (64, 32)
    page = render(
        title="<b> {{rows}}",
        facts={"model": "a & b"},
        contents=[Picture(jpeg, "x</script><script>alert(1)</script>")],
        styles=[Picture(jpeg, "s1"), Picture(jpeg, "s2")],
        cells={(0, 0): Picture(jpeg, "cell", "images/a b/c#1.png"), (0, 1): Failure("truncated: <i>")},
    )
    assert page.count("</script>") == page.count("<script") == 3
    assert "<h1>&lt;b&gt; {{rows}}</h1>" in page
    assert "a &amp; b" in page
    assert '"link":"images/a%20b/c%231.png"' in page
    assert "\\u003ci>" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "{{columns}}" not in page


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_a_damaged_output_is_no_surprise(kind):
    """Bytes are overwritten, or the end is missing: a recipe, none, or one kind of error."""
    data = encode(Image.effect_noise((20, 10), 50).convert("RGB"), replace(RECIPE, options={"format": kind}))
    draw = random.Random(0)
    for number in range(200):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 3))):
            changed[draw.randrange(len(data))] = draw.choice((0, 255, draw.randrange(256)))
        if number % 5 == 0:
            del changed[draw.randrange(len(data)) :]
        with contextlib.suppress(UsageError):
            assert isinstance(read_recipe(bytes(changed)), Recipe | None)
