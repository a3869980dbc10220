"""pipelines/trace.py over a small history whose every link is known: two versions, two runs, outputs of both."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from adaconv.data.synthetic import generate_paintings
from adaconv.stylize.inputs import list_items, read_item
from adaconv.stylize.outputs import INDEX, Recipe, publish_index
from adaconv.stylize.production import Limits, Options, Production, Wanted
from adaconv.stylize.stylizer import Stylizer
from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.registry import register
from adaconv.tracking.runs import INITIAL_RUN_TAG
from pipelines import trace
from tests.helpers import build_version, save_checkpoint


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Version 1 has cubists and realists, version 2 realists alone. Run 1 was trained on the one, runs 2 and 3 on the
    other, and run 3 began with the weights of run 1.
    """
    root = tmp_path_factory.mktemp("history")
    generate_paintings(root / "drawn", 6, seed=0, size=300)  # larger than what is stored: their bytes change
    for number, path in enumerate(sorted((root / "drawn").iterdir())):
        folder = root / "images" / ("Cubism" if number < 2 else "Realism")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(path, folder / path.name)
    data = str(root / "data")
    versions = [build_version(root / "images", data)]
    first = f"{data}@{versions[0].version}"
    stored = {item.source: read_item(item) for item in list_items([first], flag="--content")}
    shutil.rmtree(root / "images" / "Cubism")
    versions.append(build_version(root / "images", data))
    uri = f"sqlite:///{root / 'mlflow.db'}"
    stylizers, first_run = [], ""
    for number, version in enumerate([*versions, versions[1]], start=1):
        tracker = open_run(
            uri=uri,
            experiment="test",
            identity=f"run-{number}",
            name=f"run-{number}",
            params={},
            tags={"adaconv.content_hash": "c" * 64, "adaconv.style_hash": version.root_hash}
            | ({INITIAL_RUN_TAG: first_run} if number == 3 else {}),
            datasets={"style": (data, version.root_hash)},
            config_yaml="",
            spool_directory=root / f"run-{number}" / "spool",
        )
        _, checkpoint = save_checkpoint(root / f"run-{number}" / "checkpoints", number, **tracker.reference())
        tracker.checkpoint(checkpoint, step=number)
        assert close_run(tracker, "FINISHED")
        first_run = first_run or tracker.run_id
        if number < 3:
            register(checkpoint, name="m", alias=f"of-{number}", reason="", tracking_uri=uri)
        stylizers.append(Stylizer.from_folder(checkpoint))
    return root, uri, versions, stored, stylizers


def stylized(history, folder):
    """Outputs by model, content and style, each told apart by its name; half of them are in no index."""
    root, _, _, stored, stylizers = history
    by_style = {Path(source).parent.name: data for source, data in stored.items()}
    pictures = {"cubist": by_style["Cubism"], "realist": by_style["Realism"]}
    made, rows = {}, []
    for name, data in pictures.items():
        (root / f"{name}.jpg").write_bytes(data)
    for model, stylizer in enumerate(stylizers[:2], start=1):
        for content in pictures:
            for style in pictures:
                path = root / f"{content}.jpg"
                with Image.open(root / f"{style}.jpg") as picture:
                    pack = stylizer.style_pack(picture, side=32, source=style, source_sha256=sha256_of(root, style))
                options = Options().__dict__
                digests = (sha256_of(root, content), style, pack.source_sha256, pack.digest)
                recipe = Recipe(content, *digests, f"models:/m/{model}", stylizer.info.digest, options)
                wanted = [Wanted(0, recipe, lambda pack=pack: pack)]
                (one,) = Production(lambda s=stylizer: s, str(folder), Limits()).make(path, wanted)
                assert one.state == "done"
                made[model, content, style] = f"{folder}/{recipe.name}"
                row = {"output": recipe.name, "content_sha256": digests[0], "style_sha256": pack.source_sha256}
                rows.append(dict.fromkeys(INDEX.names) | row | {"model_digest": stylizer.info.digest, "state": "done"})
    publish_index(str(folder), rows[::2])
    return made


def sha256_of(root, name):
    from adaconv.stylize.inputs import sha256_of

    return sha256_of(root / f"{name}.jpg")


def test_everything_that_came_of_some_images_is_found_and_nothing_else(history, tmp_path):
    root, uri, versions, _, stylizers = history
    made = stylized(history, tmp_path / "out")
    argv = ["--dataset", f"{root}/data", "--label", "Cubism", "--tracking-uri", uri]
    assert trace.main([*argv, "--stylized", f"{tmp_path}/out", "--output", str(tmp_path / "trace")]) == 0
    result = json.loads((tmp_path / "trace" / "result.json").read_text())
    assert result["images"] == 2
    assert [(one["version"], one["images"]) for one in result["versions"]] == [(versions[0].version, 2)]
    assert {name for one in result["versions"] for name in one["shards"]} <= {one.name for one in versions[0].shards}
    run, tuned = sorted(result["runs"], key=lambda run: run["name"])
    assert (run["name"], run["status"], tuned["name"], tuned["models"]) == ("run-1", "FINISHED", "run-3", {})
    assert run["models"] == {stylizers[0].info.digest: ["models:/m/1", "models:/m@of-1"]}
    told = (tmp_path / "trace" / "outputs.txt").read_text().splitlines()
    assert sorted(told) == sorted(
        f"{by}\t{made[key]}"
        for key, by in {
            (1, "cubist", "cubist"): "content",
            (1, "cubist", "realist"): "content",
            (1, "realist", "cubist"): "style",
            (1, "realist", "realist"): "model",
            (2, "cubist", "cubist"): "content",
            (2, "cubist", "realist"): "content",
            (2, "realist", "cubist"): "style",
        }.items()
    )
    assert result["outputs"] == {"content": 4, "style": 2, "model": 1}
    assert f"pipelines/dataset.py remove --dataset {root}/data --label Cubism" in result["advice"]
    (tmp_path / "my data").symlink_to(root / "data")
    argv[1] = f"{tmp_path}/my data"
    assert trace.main([*argv, "--output", str(tmp_path / "trace")]) == 0
    result = json.loads((tmp_path / "trace" / "result.json").read_text())
    assert f"pipelines/dataset.py gc --dataset '{tmp_path}/my data' --keep-last 1" in result["advice"]


def test_of_what_both_versions_hold_both_runs_are_told(history, tmp_path):
    root, uri, versions, *_ = history
    argv = ["--dataset", f"{root}/data", "--source-pattern", "Realism/*", "--tracking-uri", uri]
    assert trace.main([*argv, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert {(one["version"], one["images"]) for one in result["versions"]} == {(one.version, 4) for one in versions}
    assert {run["name"] for run in result["runs"]} == {"run-1", "run-2", "run-3"}
    assert result["outputs"] == {}


def test_what_nobody_has_and_where_nothing_is_are_said(history, tmp_path, capsys):
    root, uri, *_ = history
    argv = ["--dataset", f"{root}/data", "--tracking-uri", uri]
    assert trace.main([*argv, "--label", "Cubism", "Fauvism"]) == 2
    assert "--label Fauvism: no image has it" in capsys.readouterr().err
    assert trace.main([*argv, "--label", "Cubism", "--stylized", str(tmp_path)]) == 2
    assert "expected the output folder of pipelines/stylize.py" in capsys.readouterr().err
    assert trace.main(["--dataset", f"{root}/data"]) == 2
    assert "--key, --label, --artist or --source-pattern" in capsys.readouterr().err
    assert trace.main(["--dataset", f"{root}/dato", "--label", "Cubism", "--tracking-uri", uri]) == 2
    assert f"--dataset {root}/dato: expected a dataset, found no version in it" in capsys.readouterr().err
