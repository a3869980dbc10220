"""Near-duplicates: nobody is missed and nothing invented, against comparing all with all."""

import base64
import io
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.sparse.csgraph import minimum_spanning_tree

from adaconv.data.ingest import check_codecs, recipe_of
from adaconv.data.manifest import open_version
from adaconv.data.report import render
from adaconv.data.similar import Pair, seen_in, similar_pairs
from adaconv.errors import DatasetError
from tests.helpers import RECIPE, build_version


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


def clusters(count, seed):
    """Hashes of few kinds, a few bits beside one another, some of them twice."""
    rng = np.random.default_rng(seed)
    hashes = rng.choice(draw_hashes(6, 0), count)
    for _ in range(4):
        hashes ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
    return np.concatenate([hashes, hashes[: count // 5]])


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_two_of_a_kind_are_one_pair(distance):
    hashes, others = np.unique(draw_hashes(150, 0)), np.unique(draw_hashes(120, 1))
    others[:20] = hashes[:20] ^ np.uint64(5)
    assert similar_pairs(hashes, distance=distance) == brute(hashes, distance)
    ours, every = similar_pairs(hashes, distance=distance, others=others), brute(hashes, distance, others)
    assert set(ours) <= set(every)
    assert nearest_of(ours) == nearest_of(every)


@pytest.mark.parametrize("distance", [0, 2, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_many_of_a_kind_are_joined_by_their_shortest_links(distance, seed):
    hashes = clusters(150, seed)
    ours, every = similar_pairs(hashes, distance=distance), brute(hashes, distance)
    assert set(ours) <= set(every)
    assert parts_of(ours, len(hashes)) == parts_of(every, len(hashes))
    lengths = np.zeros((len(hashes), len(hashes)))
    for pair in every:
        lengths[pair.first, pair.second] = 1 + pair.distance  # 0 would be no link
    forest = minimum_spanning_tree(lengths)
    assert len(ours) == forest.nnz
    assert sum(1 + pair.distance for pair in ours) == forest.sum()


@pytest.mark.parametrize("distance", [0, 2, 4, 7])
def test_between_two_sets_each_is_paired_with_the_nearest(distance):
    hashes, others = clusters(150, 0), clusters(110, 1)
    others[:30] = hashes[:30]
    ours, every = similar_pairs(hashes, distance=distance, others=others), brute(hashes, distance, others)
    assert set(ours) <= set(every)
    assert nearest_of(ours) == nearest_of(every)
    assert len(ours) == len(set(ours)) <= len(hashes) + len(others)


def nearest_of(pairs):
    """Bits to the nearest of the other set, of the rows of both."""
    bits = {}
    for pair in pairs:
        for side, row in (("first", pair.first), ("second", pair.second)):
            bits[side, row] = min(pair.distance, bits.get((side, row), 64))
    return bits


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


def test_thousands_of_nearly_black_images_are_not_millions_of_pairs():
    """All near one another, no two alike: 8 million pairs."""
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    hashes = np.unique([a | b | c for a in bits[:20] for b in bits[20:40] for c in bits[40:60]])[:4000]
    tracemalloc.start()
    pairs = similar_pairs(hashes, distance=6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == len(hashes) - 1
    assert {pair.distance for pair in pairs} == {2}
    assert peak < 100e6


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


def test_pictures_that_another_release_hashed_are_not_compared(photos, tmp_path):
    version = build_version(photos, str(tmp_path / "data"))
    hashes = version.samples(["phash"])["phash"].to_numpy()
    assert len(seen_in(version, hashes)) == len(hashes)
    recipe = {name: value for name, value in recipe_of(RECIPE).items() if name != "phash"}
    with pytest.raises(DatasetError, match="expected perceptual hashes of kind 2, found kind 1, of another release"):
        seen_in(replace(version, recipe=recipe), hashes)
    with pytest.raises(DatasetError, match="of another release"):  # nor are they mixed in one version
        check_codecs(recipe)
    check_codecs(recipe_of(RECIPE))
