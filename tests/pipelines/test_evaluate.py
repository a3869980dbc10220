"""pipelines/evaluate.py against a real registry: scores, a page, and an alias that is earned."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from adaconv.config.evaluate import EvaluateConfig, ProtocolConfig
from adaconv.errors import TrackingError
from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.registry import history_of, named_by, promote, rollback
from pipelines import evaluate
from tests.helpers import save_checkpoint

SMALL = {"protocol.contents": 3, "protocol.styles": 4, "protocol.side": 64, "protocol.style-side": 64}
SMALL |= {"judge.weights": "seeded:0", "judge.widths": "8 16 16 32"}
ANYTHING = {f"gate.{name}": 1000 for name in ("content", "structure", "style", "gram", "colour", "identity")}


def opened(uri, root, datasets=None):
    told = {"experiment": "test", "identity": "run-1", "name": "run-1", "params": {}, "tags": {}, "config_yaml": ""}
    return open_run(uri=uri, datasets=datasets or {}, spool_directory=root / "spool", **told)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A run with two checkpoints: uri, their folders."""
    root = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    tracker = opened(uri, root)
    saved = []
    for step in (11, 13):  # random networks that happen to be nearer to the styles than the contents are
        tracker.metrics({"train/loss": 1.0}, step=step)
        saved.append(save_checkpoint(root / "run-1" / "checkpoints", step, **tracker.reference())[1])
        tracker.checkpoint(saved[-1], step=step)
    assert close_run(tracker, "FINISHED")
    return uri, saved


@pytest.fixture
def run(capsys, photos, paintings, tmp_path):
    """A function: flags -> exit code, result.json, what was said."""

    def call(*argv, **flags):
        told = [str(word) for name, value in (SMALL | flags).items() for word in (f"--{name}", *str(value).split())]
        pictures = ["--content", str(photos), "--style", str(paintings), "--output", str(tmp_path / "out")]
        try:
            code = evaluate.main([*pictures, *told, *map(str, argv)])
        except SystemExit as exit_:
            code = exit_.code
        written = capsys.readouterr()
        assert "Traceback" not in written.out + written.err
        result = tmp_path / "out" / "result.json"
        return code, json.loads(result.read_text()) if result.exists() else None, written.out + written.err

    return call


def test_the_first_gets_the_alias_and_what_is_worse_does_not(registry, run, tmp_path):
    uri, (first, second) = registry
    client = MlflowClient(uri)
    tracking = ("--tracking.uri", uri, "--promote", "champion")
    code, result, said = run("--model", first, *tracking)
    assert (code, result["promoted"]) == (0, "models:/adaconv@champion"), said
    assert named_by("adaconv", "champion", tracking_uri=uri) == "models:/adaconv/1"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "may become" in page
    assert not re.search(r"https?://|\{\{", page)
    assert page.count("<img") == 4 + 3 * (1 + 4)  # a row of styles, then each content with its outputs
    assert pq.read_table(tmp_path / "out" / "scores.parquet").num_rows == 2 * 12
    # What it got stays with the version, and the page with its run.
    version = client.get_model_version("adaconv", "1")
    noted = json.loads(version.tags[f"evaluation.{result['protocol']}"])
    assert noted["scores"] == result["scores"]
    files = [file.path for file in client.list_artifacts(version.run_id, f"evaluation/{result['protocol']}")]
    assert files == [f"evaluation/{result['protocol']}/report.html"]
    assert result["protocol"] in history_of(client, "adaconv", "champion")[0].why

    # Again, by either name: it has the alias, and nothing is moved; what the gate said stays.
    for again in ("models:/adaconv@champion", first):
        code, other, said = run("--model", again, *tracking)
        assert code == 0, said
        assert other["holder"] == "models:/adaconv/1"
        assert "gate" not in other
        assert other["scores"]["models:/adaconv/1"] == result["scores"][result["model"]]
    assert len(history_of(client, "adaconv", "champion")) == 1
    assert client.get_model_version("adaconv", "1").tags == version.tags

    # Another random network is worse in something.
    code, refused, said = run("--model", second, *tracking)
    assert (code, refused["status"]) == (1, "failed")
    assert f"{second} may not become champion: " in refused["error"]
    assert "may be worse" in refused["error"]
    assert "pipelines/evaluate.py: error: " in said
    assert "may not become" in (tmp_path / "out" / "report.html").read_text()
    assert named_by("adaconv", "champion", tracking_uri=uri) == "models:/adaconv/1"

    # Where all of that is allowed it gets the alias, and can lose it again.
    code, allowed, said = run("--model", second, *tracking, "--gate.require", "not_worse", **ANYTHING)
    assert code == 0, said
    assert set(allowed["scores"]) == {second, "models:/adaconv/1", "the contents, unchanged"}
    assert named_by("adaconv", "champion", tracking_uri=uri) == "models:/adaconv/2"
    rollback(name="adaconv", alias="champion", reason="", tracking_uri=uri)
    assert named_by("adaconv", "champion", tracking_uri=uri) == "models:/adaconv/1"


def test_an_alias_that_moved_meanwhile_is_not_moved(registry):
    uri, (first, _) = registry
    assert named_by("other", "champion", tracking_uri=uri) is None
    told = {"name": "other", "alias": "champion", "reason": "", "tracking_uri": uri}
    promote(first, held_by=None, **told)
    with pytest.raises(TrackingError, match=r"is models:/other/1 now, and was nobody when .* was compared"):
        promote(first, held_by=None, **told)


def test_without_an_alias_it_says_what_each_got(registry, run, tmp_path):
    _, (first, second) = registry
    copy = shutil.copytree(first, tmp_path / "copy")  # a checkpoint of no registry
    code, result, said = run("--model", copy, "--against", second)
    assert code == 0, said
    assert list(result["scores"]) == [str(copy), second, "the contents, unchanged"]
    assert "gate" not in result
    unchanged = result["scores"]["the contents, unchanged"]
    assert unchanged["content"] == unchanged["identity"] == [0, 0, 0]
    mean, low, high = result["scores"][second]["style"]
    assert low < mean < high
    told, low, high = result["changes"][second]["style"]
    assert told == pytest.approx(result["scores"][str(copy)]["style"][0] / mean - 1, rel=1e-4)
    assert low < told < high
    assert f"against {second}" in Path(result["report"]).read_text()


def test_pictures_that_it_was_trained_on_are_told(content_version, photos, paintings, run, tmp_path, caplog):
    """Known by what they look like: they were stored at another size. The styles' dataset is not there any more."""
    caplog.set_level("INFO")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    there, gone = f"{content_version.root}@{content_version.version}", f"{tmp_path}/gone@0123456789abcdef"
    datasets = {"content": (there, content_version.root_hash)}
    tracker = opened(uri, tmp_path, datasets | {"style": (gone, "5" * 64)})
    _, model = save_checkpoint(tmp_path / "run-1" / "checkpoints", 11, **tracker.reference())
    tracker.checkpoint(model, step=11)
    assert close_run(tracker, "FINISHED")
    code, result, said = run("--model", model, "--tracking.uri", uri)
    assert code == 0, said
    assert len(result["seen_in_training"]["content"]) == 3
    assert "3 of 3 pictures of --content, or near copies, are among those that the model was trained on" in caplog.text
    assert f"whether the style pictures are among those of {gone} is not known" in caplog.text
    pictures = {name: (str(folder),) for name, folder in (("content", photos), ("style", paintings))}
    config = EvaluateConfig(model="m", output="o", protocol=ProtocolConfig(contents=3, styles=4), **pictures)
    # One of the versions that it was trained on hides nothing of the others.
    assert evaluate._seen_in_training(config, {"content": [gone, there, gone]}) == {
        "content": result["seen_in_training"]["content"]
    }
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    for number, path in enumerate(sorted(paintings.iterdir())[:3]):
        shutil.copy(path, strangers / f"{number}.jpg")
    code, result, said = run("--model", model, "--tracking.uri", uri, "--content", strangers)
    assert code == 0, said
    assert "seen_in_training" not in result
    (strangers / "1.jpg").write_bytes((strangers / "1.jpg").read_bytes()[:5000])
    code, _, said = run("--model", model, "--tracking.uri", uri, "--content", strangers)
    assert code == 2
    assert "1 pictures of the protocol cannot be read: 1.jpg (truncated" in said


def test_what_cannot_be_noted_is_told_and_stands(registry, run, monkeypatch):
    uri, (first, _) = registry

    def refuse(*_, **__):
        raise TrackingError("no right to write")

    monkeypatch.setattr("adaconv.tracking.registry.note_evaluation", refuse)
    code, result, _ = run("--model", first, "--tracking.uri", uri, "--promote", "noted", "--name", "third")
    assert (code, result["status"], result["error"]) == (1, "failed", "no right to write")
    assert result["promoted"] == "models:/third@noted"
    monkeypatch.undo()
    code, _, said = run("--model", first, "--tracking.uri", uri, "--promote", "noted", "--name", "third")
    assert code == 0, said
    assert f"evaluation.{result['protocol']}" in MlflowClient(uri).get_model_version("third", "1").tags


def test_mistakes_are_told_in_one_line(registry, run, monkeypatch, tmp_path):
    uri, (first, _) = registry
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for argv, code, words in (
        (("--model", first, "--dry-run"), 0, "3 contents x 4 styles: 12 pairs by each model"),
        ((), 2, "required: --model"),
        (("--model", first, "--protocol.contents", "1"), 2, "protocol.contents"),
        (("--model", first, "--device", "cuda"), 2, "--device cuda: expected a GPU"),
        (("--model", tmp_path / "nothing"), 1, "found no whole checkpoint"),
        (("--model", first, "--judge.weights", tmp_path / "no.pth"), 1, "found no such file"),
        (
            ("--model", f"runs:/{'0' * 32}/model", "--tracking.uri", uri, "--promote", "champion"),
            2,
            "--promote: expected",
        ),
        (("--model", first, "--style", tmp_path / "none"), 2, "--style"),
        (
            ("--model", "models:/adaconv/latest", "--tracking.uri", uri, "--promote", "champion"),
            2,
            "--promote: expected",
        ),
        (("--model", first, "--promote", "v3"), 2, "promote"),
        (("--model", first, "--promote", ""), 2, "promote"),
        (("--model", first, "--judge.weights", "imagenett"), 1, "--judge.weights: "),
    ):
        found, _, said = run(*argv)
        assert found == code, said
        assert words in said, said
