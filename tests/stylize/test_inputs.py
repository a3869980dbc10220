"""Where contents and styles come from: what is listed, what is read, what is refused by name."""

import contextlib
import errno
import hashlib
import io
import json
import random
import re
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from adaconv import storage
from adaconv.data.manifest import open_version
from adaconv.errors import UsageError
from adaconv.images import ImageError
from adaconv.stylize import inputs, large
from adaconv.stylize.inputs import (
    Item,
    check_apart,
    decode_picture,
    list_items,
    local_file,
    read_item,
    reading_order,
    sha256_of,
)
from adaconv.stylize.tables import read_table
from tests.helpers import build_version


def png(seed=0):
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def again(item):
    """As it travels to an actor."""
    return Item.from_row(item.to_row())


def test_folders_and_zips(tmp_path):
    for number, name in enumerate(("b.png", "a.PNG", "sub/é 写.png", "note.txt")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(number))
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "in").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    folder, packed = (list_items((str(tmp_path / name),), flag="--content") for name in ("in", "in.zip"))
    assert [item.source for item in folder] == [item.source for item in packed] == ["a.PNG", "b.png", "sub/é 写.png"]
    (tmp_path / "scratch").mkdir()
    for one, other in zip(folder, packed, strict=True):
        assert read_item(again(one)) == read_item(again(other))
        assert local_file(again(one), tmp_path / "scratch").parent != tmp_path / "scratch"
        assert local_file(again(other), tmp_path / "scratch").read_bytes() == read_item(one)


def test_single_images(tmp_path):
    for name in ("a.PNG", "b.jpg"):
        Image.new("RGB", (20, 16)).save(tmp_path / name)
    (tmp_path / "album.jpg").mkdir()
    Image.new("RGB", (20, 16)).save(tmp_path / "album.jpg" / "c.png")
    found = list_items([str(tmp_path / name) for name in ("b.jpg", "a.PNG", "album.jpg")], flag="--content")
    assert [item.source for item in found] == ["b.jpg", "a.PNG", "c.png"]
    for item in found:
        assert read_item(item) == Path(item.uri).read_bytes()
        assert item.place == (Path(item.uri).stat().st_size, 0)
    with pytest.raises(UsageError, match=r"nothing.jpg: expected a folder of images, found nothing there"):
        list_items([str(tmp_path / "nothing.jpg")], flag="--content")


def test_a_dataset_version(photos, tmp_path):
    version = build_version(photos, str(tmp_path / "data"))
    for spec in ("data", f"data@{version.version}"):
        items = list_items((str(tmp_path / spec),), flag="--content")
        assert len(items) == version.samples().num_rows == 24
        jpeg = read_item(again(items[3]))
        assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
    assert open_version(str(tmp_path / "data")).version == version.version
    with pytest.raises(UsageError, match="has no version"):
        list_items((str(tmp_path / "data@0123456789abcdef"),), flag="--content")


@pytest.mark.parametrize("shape", ["binary", "struct"])
def test_a_parquet_column(tmp_path, shape):
    data = [png(0), None, png(2)]
    column = data if shape == "binary" else [{"bytes": one, "path": f"p{n}.png"} for n, one in enumerate(data)]
    table = pa.table({"number": [1, 2, 3], "image": column, "other": [b"x"] * 3})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    items = list_items((str(tmp_path / "t.parquet"),), flag="--content")
    names = [f"row-0000000{n}" for n in range(3)] if shape == "binary" else ["p0.png", "p1.png", "p2.png"]
    assert [item.source for item in items] == names
    assert [read_item(again(items[n])) for n in (0, 2)] == [data[0], data[2]]
    with pytest.raises(ImageError, match="empty"):
        read_item(items[1])
    assert read_item(list_items((f"{tmp_path / 't.parquet'}#other",), flag="--content")[0]) == b"x"
    with pytest.raises(UsageError, match=r"expected a column of images .* found number: int64, image"):
        list_items((f"{tmp_path / 't.parquet'}#number",), flag="--content")


def test_row_groups_are_fetched_once_whatever_their_cells_are_called(tmp_path, monkeypatch):
    """Also from an object store, where the rest of the file stays."""
    names = [hashlib.md5(str(number).encode()).hexdigest() for number in range(40)]
    table = pa.table({"name": names, "image": [random.randbytes(100_000) for _ in names]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    items = list_items((str(tmp_path / "t.parquet"),), flag="--content")
    assert [item.source for item in items] == sorted(names)
    opened, fetched = [], []

    class Fetched(io.FileIO):
        def readinto(self, buffer):
            fetched.append(len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    monkeypatch.setattr(storage, "open_binary", lambda uri: opened.append(uri) or io.BufferedReader(Fetched(uri), 64))
    for row in sorted((item.to_row() for item in items), key=reading_order):
        assert len(read_item(Item.from_row(row))) == 100_000
    assert len(opened) == 10
    assert sum(fetched) < 1.5 * (tmp_path / "t.parquet").stat().st_size


def test_a_damaged_row_group_is_of_its_cells_and_a_storage_that_fails_is_not(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [png(n) for n in range(8)]}), path, row_group_size=4, use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 60] = b"\xff" * 60
    path.write_bytes(data)
    items = list_items((str(path),), flag="--content")
    assert read_item(items[3]) == png(3)
    with pytest.raises(ImageError, match="corrupt_data: its row group cannot be read"):
        read_item(items[4])
    for error in (ConnectionError("no answer"), OSError(errno.EIO, "an error of the disk")):
        monkeypatch.setattr(storage, "open_binary", Mock(side_effect=error))
        with pytest.raises(type(error)):
            read_item(items[5])


def test_a_damaged_row_group_of_names_leaves_its_cells_without(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    columns = {"name": [f"picture-{n}" for n in range(8)], "image": [png(n) for n in range(8)]}
    pq.write_table(pa.table(columns), path, row_group_size=4, use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 30] = b"\xff" * 30
    path.write_bytes(data)
    items = list_items((str(path),), flag="--content")
    assert [item.source for item in items] == [f"picture-{n}" for n in range(4)] + [f"row-{n:08d}" for n in range(4, 8)]
    with monkeypatch.context() as away:
        away.setattr(pq.ParquetFile, "read_row_group", Mock(side_effect=ConnectionError("no answer")))
        with pytest.raises(ConnectionError):
            list_items((str(path),), flag="--content")
    with pytest.raises(UsageError, match=r"--pairs .*t\.parquet: expected a Parquet file, found: "):
        read_table(str(path), flag="--pairs")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UsageError, match="expected a table, found a folder"):
        read_table(str(tmp_path / "folder.csv"), flag="--pairs")


def test_a_names_column(tmp_path):
    pq.write_table(pa.table({"name": ["z", "y"], "image": [png(0), png(1)]}), tmp_path / "t.parquet")
    items = list_items((str(tmp_path / "t.parquet"),), flag="--content")
    assert [(item.source, read_item(item)) for item in items] == [("y", png(1)), ("z", png(0))]
    pq.write_table(pa.table({"id": [0, None, 7], "image": [png(0)] * 3}), tmp_path / "t.parquet")
    items = list_items((str(tmp_path / "t.parquet"),), flag="--content")
    assert [item.source for item in items] == ["0", "7", "row-00000001"]
    paths = ["/home/me/private/a/1.jpg", "a/b/c/2.jpg"]
    pq.write_table(pa.table({"path": paths, "image": [png(0)] * 2}), tmp_path / "t.parquet")
    items = list_items((str(tmp_path / "t.parquet"),), flag="--content")
    assert [item.source for item in items] == ["a/1.jpg", "a/b/c/2.jpg"]
    paths = [
        f"{folder}/train/1.jpg" for folder in ("/home/me/x", "/home/me/y", "/data/z")
    ]  # each can be paired by name
    pq.write_table(pa.table({"path": paths, "image": [png(0)] * 3}), tmp_path / "t.parquet")
    items = list_items((str(tmp_path / "t.parquet"),), flag="--content")
    assert [item.source for item in items] == ["x/train/1.jpg", "y/train/1.jpg", "z/train/1.jpg"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("file:///home/me/private/a/1.jpg", "a/1.jpg"),
        (r"C:\Users\me\a\1.jpg", "a/1.jpg"),
        (r"\\server\me\a\1.jpg", "a/1.jpg"),
        ("s3://b/private/a/1.jpg", "s3://b/private/a/1.jpg"),
    ],
)
def test_folders_of_a_machine_stay_with_it(tmp_path, path, told):
    pq.write_table(pa.table({"path": [path], "image": [png(0)]}), tmp_path / "t.parquet")
    (item,) = list_items((str(tmp_path / "t.parquet"),), flag="--content")
    assert item.source == told


def test_a_folder_may_have_the_mark_of_a_column(tmp_path):
    folder = tmp_path / "a#b"
    folder.mkdir()
    pq.write_table(pa.table({"one": [png(0)], "two": [png(1)]}), folder / "t.parquet")
    for source, wanted in ((f"{folder}/t.parquet", png(0)), (f"{folder}/t.parquet#two", png(1))):
        (item,) = list_items((source,), flag="--content")
        assert read_item(item) == wanted


def test_a_picture_that_is_not_there_is_no_dataset_version(tmp_path):
    with pytest.raises(UsageError, match=r"--content .*photo@2x\.png: expected"):
        list_items((str(tmp_path / "photo@2x.png"),), flag="--content")


def test_a_mixture_of_too_many_is_named_before_anything_is_made(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(257):
        (folder / f"{number}.png").write_bytes(png())
    rows = [f"much,{number}.png,1" for number in range(257)]
    table = folder / "mixtures.csv"
    table.write_text("\n".join(("name,style,weight", *rows)))
    with pytest.raises(UsageError, match="expected a mixture of at most 256 styles, found 257 in much"):
        list_items([str(table)], flag="--style", packs=True)


def test_style_packs(tmp_path, caplog):
    for name in ("b.safetensors", "a.safetensors"):
        storage.publish_bytes(str(tmp_path / "styles" / name), b"x")
    items = list_items((str(tmp_path / "styles"),), flag="--style", packs=True)
    assert [(item.kind, item.source) for item in items] == [("pack", "a.safetensors"), ("pack", "b.safetensors")]
    assert list_items((str(tmp_path / "styles" / "a.safetensors"),), flag="--style", packs=True) == [items[0]]
    (tmp_path / "styles" / "c.png").write_bytes(png())
    assert list_items((str(tmp_path / "styles"),), flag="--style", packs=True) == items
    assert "2 style packs are taken, 1 images beside them are not" in caplog.text
    (tmp_path / "styles" / "c.png").unlink()
    with pytest.raises(UsageError, match=r"--content .*found 2 other files"):
        list_items((str(tmp_path / "styles"),), flag="--content")


@pytest.mark.parametrize("name", ["none", "none.parquet", "none.safetensors", "bad.parquet", "empty.parquet"])
def test_what_is_not_there_is_said(tmp_path, name):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nothing")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(UsageError, match=f"--style .*{name}: expected .*found"):
        list_items((str(tmp_path / name),), flag="--style", packs=True)


@pytest.mark.parametrize(
    ("source", "output", "apart"),
    [
        ("photos", "photos", False),
        ("photos", "photos/stylized", False),
        ("photos/", "link/stylized", False),
        ("photos/../photos", "photos/a/b", False),
        ("photos/out/images/monet", "photos/out", False),
        ("photos", "photos2", True),
        ("photos", ".", True),
        ("photos", "photos/.stylized", True),  # which listings leave out
        ("version", "version/stylized", True),
        ("s3://b/photos", "s3://b/photos/stylized", False),
        ("s3://b/photos/", "s3://b/photos", False),
        ("s3://b/photos", "s3://b/photos-stylized", True),
    ],
)
def test_outputs_lie_apart_from_what_they_are_made_of(tmp_path, monkeypatch, source, output, apart):
    """Else the same command again would take them for contents."""
    monkeypatch.setattr(inputs, "_is_version", lambda given: given == "version")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with (
        contextlib.nullcontext() if apart else pytest.raises(UsageError, match=f"--content {source}: expected a folder")
    ):
        check_apart((source,), output, flag="--content")


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    (item,) = list_items((str(tmp_path),), flag="--content")
    path = local_file(item, tmp_path)

    def denied(*_):
        raise PermissionError(13, "Permission denied", str(path))  # which root never sees

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ImageError, match="unreadable: no permission"):
        sha256_of(path)


def decoded(path):
    return decode_picture(path, max_pixels=10**6).size


def unpacked(path):
    raster = large.unpack(path, path.with_suffix(".raw"))
    raster.close()
    return raster.width, raster.height


@pytest.mark.parametrize("read", [decoded, unpacked])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "pattern", [b"\xff\xc0" * 32, b"\xff\xd9\xff\xff" * 16, b"\xff\xd0" * 32], ids=["SOF", "EOI", "RST"]
)
def test_damaged_jpeg_data_is_refused_whole_and_tiled(tmp_path, pattern, mode, read):
    noise = np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / "a.jpg", quality=95)
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    stray = data.rindex(b"\xff\xda")
    (tmp_path / "b.jpg").write_bytes(data[:stray] + b"\0\0\0\0" + data[stray:])  # read by nothing: no pixel is missing
    data[len(data) // 2 : len(data) // 2 + 64] = pattern
    (tmp_path / "c.jpg").write_bytes(data)
    assert read(tmp_path / "a.jpg") == read(tmp_path / "b.jpg") == (240, 200)
    with pytest.raises(ImageError, match=r"corrupt_data|truncated"):
        read(tmp_path / "c.jpg")


@pytest.mark.parametrize("read", [decoded, unpacked])
def test_the_first_picture_of_a_phones_jpeg_must_be_sound_too(tmp_path, read):
    """MPO: a JPEG with others behind it."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (240, 200))])
    data = bytearray((tmp_path / "a.mpo").read_bytes())
    (tmp_path / "a.jpg").write_bytes(data)
    assert read(tmp_path / "a.jpg") == (240, 200)
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff\xd9\xff\xff" * 16
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match="corrupt_data"):
        read(tmp_path / "a.jpg")


def table_of_mixtures(folder, *rows, columns="name,style,weight"):
    folder.mkdir(exist_ok=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "kept.safetensors").write_bytes(b"")
    path = folder / "mixtures.csv"
    path.write_text("\n".join((columns, *rows)) + "\n")
    return str(path)


def test_mixtures_name_styles_beside_their_table(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(png())
    table = table_of_mixtures(
        tmp_path / "in", "dusk,0.png,2", f"dawn,{elsewhere},", "dusk,1.png,0.5", "dusk,kept.safetensors,0"
    )
    monkeypatch.chdir(tmp_path)
    for given in (table, "in/mixtures.csv"):
        dawn, dusk = (again(item) for item in list_items([given], flag="--style", packs=True))
        assert [(item.source, item.kind) for item in (dawn, dusk)] == [("dawn", "mixture"), ("dusk", "mixture")]
        parts = [(Item.from_row(row), weight) for row, weight in json.loads(dusk.parts)]
        assert [(part.source, part.kind, weight) for part, weight in parts] == [
            ("0.png", "file", 2),
            ("1.png", "file", 0.5),
            ("kept.safetensors", "pack", 0),
        ]
        assert read_item(parts[1][0]) == png(1)
        ((row, weight),) = json.loads(dawn.parts)
        assert (Item.from_row(row).uri, weight) == (str(elsewhere), 1)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((), "expected rows, found none"),
        (("a,0.png,-1",), "row 1: expected a weight of 0 or more, found '-1'"),
        (("a,0.png,nan",), "row 1: expected a weight of 0 or more, found 'nan'"),
        (("a,0.png,much",), "found 'much'"),
        (("a,0.png,0", "a,1.png,0"), "expected a weight above 0 in a, found none"),
        (("a,0.png,1", "a,,1"), "row 2: expected the name of a mixture and a style, found 'a' and ''"),
        (("a,0.png,1", "a,9.png,1"), "row 2: expected an image or style pack, found none at"),
        (("a,9.safetensors,1",), "row 1: expected an image or style pack, found none at"),
        (("a,http://x/9.png,1",), "row 1: http://x/9.png: expected a local path or s3://bucket/prefix"),
        (("a,0.png,1,2",), "expected 3 fields, as the first line has, found 4"),
    ],
)
def test_a_table_of_mixtures_that_says_nothing_is_refused(rows, told, tmp_path):
    table = table_of_mixtures(tmp_path / "in", *rows)
    with pytest.raises(UsageError, match=re.escape(told)) as error:
        list_items([table], flag="--style", packs=True)
    assert str(error.value).startswith("--style")
    with pytest.raises(UsageError):  # contents cannot be mixed
        list_items([table], flag="--content")


def test_a_table_with_other_columns_is_told_which(tmp_path):
    table = table_of_mixtures(tmp_path / "in", "0.png,1.png", columns="content,style")
    with pytest.raises(UsageError, match="expected columns name, style and weight, found content, style"):
        list_items([table], flag="--style", packs=True)
