"""Near-duplicates: every pair, none twice, against comparing all with all."""

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaconv.data.manifest import open_version
from adaconv.data.report import render
from adaconv.data.similar import Pair, similar_pairs
from tests.helpers import build_version


def brute(hashes, distance, others=None):
    pairs = []
    for first, one in enumerate(hashes):
        for second, other in enumerate(hashes if others is None else others):
            bits = (int(one) ^ int(other)).bit_count()
            if bits <= distance and (others is not None or first < second):
                pairs.append(Pair(first, second, bits))
    return sorted(pairs, key=lambda pair: (pair.distance, pair.first, pair.second))


def draw_hashes(count, seed):
    """Random hashes, and some that are near one another."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for index in range(0, count // 2, 2):
        flips = rng.choice(64, int(rng.integers(0, 8)), replace=False)
        hashes[index + 1] = hashes[index] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_no_pair_is_missed_and_none_invented(distance):
    hashes, others = np.unique(draw_hashes(150, 0)), np.unique(draw_hashes(120, 1))
    others[:20] = hashes[:20] ^ np.uint64(5)
    assert similar_pairs(hashes, distance=distance) == brute(hashes, distance)
    assert similar_pairs(hashes, distance=distance, others=others) == brute(hashes, distance, others)


@pytest.mark.parametrize("distance", [0, 4])
def test_images_of_one_hash_stand_for_one_another(distance):
    """Each pair is one of all, and whoever is near anything is in one."""
    rng = np.random.default_rng(0)
    hashes, others = (rng.choice(draw_hashes(40, 0), count) for count in (120, 90))
    for second in (None, others):
        every, ours = brute(hashes, distance, second), similar_pairs(hashes, distance=distance, others=second)
        assert set(ours) <= set(every)
        assert len(ours) == len(set(ours)) < len(every)
        if second is None:
            assert parts_of(ours, len(hashes)) == parts_of(every, len(hashes))
        else:
            assert {pair.first for pair in ours} == {pair.first for pair in every}
            assert {pair.second for pair in ours} == {pair.second for pair in every}


def parts_of(pairs, count):
    """For each row the least row that pairs connect it with."""
    least = list(range(count))
    for _ in range(count):
        for pair in pairs:
            least[pair.first] = least[pair.second] = min(least[pair.first], least[pair.second])
    return least


def test_thousands_of_black_images_are_not_millions_of_pairs():
    hashes = np.full(20_000, 7, np.uint64)
    assert len(similar_pairs(hashes, distance=4)) == len(hashes) - 1
    assert len(similar_pairs(hashes, distance=4, others=hashes[:5000])) == len(hashes) + 4999


def test_nothing_has_no_pairs():
    assert similar_pairs(np.zeros(0, np.uint64), distance=3) == []


@pytest.fixture(scope="module")
def pictures(photos, tmp_path_factory):
    """The photographs, and one of them smaller and encoded anew."""
    folder = tmp_path_factory.mktemp("pictures") / "images"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with Image.open(folder / "photo_00003.jpg") as image:
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(folder / "smaller.jpg", quality=70)
    (folder / "cut.jpg").write_bytes((folder / "photo_00001.jpg").read_bytes()[:2000])
    Image.new("RGBA", (120, 110)).save(folder / "invisible.png")
    Image.open(folder / "photo_00002.jpg").convert("L").save(folder / "grey.jpg")
    return build_version(folder, str(tmp_path_factory.mktemp("data") / "pictures"))


def test_an_image_encoded_anew_is_found_and_others_are_not(pictures):
    samples = pictures.samples()
    pairs = similar_pairs(samples["phash"].to_numpy(), distance=4)
    names = {tuple(sorted(samples["source"][row].as_py() for row in (p.first, p.second))) for p in pairs}
    assert names == {("photo_00003.jpg", "smaller.jpg"), ("grey.jpg", "photo_00002.jpg")}


def test_the_report_is_whole_and_leans_on_nothing(pictures):
    page = render(pictures, distance=4, sheet=10)
    for words in ("truncated", "transparent", "mode_l", "photo_00003.jpg", "smaller.jpg", pictures.root_hash, "found"):
        assert words in page, words
    assert "{{" not in page
    assert not [mark for mark in ("http://", "https://", 'src="/', "<script", "href=") if mark in page]
    assert page.count("data:image/jpeg;base64,") >= 10 + 4 + 2
    assert page.count("not shown") == 1  # the truncated one; the invisible one has its thumbnail
    first = page.index("base64,") + len("base64,")
    with Image.open(io.BytesIO(base64.b64decode(page[first : page.index('"', first)]))) as image:
        assert max(image.size) <= 112


def test_the_report_of_a_damaged_version_shows_the_rest(pictures, tmp_path):
    shutil.copytree(pictures.root, tmp_path / "data")
    version = open_version(str(tmp_path / "data"))
    whole, row = render(version, distance=4, sheet=100), next(version.rows())
    path = Path(version.shard_uri(row["shard"]))
    path.write_bytes(path.read_bytes()[: row["offset"] + row["size"] // 2])
    cut = render(version, distance=4, sheet=100)
    assert "damaged" not in whole
    assert 0 < cut.count("damaged: see verify") < cut.count("<figure")
    assert cut.count("<figure") == whole.count("<figure")
    path.unlink()
    gone = render(version, distance=4, sheet=100)
    assert gone.count("damaged: see verify") >= cut.count("damaged: see verify")
    assert gone.count("<figure") == whole.count("<figure")
