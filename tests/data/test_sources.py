"""Raw images as people have them: folders and archives, odd names, damaged members; found one at a time."""

import os
import random
import tracemalloc
import zipfile
from collections import Counter

import pytest

from adaconv import progress, storage
from adaconv.data.builds import spill_listing
from adaconv.data.sources import Found, fingerprint, iter_images, list_images, read_found
from adaconv.errors import UsageError
from adaconv.images import ImageError

# The two members of the archive of WikiArt that are damaged as it is downloaded, by their names.
BAD_CRC = "Baroque/rembrandt_woman-standing-with-raised-hands.jpg"
BAD_DEFLATE = "Post_Impressionism/vincent-van-gogh_l-arlesienne-portrait-of-madame-ginoux-1890.jpg"


def patch(path, name: str, change) -> None:
    """Change a member's packed bytes where they lie in the archive."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(name.encode()) + int.from_bytes(data[info.header_offset + 28 :][:2], "little")
    data[start : start + info.compress_size] = change(data[start : start + info.compress_size])
    path.write_bytes(data)


@pytest.fixture
def wikiart(tmp_path):
    path = tmp_path / "wikiart.zip"
    content = random.Random(0).randbytes(500) + bytes(3000)
    with zipfile.ZipFile(path, "w") as archive:
        for name, packing in (
            ("Impressionism/a.y.-jackson_spring-1914.jpg", zipfile.ZIP_DEFLATED),
            ("Impressionism/édouard-manet_œuvre-nº-1.jpg", zipfile.ZIP_STORED),
            (BAD_CRC, zipfile.ZIP_STORED),
            (BAD_DEFLATE, zipfile.ZIP_DEFLATED),
        ):
            archive.writestr(f"wikiart/{name}", name.encode() + content, packing)
        archive.writestr("wikiart/classes.csv", "a,b")
        archive.writestr("wikiart/__MACOSX/._x.jpg", "x")
    patch(path, f"wikiart/{BAD_CRC}", lambda packed: packed[:-1] + b"!")
    patch(path, f"wikiart/{BAD_DEFLATE}", lambda packed: b"\xff" * len(packed))
    return path


def test_an_archive_is_read_without_unpacking_and_its_bad_members_are_named(wikiart):
    answers = {}
    for found in iter_images((str(wikiart),)):
        try:
            answers[found.source] = read_found(found)[: len(found.source.encode())].decode()
        except ImageError as error:
            answers[found.source] = error.reason
    good = ["Impressionism/a.y.-jackson_spring-1914.jpg", "Impressionism/édouard-manet_œuvre-nº-1.jpg"]
    assert answers == {**{name: name for name in good}, BAD_CRC: "crc_mismatch", BAD_DEFLATE: "deflate_error"}


def test_an_archive_and_its_folder_give_the_same_paths(wikiart, tmp_path):
    with zipfile.ZipFile(wikiart) as archive:
        for member in archive.infolist():
            target = tmp_path / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"x")
    packed = sorted(found.source for found in iter_images((str(wikiart),)))
    assert packed == [found.source for found in list_images((str(tmp_path / "wikiart"),)) if "MACOSX" not in found.uri]


def test_a_zip_that_does_not_say_that_it_is_utf8_is_read_as_such(tmp_path):
    """As zip programs of Linux and macOS write it, with what the latter add at the top."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/Rococo/XXdouard.jpg", "u")
        archive.writestr("set/Rococo/Z.jpg", "l")
        archive.writestr("__MACOSX/set/Rococo/._XXdouard.jpg", "x")
    path.write_bytes(path.read_bytes().replace(b"XXdouard", "édouard".encode()).replace(b"/Z.jpg", b"/\xe9.jpg"))
    found = {found.source: read_found(found) for found in iter_images((str(path),))}
    assert found == {"Rococo/édouard.jpg": b"u", "Rococo/Θ.jpg": b"l"}  # no UTF-8: the code page of MS-DOS


@pytest.mark.parametrize(
    ("system", "names"),
    [
        (3, ("./Rococo/a.jpg", ".//Rococo/./b.jpg")),  # as `bsdtar -a` writes them
        (3, ("./Rococo/a.jpg", "Rococo/b.jpg")),
        (0, ("Rococo\\a.jpg", "Rococo\\b.jpg")),  # as .NET did
    ],
)
def test_a_zip_of_odd_paths_gives_those_of_its_folder(tmp_path, system, names):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.create_system = system
            archive.writestr(member, "x")
    found = list(iter_images((str(path),)))
    assert [(one.source, one.label) for one in found] == [("Rococo/a.jpg", "Rococo"), ("Rococo/b.jpg", "Rococo")]
    assert [read_found(one) for one in found] == [b"x", b"x"]


def test_a_backslash_is_a_letter_where_it_divides_nothing(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a\\b.jpg", "x")  # of Unix
        odd = zipfile.ZipInfo("Rococo/a\\b.jpg")
        odd.create_system = 0
        archive.writestr(odd, "x")
    assert {found.source for found in iter_images((str(path),))} == {"a\\b.jpg", "Rococo/a\\b.jpg"}


def test_letters_of_east_asia_that_end_like_a_backslash_divide_nothing(tmp_path):
    """As Windows packs them in Japan: Shift-JIS, and nothing says so."""
    path, names = tmp_path / "set.zip", ("能.jpg", "ソ連の絵.jpg", "花.jpg")
    stand_ins = {name: b"Q" * (len(name.encode("shift_jis")) - 5) + b"%d.jpg" % i for i, name in enumerate(names)}
    with zipfile.ZipFile(path, "w") as archive:
        for plain in stand_ins.values():
            member = zipfile.ZipInfo(plain.decode())
            member.create_system = 0
            archive.writestr(member, "x")
    data = path.read_bytes()
    for name, plain in stand_ins.items():
        data = data.replace(plain, name.encode("shift_jis"))
    path.write_bytes(data)
    found = list(iter_images((str(path),)))
    assert [one.label for one in found] == [""] * 3
    assert {one.source.encode("cp437").decode("shift_jis") for one in found} == set(names)


def test_hidden_images_of_a_zip_are_counted(tmp_path, caplog):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.jpg", ".b.jpg", ".old/c.jpg", ".DS_Store"):
            archive.writestr(name, "x")
    with caplog.at_level("INFO"):
        assert [found.source for found in iter_images((str(path),))] == ["a.jpg"]
    assert "2 images are not taken whose names or folders begin with a dot" in caplog.text


def test_a_zip_of_a_name_that_is_no_utf8_is_not_called_damaged(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("é.jpg", "x")
        archive.writestr("b.jpg", "x")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9x"))
    with pytest.raises(UsageError, match=r"is marked as UTF-8 and is none .*; unpack the archive and give"):
        list(iter_images((str(path),)))


def test_an_archive_that_was_mended_is_another(tmp_path):
    """The directory's checksum is that of the whole file, whether or not the member is."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", "whole")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"whole", b"wh0le", 1))
    os.utime(path, (1, 1))
    before = fingerprint(iter_images((str(path),)))
    path.write_bytes(whole)
    assert fingerprint(iter_images((str(path),))) != before


def test_what_is_no_image_is_counted(tmp_path, caplog):
    for name in ("a.jpg", "b.jfif", "c.heic", "d.HEIC", "no-extension", "e.txt"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level("INFO"):
        assert {found.source for found in iter_images((str(tmp_path),))} == {"a.jpg", "b.jfif"}
    assert "4 other files (2 .heic, 1 " in caplog.text
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jfif").unlink()
    with pytest.raises(UsageError, match=r"found 4 other files \(2 \.heic"):
        list(iter_images((str(tmp_path),)))


def test_members_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lzma.jpg", b"x" * 100, zipfile.ZIP_LZMA)
        archive.writestr("locked.jpg", b"x" * 100)
        archive.writestr("empty.jpg", b"")
        archive.writestr("gone.jpg", b"x" * 100)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        locked, gone = archive.getinfo("locked.jpg"), archive.getinfo("gone.jpg")
    entry = data.index(b"PK\1\2", data.index(b"locked.jpg", locked.header_offset + 40) - 46)
    data = data[: entry + 8] + b"\1\0" + data[entry + 10 :]  # the directory's flag says encrypted
    data = data[: gone.header_offset] + b"XX" + data[gone.header_offset + 2 :]
    path.write_bytes(data)
    answers = {}
    for found in iter_images((str(path),)):
        try:
            answers[found.source] = len(read_found(found))
        except ImageError as error:
            answers[found.source] = error.reason
    assert answers == {
        "lzma.jpg": "unknown_compression",
        "locked.jpg": "encrypted_member",
        "empty.jpg": 0,
        "gone.jpg": "deflate_error",
    }


def test_a_damaged_archive_is_refused_or_its_members_are(tmp_path):
    """Bytes of its directory are overwritten, or its end is missing, 600 times."""
    draw = random.Random(0)
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"d/{number}.jpg", draw.randbytes(50) + bytes(300))
    data = whole.read_bytes()
    directory = data.index(b"PK\x01\x02")
    answers = Counter()
    for number in range(600):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 4))):
            changed[draw.randrange(directory, len(data))] = draw.choice((0, 255, draw.randrange(256)))
        if number % 5 == 0:
            del changed[draw.randrange(len(data)) :]
        (tmp_path / "a.zip").write_bytes(changed)
        try:
            for found in iter_images((str(tmp_path / "a.zip"),)):
                try:
                    read_found(found)
                    answers["read"] += 1
                except ImageError as error:
                    answers[error.reason] += 1
        except UsageError:
            answers["refused"] += 1
    assert set(answers) >= {"read", "refused", "crc_mismatch", "deflate_error", "unknown_compression"}


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(10**12)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(3_000_000))
    for source in (tmp_path / "a.zip", tmp_path):
        *_, found = iter_images((str(source),))
        with pytest.raises(ImageError, match=f"too_many_bytes: {found.bytes} bytes exceed 1000000"):
            read_found(found, max_bytes=1_000_000)


def test_a_member_never_inflates_beyond_what_the_directory_admits(tmp_path):
    """A zip bomb that lies about its size is refused after so many bytes, not after all."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(50_000_000))
    (found,) = iter_images((str(path),))
    lying = type(found)(found.uri, found.source, 1000, found.stamp, found.member)
    tracemalloc.start()
    with pytest.raises(ImageError, match="deflate_error"):
        read_found(lying)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(("make", "words"), [(b"not a zip", "found a damaged one"), (None, "found nothing")])
def test_a_damaged_or_missing_archive_is_answered(tmp_path, make, words):
    path = tmp_path / "a.zip"
    if make:
        path.write_bytes(make)
    with pytest.raises(UsageError, match=words):
        next(iter_images((str(path),)))


def test_names_survive_whatever_they_are(tmp_path):
    names = ["dots.in.a name.jpg", "é 写真 (1).jpg", "CASE.JPG", "case.jpg", "n\u0303 and ñ.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    broken = os.fsencode(str(tmp_path)) + b"/caf\xe9.jpg"
    with open(broken, "wb") as file:
        file.write(b"latin")
    found = {found.source: read_found(found).decode() for found in iter_images((str(tmp_path),))}
    assert found == {**{name: name for name in names}, "caf\\xe9.jpg": "latin"}


def test_links_are_followed_though_not_in_a_circle(tmp_path):
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "set" / "inner" / "a.jpg").write_bytes(b"a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"b")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "inner" / "circle").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "nowhere.jpg").symlink_to(tmp_path / "nothing")
    found = {found.source: found for found in iter_images((str(tmp_path / "set"),))}
    assert set(found) == {"inner/a.jpg", "link/b.jpg", "nowhere.jpg"}
    with pytest.raises(ImageError, match="vanished"):
        read_found(found["nowhere.jpg"])


def test_a_link_that_leads_nowhere_sensible_is_refused(tmp_path):
    (tmp_path / "good.jpg").write_bytes(b"x")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "through.jpg").symlink_to(tmp_path / "good.jpg" / "inside.jpg")
    answers = {}
    for found in iter_images((str(tmp_path),)):
        try:
            answers[found.source] = read_found(found).decode()
        except ImageError as error:
            answers[found.source] = error.reason
    assert answers == {"good.jpg": "x", "loop.jpg": "unreadable", "through.jpg": "unreadable"}


def listed_peak(monkeypatch, tmp_path, count: int) -> int:
    """Peak of the memory that listing so many files takes; they are made up by the lowest layer."""

    def walk(uri, *, hidden=False):
        for number in range(count):
            path = f"train2017/{number:012d}.jpg"
            yield storage.Entry(f"{uri}/{path}", path, 1000 + number % 977, str(number), 0.0)

    monkeypatch.setattr(storage, "walk", walk)
    monkeypatch.setattr(storage, "is_directory", lambda uri: True)
    folder = tmp_path / str(count)
    folder.mkdir()
    tracemalloc.start()
    listing = spill_listing(iter_images(("/data",)), folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert listing.images == count == sum(listing.chunks.values())
    return peak


def test_a_folder_that_is_given_twice_is_listed_twice(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "listing").mkdir()
    for number in range(600):
        (tmp_path / "images" / f"{number}.jpg").touch()
    listing = spill_listing(iter_images((str(tmp_path / "images"),) * 2), tmp_path / "listing")
    lines = [line for name in listing.chunks for line in (listing.folder / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == listing.images == 1200


def test_the_memory_of_a_listing_does_not_grow_with_it(monkeypatch, tmp_path):
    """What is left is 24 characters for every 512 files: 2 MB at ten million. Eight bytes for each of the 45,000 more
    would not pass; what the garbage collector and this process's other threads hold for moments, some 50 KB, does.
    """
    small, large = (listed_peak(monkeypatch, tmp_path, count) for count in (5_000, 50_000))
    assert large < small + 50_000 / 512 * 300 + 300_000


def test_a_long_listing_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "_SHORTEST_SECONDS", 0.0)
    found = (Found("/data/a.jpg", f"{number}.jpg") for number in range(1300))
    with caplog.at_level("INFO"):
        assert spill_listing(found, tmp_path).images == 1300
    assert caplog.messages[0].startswith("list 512 | ")
