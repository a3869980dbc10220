import io
import json
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from adaconv.stylize.gallery import Picture, render
from adaconv.stylize.outputs import INDEX, Recipe, encode, is_whole, publish_index, read_recipe, slug
from adaconv.stylize.pictures import thumbnail

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


def test_the_recipe_travels_in_the_file():
    image = Image.effect_noise((20, 10), 50).convert("RGB")
    data = encode(image, RECIPE)
    assert data == encode(image, RECIPE)
    assert read_recipe(data)["content_sha256"] == "1" * 64
    assert json.loads(RECIPE.to_json()) == read_recipe(data)
    with Image.open(io.BytesIO(data)) as again:
        assert again.convert("RGB").tobytes() == image.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert read_recipe(buffer.getvalue()) is None


def test_a_cut_file_is_not_whole(tmp_path):
    data = encode(Image.new("RGB", (9, 9)), RECIPE)
    path = tmp_path / "x.png"
    assert not is_whole(str(path))
    for size, whole in ((0, False), (5, False), (len(data) - 1, False), (len(data), True)):
        path.write_bytes(data[:size])
        assert is_whole(str(path)) == whole


def test_the_index_has_a_row_for_every_pair(tmp_path):
    rows = [
        dict.fromkeys(INDEX.names, "") | {"width": 1, "height": 2, "seconds": 0.5, "state": s, "extra": 1} for s in "ab"
    ]
    table = pq.read_table(publish_index(str(tmp_path), rows))
    assert table.schema.equals(INDEX)
    assert table["state"].to_pylist() == ["a", "b"]


def test_a_gallery_is_one_file_that_escapes_what_it_shows():
    jpeg = thumbnail(Image.new("RGB", (400, 200)), side=64)
    with Image.open(io.BytesIO(jpeg)) as small:
        assert small.size == (64, 32)
    page = render(
        title="<b>",
        facts={"model": "a & b"},
        contents=[Picture(jpeg, 'x"><script>alert(1)</script>')],
        styles=[Picture(jpeg, "s1"), Picture(jpeg, "s2")],
        cells={(0, 0): Picture(jpeg, "cell", "images/a b/c#1.png")},
    )
    assert "<script" not in page
    assert "a &amp; b" in page
    assert 'href="images/a%20b/c%231.png"' in page
    assert page.count("failed</span>") == 1
    assert page.count("<img") == 4
    assert not re.findall(r'(?:src|href)="(?!data:|images/)', page)
    assert "{{" not in page
