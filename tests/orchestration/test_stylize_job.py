"""Stylization jobs on real Ray: every pair once, whatever is killed; what is broken is named."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops, ImageStat, PngImagePlugin

from adaconv import storage
from adaconv.config.stylize import StylizeConfig, TileConfig
from adaconv.data.synthetic import generate_paintings, generate_photos
from adaconv.orchestration import stylize_job
from adaconv.orchestration.stylize_plan import Plan
from adaconv.stylize.books import Books
from adaconv.stylize.inputs import list_items, sha256_of
from adaconv.stylize.outputs import INDEX, Published, read_recipe
from adaconv.stylize.pairing import Pair
from adaconv.stylize.pictures import shrink
from adaconv.stylize.stylizer import Stylizer
from adaconv.stylize.trace import trace_outputs
from tests.helpers import build_version, save_checkpoint
from tests.servers import REPO

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))[1]


def command(model, contents, styles, output, *flags):
    told = ("--model", model, "--content", contents, "--style", styles, "--output", output)
    small = ("--options.content-side", 64, "--options.style-side", 32, "--scaling.threads-per-actor", 1)
    return [sys.executable, str(REPO / "pipelines" / "stylize.py"), *map(str, (*told, *small, *flags))]


IN_BLOCKS = (
    "import sys\n"
    "from adaconv.orchestration import stylize_job\n"
    "from pipelines.stylize import main\n"
    "stylize_job._BLOCKS_AT_MOST = int(sys.argv[1])\n"
    "sys.exit(main(sys.argv[2:]))\n"
)


def stylize(cluster, *arguments, code=0):
    done = subprocess.run(
        command(*arguments), env=cluster.environment, capture_output=True, text=True, check=False, cwd=REPO
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done


def books_of(output):
    return json.loads(storage.read_bytes(storage.join(str(output), "result.json")))["books"]


def hashes_of(output):
    """sha256 of every picture by its path. Hidden files are what a killed worker was writing aside."""
    root = storage.join(str(output), "images")
    return {e.path: hashlib.sha256(storage.read_bytes(e.uri)).hexdigest() for e in storage.walk(root)}


def index_of(output):
    return pq.read_table(Path(output) / "index.parquet").to_pylist()


def few(folder, count, target):
    target.mkdir()
    for path in sorted(p for p in folder.iterdir() if p.is_file())[:count]:
        shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def contents(photos, tmp_path_factory):
    return few(photos, 4, tmp_path_factory.mktemp("c") / "contents")


@pytest.fixture(scope="module")
def styles(paintings, tmp_path_factory):
    return few(paintings, 3, tmp_path_factory.mktemp("s") / "styles")


@pytest.fixture(scope="module")
def grid(cluster, model, contents, styles, tmp_path_factory):
    output = tmp_path_factory.mktemp("grid") / "out"
    stylize(cluster, model, contents, styles, output)
    return output


@pytest.mark.slow
def test_a_grid_again_makes_nothing_and_another_option_everything(cluster, model, contents, styles, grid):
    assert books_of(grid) == {"pairs": 12, "done": 12, "skipped": 0, "failed": 0}
    before = hashes_of(grid)
    assert len(before) == len(set(before.values())) == 12
    one = next(iter(before))
    (grid / "images" / one).write_bytes((grid / "images" / one).read_bytes()[:-9])  # a disk that lost its last bytes
    again = stylize(cluster, model, contents, styles, grid)
    assert books_of(grid) == {"pairs": 12, "done": 1, "skipped": 11, "failed": 0}
    assert hashes_of(grid) == before
    other = stylize(cluster, model, contents, styles, grid, "--options.alpha", 0.5, "--options.format", "jpeg")
    told = [" more files in" in done.stdout + done.stderr for done in (again, other)]
    assert told == [False, True], other.stdout
    assert f"12 more files in {grid}/images are of other models, options or pairs" in other.stdout + other.stderr
    assert books_of(grid)["done"] == 12
    after = hashes_of(grid)
    assert {path: after[path] for path in before} == before
    assert len(after) == 24
    assert len(list((grid / "styles").iterdir())) == 3


@pytest.mark.slow
def test_a_long_job_of_one_content_says_how_far_it_is(cluster, model, contents, styles, tmp_path):
    """Its rows come all at once, when the last output is made."""
    content, style = sorted(contents.iterdir())[0], sorted(styles.iterdir())[0]
    rows = "".join(f"{content.name},{style.name},{number / 80}\n" for number in range(80))
    (tmp_path / "pairs.csv").write_text("content,style,alpha\n" + rows)
    big = tmp_path / "contents" / content.name
    big.parent.mkdir()
    with Image.open(content) as image:
        image.resize((900, 900)).save(big)
    flags = ("--pairs", tmp_path / "pairs.csv", "--options.content-side", 900)
    done = stylize(cluster, model, big.parent, styles, tmp_path / "out", *flags)
    told = [int(number) for number in re.findall(r"stylize (\d+)/80 ", done.stdout + done.stderr)]
    assert told == sorted(told)
    assert told[-1] == 80
    assert any(0 < number < 80 for number in told), told


@pytest.mark.slow
@pytest.mark.parametrize("given", ["zip", "version", "parquet", "s3", "packs"])
def test_contents_and_styles_come_from_everywhere(given, cluster, model, contents, styles, grid, tmp_path, bucket):
    """The same pictures, wherever they lie, give the same outputs."""
    wanted = {value for path, value in hashes_of(grid).items() if path.endswith(".png")}
    names = sorted(p.name for p in contents.iterdir())
    source, style, output = contents, styles, tmp_path / "out"
    if given == "zip":
        source = tmp_path / "contents.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(contents / name, name)
    elif given == "version":
        build_version(contents, str(tmp_path / "data"))
        source = tmp_path / "data"
    elif given == "parquet":
        cells = [{"bytes": (contents / name).read_bytes(), "path": name} for name in names]
        pq.write_table(pa.table({"n": range(4), "picture": cells}), tmp_path / "x.parquet", row_group_size=3)
        source = f"{tmp_path / 'x.parquet'}#picture"
    elif given == "s3":
        source, output = f"{bucket}/contents", f"{bucket}/out"
        for name in names:
            storage.publish_bytes(f"{source}/{name}", (contents / name).read_bytes())
    else:
        style = grid / "styles"
    stylize(cluster, model, source, style, output)
    assert books_of(output) == {"pairs": 12, "done": 12, "skipped": 0, "failed": 0}
    if given == "s3":
        stylize(cluster, model, source, style, output)
        assert books_of(output) == {"pairs": 12, "done": 0, "skipped": 12, "failed": 0}
    if given == "version":  # images of a version may have been encoded anew
        assert len(hashes_of(output)) == 12
    else:
        assert pixels_of(output) == pixels_of(grid, only=set(hashes_of(grid)) if wanted else None)


def pixels_of(output, only=None):
    """A hash of each PNG's pixels, by the names of its content and style."""
    found = {}
    for entry in storage.walk(storage.join(str(output), "images")):
        data = storage.read_bytes(entry.uri)
        recipe = read_recipe(data)
        if recipe.options["alpha"] == 1:
            with Image.open(io.BytesIO(data)) as image:
                style = Path(recipe.style).name.partition("-")[0].removesuffix(".jpg")
                found[recipe.content, style] = hashlib.sha256(image.tobytes()).hexdigest()
    return found


@pytest.mark.slow
def test_pairs_of_a_file_have_options_of_their_own(cluster, model, contents, styles, tmp_path):
    names, ways = (sorted(p.name for p in folder.iterdir()) for folder in (contents, styles))
    (tmp_path / "pairs.csv").write_text(
        f"content,style,alpha,color,style_side\n{names[0]},{ways[0]},,,\n{names[0]},{ways[0]},0.5,,\n"
        f"{names[2]},{ways[1]},,luminance,48\n{names[0]},{ways[0]},0.5,,\n"
    )
    output = tmp_path / "out"
    stylize(cluster, model, contents, styles, output, "--pairs", tmp_path / "pairs.csv")
    rows = index_of(output)
    assert [(row["content"], row["style"], json.loads(row["options"])) for row in rows] == [
        (names[0], ways[0], {}),
        (names[0], ways[0], {"alpha": 0.5}),
        (names[2], ways[1], {"color": "luminance", "style_side": 48}),
    ]
    assert len({row["output"] for row in rows}) == 3
    (tmp_path / "pairs.csv").write_text(f"content,style,alpha\n{names[0]},{ways[0]},2\n")
    done = stylize(cluster, model, contents, styles, output, "--pairs", tmp_path / "pairs.csv", code=2)
    assert "row 1: alpha: Input should be less than or equal to 1, found '2'" in done.stderr
    stylize(cluster, model, contents, styles, tmp_path / "r", "--pairs", "random:2", "--seed", 5)
    assert books_of(tmp_path / "r")["pairs"] == 8


@pytest.mark.slow
def test_mixtures_are_styles(cluster, model, contents, styles, tmp_path):
    """Made by their table, again from a recipe without the job's packs, and found by who asks for one part."""
    first, second, third = (shutil.copy(path, tmp_path) for path in sorted(styles.iterdir()))
    table, output = tmp_path / "mixtures.csv", tmp_path / "out"
    names = [Path(path).name for path in (first, second, third)]
    rows = f"dusk 0.3,{names[0]},3\ndusk 0.3,{names[1]},1\ndusk 0.3,{names[2]},0\ndawn,{names[2]},\ndawn,{first},\n"
    table.write_text(f"name, style, weight\n{rows}")
    stylize(cluster, model, contents, table, output, "--limit-contents", 1)
    assert books_of(output) == {"pairs": 2, "done": 2, "skipped": 0, "failed": 0}
    packs_made = {path.name.rpartition("-")[0] for path in (output / "styles").iterdir()}
    assert packs_made == {"dusk-0.3", "dawn", *(Path(name).stem for name in names)}
    stylizer = Stylizer.from_folder(model)
    packs = [stylizer.style_pack(Image.open(path), side=32) for path in (first, second)]
    content = Image.open(sorted(contents.iterdir())[0]).convert("RGB")
    (dusk,), (dawn,) = (list((output / "images" / name).iterdir()) for name in ("dusk-0.3", "dawn"))
    wanted = stylizer.stylize(shrink(content, 64), packs, weights=[3, 1])
    apart = ImageStat.Stat(ImageChops.difference(Image.open(dusk), wanted))
    assert max(most for _, most in apart.extrema) <= 1  # of 255: sums in another order
    for part, outputs in ((first, {str(dusk), str(dawn)}), (third, {str(dawn)})):
        assert {one.uri for one in trace_outputs(str(output), {sha256_of(Path(part))}, set())} == outputs

    shutil.rmtree(output / "styles")
    again = [sys.executable, str(REPO / "pipelines" / "stylize.py"), "--replay", str(dusk)]
    again += ["--content", str(contents), "--style", str(table), "--model", model]
    done = subprocess.run(again, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"same_bytes": true' in done.stdout
    table.write_text(f"name,style,weight\n{rows.replace(',3', ',2')}")
    done = subprocess.run(again, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "dusk 0.3 is a mixture; expected its table as --style, with the rows that it had then" in done.stderr

    Path(third).write_bytes(b"no picture")
    stylize(cluster, model, contents, table, output, "--limit-contents", 1, code=1)
    (failed,) = [row for row in index_of(output) if row["state"] == "failed"]
    assert failed["style"] == "dawn"
    assert failed["reason"].startswith(f"style not_an_image: {names[2]}, a part:")


BROKEN = ("cut.jpg", "nothing.jpg", "text.jpg", "bomb.png", "overwritten.jpg")


@pytest.fixture
def damaged(contents, tmp_path):
    folder = few(contents, 2, tmp_path / "damaged")
    good = sorted(contents.iterdir())[0].read_bytes()
    (folder / "cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>not found</html>")
    middle = len(good) // 2
    (folder / "overwritten.jpg").write_bytes(good[:middle] + b"\xff\xd9\xff\xff" * 20 + good[middle + 80 :])
    Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    return folder


def test_thousands_of_failures_are_counted_and_a_hundred_told(tmp_path):
    told = dict.fromkeys(INDEX.names) | {"style": "s.jpg", "state": "failed", "reason": "content truncated"}
    config = StylizeConfig(model="m", content=("c",), style=("s",), output=str(tmp_path))
    with Books(tmp_path / "rows", 3000) as books:
        for number in range(3000):
            books.enter(number, told | {"content": f"{number}.jpg"})
        result = stylize_job._close_books(config, "m", books, [], [], Published.of(str(tmp_path)))
    assert result["books"]["failed"] == pq.read_metadata(result["index"]).num_rows == 3000
    assert len(result["failures"]) == 100
    assert "and 2995 more; the others are in" in result["error"]
    assert "the index names all" in result["error"]


def test_the_gallery_shows_the_first_pairs_of_its_first_contents_and_columns():
    more = {"alpha": 0.5}
    pairs = [Pair(0, 2), Pair(0, 0, more), Pair(0, 0), Pair(1, 1), Pair(1, 0), Pair(2, 0), Pair(2, 1), Pair(3, 0)]
    shows = {"max_contents": 3, "max_styles": 3, "max_outputs": 4}
    config = StylizeConfig(model="m", content=("c",), style=("s",), output="o", gallery=shows)
    # Columns: style 2, style 0 with alpha, style 0, style 1; the last is one too many, and so are two of the outputs.
    assert stylize_job._columns_of_shown(Plan([], [], pairs), config) == {0: 0, 1: 1, 2: 2, 4: 2}


def test_the_gallery_shows_pairs_from_anywhere_in_the_lists():
    """Two of 2,000 contents and 300 styles, the gallery having room for 500 and 100."""
    config = StylizeConfig(model="m", content=("c",), style=("s",), output="o")
    assert stylize_job._columns_of_shown(Plan([], [], [Pair(1200, 201), Pair(1201, 200)]), config) == {0: 0, 1: 1}


@pytest.mark.parametrize(("jobs", "blocks"), [(12, 12), (100_000, 4096)])
def test_a_hundred_thousand_contents_are_handed_out_some_at_a_time(jobs, blocks, monkeypatch):
    """Ray takes as long to hand one out, and to prepare for it, as a GPU does to stylize it. Cells go as they lie."""
    asked = []

    class Asked(Exception):
        pass

    def from_items(items, *, override_num_blocks):
        asked.append((len(items), override_num_blocks))
        assert [item["place"] for item in items] == sorted(item["place"] for item in items)
        raise Asked

    monkeypatch.setattr(stylize_job, "set_up_ray_data", lambda: None)
    monkeypatch.setattr(stylize_job.ray, "cluster_resources", dict)
    monkeypatch.setattr(stylize_job.ray.data, "from_items", from_items)
    config = StylizeConfig(model="m", content=("c",), style=("s",), output="o")
    cells = [{"kind": "cell", "uri": "t.parquet", "place": (n % 7, n)} for n in range(jobs)]
    with pytest.raises(Asked):
        next(stylize_job._on_actors(object, cells, {}, config, 1))
    assert asked == [(jobs, blocks)]


@pytest.mark.slow
def test_what_is_broken_is_named_and_the_rest_made(cluster, model, damaged, styles, tmp_path):
    shutil.copy(damaged / "cut.jpg", tmp_path / "s.jpg")
    ways = few(styles, 2, tmp_path / "ways")
    shutil.copy(damaged / "cut.jpg", ways / "broken style.jpg")
    done = stylize(cluster, model, damaged, ways, tmp_path / "out", code=1)
    books = books_of(tmp_path / "out")
    assert books == {"pairs": 21, "done": 4, "skipped": 0, "failed": 17}
    told = " ".join(json.loads((tmp_path / "out" / "result.json").read_text())["failures"])
    for name in (*BROKEN, "broken style.jpg"):
        assert name in told, name
    for reason in ("content truncated", "content empty", "content not_an_image", "content too_many_pixels"):
        assert reason in told
    assert "17 of 21 outputs could not be made" in done.stderr
    assert len(hashes_of(tmp_path / "out")) == 4
    stylize(cluster, model, damaged, ways, tmp_path / "out", "--budget.share", 0.9)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "done"
    assert result["books"] == {"pairs": 21, "done": 0, "skipped": 4, "failed": 17}
    assert " ".join(result["failures"]) == told


SHARED = REPO.parent / "shared" / "data" / "broken"
UNUSABLE = {
    "bomb_30000x30000.png": "too_many_pixels",
    "bomb_warning_10000x10000.png": "too_many_pixels",
    "header_only.png": "damaged_header",
    "text_renamed.jpg": "not_an_image",
    "truncated.jpg": "truncated",
    "zero_byte.jpg": "empty",
}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no shared broken files here")
def test_files_as_they_are_found_are_made_or_named(cluster, model, contents, styles, tmp_path):
    folder = few(contents, 2, tmp_path / "contents")
    for path in SHARED.iterdir():
        shutil.copy(path, folder)
    output = tmp_path / "out"
    stylize(cluster, model, folder, few(styles, 1, tmp_path / "s"), output, code=1)
    failed = {row["content"]: row["reason"] for row in index_of(output) if row["state"] == "failed"}
    assert {name: reason.split()[1].rstrip(":") for name, reason in failed.items()} == UNUSABLE
    assert books_of(output)["done"] == len(list(folder.iterdir())) - len(UNUSABLE)
    told = " ".join(json.loads((output / "result.json").read_text())["failures"])
    assert all(name in told for name in UNUSABLE)


@pytest.fixture
def alone(model, tmp_path, monkeypatch):
    """What an actor is made with, without a cluster: for a job into tmp_path / "out", of a content that killed some."""
    monkeypatch.setattr(stylize_job.ray, "get", lambda given: given)
    files = {path.name: path.read_bytes() for path in Path(model).iterdir()}

    def shared(deaths=0, **settings):
        told = {"model": "m", "content": ("c",), "style": ("s",), "output": str(tmp_path / "out"), **settings}
        begin = SimpleNamespace(remote=lambda what: 1 + deaths * what.startswith("content"))
        beginnings = SimpleNamespace(begin=begin, end=SimpleNamespace(remote=lambda begun: None))
        given = {"files": files, "config": StylizeConfig(**told).model_dump_json(), "model": "m", "threads": None}
        return {**given, "on_gpu": False, "beginnings": beginnings}

    return shared


@pytest.mark.parametrize("refusal", ["too_many_pixels", "worker_died"])
def test_outputs_that_are_there_stay_in_the_books_of_a_content_that_is_refused(refusal, alone, contents, styles):
    """Two outputs are there when a third is asked for."""
    (content,), ways = list_items((str(contents),), flag="-")[:1], list_items((str(styles),), flag="-")

    def outputs(numbers, deaths=0, shown=frozenset({0, 1, 2}), **tile):
        shared = alone(deaths, tile=TileConfig(**tile))
        maker = stylize_job._PackMaker(**shared)
        packs = [maker({"style": n, "side": 256, "shown": True, **way.to_row()})[0] for n, way in enumerate(ways)]
        actor = stylize_job._ContentStylizer(packs=packs, shown=shown, there=(), **shared)
        pairs = json.dumps([(n, n, {}) for n in numbers])
        return actor({"content": 0, "pairs": pairs, **content.to_row()})

    rows = outputs([0, 1], shown={1})
    assert [row["state"] for row in rows] == ["done", "done"]
    # The content's own goes with the first of its pairs that the gallery shows.
    shown_of = {name: [bool(row[name]) for row in rows] for name in ("thumbnail", "content_thumbnail")}
    assert shown_of == {"thumbnail": [False, True], "content_thumbnail": [False, True]}
    how = {"max_megapixels": 0.001} if refusal == "too_many_pixels" else {"deaths": 5}
    rows = outputs([0, 1, 2], **how)
    assert [row["state"] for row in rows] == ["skipped", "skipped", "failed"]
    assert [bool(row["output"] and row["thumbnail"]) for row in rows] == [True, True, False]
    assert [row["reason"].partition(":")[0] for row in rows] == ["", "", f"content {refusal}"]


def test_a_style_that_lies_twice_and_a_pack_of_its_own_side_are_what_they_are_called(alone, contents, styles, tmp_path):
    """The output is one: made once, and found by both pairs. A pack keeps the side that it was read at."""
    (content,), one = list_items((str(contents),), flag="-")[:1], next(iter(sorted(styles.iterdir())))
    for folder in ("s/a", "s/b"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(one, tmp_path / folder / "monet.jpg")
    maker = stylize_job._PackMaker(**alone())

    def outputs(source, side):
        ways = list_items((str(source),), flag="-", packs=True)
        told = {"side": side, "shown": True}
        packs = [maker({"style": n, **told, **way.to_row()})[0] for n, way in enumerate(ways)]
        actor = stylize_job._ContentStylizer(packs=packs, shown={1}, there=(), **alone(options={"style_side": side}))
        pairs = json.dumps([(n, n, {}) for n in range(len(ways))])
        return actor({"content": 0, "pairs": pairs, **content.to_row()})

    rows = outputs(tmp_path / "s", 32)
    assert [(row["style"], row["state"]) for row in rows] == [("a/monet.jpg", "done"), ("b/monet.jpg", "skipped")]
    assert rows[0]["output"] == rows[1]["output"]
    assert rows[1]["thumbnail"]
    (row,) = outputs(tmp_path / "out" / "styles", 64)
    assert (row["state"], row["output"].rpartition("-")[2]) == ("skipped", rows[0]["output"].rpartition("-")[2])
    # Images of a mixture are read at the job's side, whatever its packs were read at.
    (pack,) = (tmp_path / "out" / "styles").iterdir()
    (tmp_path / "mixed.csv").write_text(f"name,style\nmixed,{pack}\nmixed,{tmp_path}/s/a/monet.jpg\n")
    (row,) = outputs(tmp_path / "mixed.csv", 64)
    assert read_recipe((tmp_path / "out" / row["output"]).read_bytes()).options["style_side"] == 64


def test_a_style_that_memory_has_no_room_for_is_a_named_failure(alone, tmp_path, monkeypatch):
    """The others of its job are made."""
    Image.new("RGB", (400, 50)).save(tmp_path / "s.png")
    (item,) = list_items((str(tmp_path / "s.png"),), flag="-")
    maker = stylize_job._PackMaker(**alone(tile={"max_memory_gb": 1}))

    def reason(side):
        return maker({"style": 0, "side": side, "shown": True, **item.to_row()})[0]["reason"]

    assert reason(256) == ""
    assert reason(1300).startswith("style out_of_memory: 400x50 would be read at 10400x1300, beyond 1 GB")
    monkeypatch.setattr(Stylizer, "style_pack", Mock(side_effect=RuntimeError("cannot allocate memory\nat ...")))
    assert reason(255).startswith("style out_of_memory: cannot allocate memory; give actors more")


@pytest.mark.slow
def test_a_pack_of_another_model_is_refused_by_name(cluster, contents, grid, tmp_path):
    other = save_checkpoint(tmp_path, step=8)[1]
    done = stylize(cluster, other, contents, grid / "styles", tmp_path / "out", code=2)
    assert re.search(r"painting_\d+-\w+\.safetensors was made by model \w{12}, this one is", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "flags"),
    [("images", ()), ("images", ("--tile.side", 64)), ("packs", ())],
    ids=["whole", "tiled", "packs"],
)
def test_a_replay_gives_the_same_bytes(given, flags, cluster, model, contents, styles, grid, tmp_path):
    output = tmp_path / "out"
    styles = grid / "styles" if given == "packs" else styles
    how = ("--limit-contents", 2, "--limit-styles", 2, "--options.alpha", 0.7, "--options.color", "coral", *flags)
    stylize(cluster, model, contents, styles, output, *how)
    for name in sorted(hashes_of(output))[:2]:
        script = [sys.executable, str(REPO / "pipelines" / "stylize.py"), "--replay", str(output / "images" / name)]
        script += ["--content", str(contents), "--model", model]
        done = subprocess.run(script, env=cluster.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert '"same_bytes": true' in done.stdout
    path = output / "images" / name
    path.write_bytes(path.read_bytes().replace(b"IEND", b"IEND", 1) + b"x")
    done = subprocess.run(script, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "it has other bytes" in done.stderr
    shutil.rmtree(output / "styles")
    done = subprocess.run(script, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "as --style" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 1000])
def test_pictures_that_kill_their_decoder_do_not_hold_up_a_job(cluster, model, contents, styles, tmp_path, together):
    """A style is named a failure; a content of full size is made in tiles, which have another decoder.

    No other picture is charged with their deaths, also where an actor is handed several and begins all of them anew.
    """
    poison = PngImagePlugin.PngInfo()
    poison.add_text("poison", "pixels")  # see conftest.py
    folders = {"content": few(contents, 2, tmp_path / "c"), "style": few(styles, 1, tmp_path / "s")}
    for name, folder in folders.items():
        Image.new("RGB", (80, 80), "red").save(folder / f"the deadly {name}.png", pnginfo=poison)
    told = command(model, *folders.values(), tmp_path / "out", "--options.content-side", None)
    told[1:2] = ["-c", IN_BLOCKS, str(1000 // together)]
    done = subprocess.run(told, env=cluster.environment, capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    books = books_of(tmp_path / "out")
    assert (books["done"] + books["skipped"], books["failed"]) == (3, 3)  # skipped: made by one that died later
    assert "style worker_died: 5 workers died at it" in done.stderr
    assert "deadly style.png" in done.stderr
    assert {row["tile"] for row in index_of(tmp_path / "out") if row["content"] == "the deadly content.png"} == {0, 256}


@pytest.mark.slow
def test_who_counts_the_deaths_may_die(cluster, model, contents, styles, tmp_path):
    process = subprocess.Popen(
        command(model, contents, styles, tmp_path / "out"),
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
    )
    while process.poll() is None and not (tmp_path / "out" / "images").exists():
        time.sleep(0.02)
    (counter,) = cluster.workers("_Beginnings")
    counter.kill()
    told, _ = process.communicate()
    assert process.returncode == 0, told[-3000:]
    assert books_of(tmp_path / "out") == {"pairs": 12, "done": 12, "skipped": 0, "failed": 0}


@pytest.mark.slow
def test_what_killed_processes_were_writing_is_removed_when_it_is_old(tmp_path):
    old = [".written.tmp-0123abcd", "styles/.a.safetensors.tmp-01", "images/monet/.cat-01.png.tmp-ab"]
    young = "images/monet/.cat-02.png.tmp-cd"
    kept = ["index.parquet", "images/monet/cat-01.png", ".git/.a.tmp-01", young]
    for name in (*old, *kept):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if name != young:
            os.utime(path, (0, 0))
    stylize_job._sweep(str(tmp_path))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_a_killed_worker_and_a_killed_driver_leave_every_pair_once(cluster, model, contents, styles, grid, tmp_path):
    told = (cluster, model, contents, styles, grid)  # so small a job may be over before somebody could be killed
    assert any(kill_often(*told, tmp_path / str(time), pairs=12, rounds=1, workers=1) for time in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "s3"])
def test_twenty_random_kills_leave_every_pair_once(where, cluster, model, tmp_path, bucket):
    """500 pairs; fifteen workers and five drivers die at random moments."""
    generate_photos(tmp_path / "contents", 25, seed=1, size=144)
    generate_paintings(tmp_path / "styles", 20, seed=1, size=144)
    told = (model, tmp_path / "contents", tmp_path / "styles")
    stylize(cluster, *told, tmp_path / "undisturbed")
    root = tmp_path if where == "local" else bucket
    output = storage.join(str(root), "killed")
    assert kill_often(cluster, *told, tmp_path / "undisturbed", output, pairs=500, rounds=5, workers=3)


def kill_often(cluster, model, contents, styles, undisturbed, output, *, pairs, rounds, workers):
    """In each round so many workers are killed, then the driver, each after a random number of new outputs.

    Returns:
        whether all but one could be killed: there were some left to kill.
    """
    draw = random.Random(7)
    made: dict[str, float] = {}
    killed = again = 0
    for _ in range(rounds):
        process = subprocess.Popen(
            command(model, contents, styles, output, "--scaling.num-actors", 2),
            env=cluster.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=REPO,
        )
        for victim in (*["worker"] * workers, "driver"):
            wanted = len(made) + draw.randint(1, max(1, pairs // (2 * rounds * (workers + 1))))
            while process.poll() is None and len(written(output)) < wanted:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.05))
            at_work = []
            while victim == "worker" and process.poll() is None and not (at_work := cluster.workers("ContentStylizer")):
                time.sleep(0.02)  # those killed before are still being started anew
            if at_work:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(draw.choice(at_work).pid, signal.SIGKILL)
                    killed += 1
            elif victim == "driver" and process.poll() is None:
                process.kill()
                killed += 1
            after = written(output)
            again += sum(after[name] != stamp for name, stamp in made.items())
            made = after
        process.wait()
        time.sleep(1)  # its actors end with it
    left = written(output)
    stylize(cluster, model, contents, styles, output)
    after = written(output)
    again += sum(after[name] != stamp for name, stamp in {**made, **left}.items())
    print(f"{pairs} pairs, {killed} killed; {len(left)} outputs were there before the last run; {again} made again")
    books = books_of(output)
    assert books["failed"] == 0
    assert books["done"] + books["skipped"] == books["pairs"] == pairs
    assert books["skipped"] >= len(left)
    wanted = {name: value for name, value in hashes_of(undisturbed).items() if name in after}
    assert hashes_of(output) == wanted
    assert len(wanted) == pairs
    assert again <= 2 * killed  # what two actors had in flight
    return killed >= rounds * (workers + 1) - 1


def written(output):
    return {e.path: e.changed for e in storage.walk(storage.join(str(output), "images"))}
