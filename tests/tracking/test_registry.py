"""Models of a run: what MLflow and people need of them, aliases with their history, the best and the last kept."""

import base64
import io
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from adaconv import checkpoint
from adaconv.errors import CheckpointError, TrackingError, UsageError
from adaconv.stylize.stylizer import Stylizer
from adaconv.tracking import logged_model, registry
from adaconv.tracking.logged_model import logged_models
from adaconv.tracking.mlflow_tracker import close_run, open_run, sync
from adaconv.tracking.registry import find_checkpoint, history_of, register, resolved_model, rollback, trained_on
from adaconv.tracking.results import keep_models
from pipelines import runs
from tests.helpers import save_checkpoint, swapped_profile
from tests.tracking.grids import grid_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with three checkpoints, of which the second has the lowest losses: uri, tracker, folder."""
    root = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    tracker = open_run(
        uri=uri,
        experiment="test",
        identity="run-1",
        name="run-1",
        params={"data": {"crop": 32}, "encoder": {"weights": "seeded:0"}, "train": {"learning_rate": 1e-3}},
        tags={"adaconv.content_hash": "c" * 64, "adaconv.style_hash": "5" * 64},
        datasets={"content": ("/data/photos@v1", "c" * 64), "style": ("/data/paintings@v2", "5" * 64)},
        config_yaml="",
        spool_directory=root / "run-1" / "spool",
    )
    folder = root / "run-1" / "checkpoints"
    for step, loss in ((100, 3.0), (200, 1.0), (300, 2.0)):
        for before in range(step - 99, step + 1, 11):
            tracker.metrics({"train/loss": loss, "perf/images_per_second": 7.0}, step=before)
        tracker.image("samples/grid", grid_of(3, 2, side=32, step=step), step=step)
        _, checkpoint_uri = save_checkpoint(folder, step, **tracker.reference())
        tracker.checkpoint(checkpoint_uri, step=step)
    assert close_run(tracker, "FINISHED")
    return uri, tracker, folder


@pytest.fixture(scope="module")
def versions(trained):
    """A version of each checkpoint; each was the champion in its turn."""
    uri, _, folder = trained
    return [
        register(found, name="adaconv", alias="champion", reason=f"step {step}", tracking_uri=uri)
        for step, found in checkpoint.steps_in(str(folder)).items()
    ]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_version_says_what_it_is(trained, versions):
    uri, tracker, _ = trained
    client = MlflowClient(uri)
    version = client.get_model_version_by_alias("adaconv", "champion")
    assert str(version.version) == versions[-1].version
    assert version.run_id == tracker.run_id
    card = version.description
    for words in (
        *("step 300", "`/data/photos@v1` | `" + "c" * 64, "train/loss | 2", "train.learning_rate | 0.001"),
        *(
            "US 12,340,440 B2",
            "for tests and offline runs, not for quality",
            "See `sample_grid.jpg` of the model's files",
        ),
    ):
        assert words in card, words
    mlflow.set_tracking_uri(uri)  # or registered models are looked for where somebody else was last
    local = mlflow.artifacts.download_artifacts("models:/adaconv@champion", tracking_uri=uri)
    names = {path.name for path in Path(local).iterdir()}
    assert {"MODEL_CARD.md", "sample_grid.jpg", "requirements.txt", "input_example.json", "MLmodel"} <= names
    assert not list(Path(local).rglob("*.pkl"))
    pins = (Path(local) / "requirements.txt").read_text().split()
    assert all(pin.count("==") == 1 and "+" not in pin for pin in pins)
    assert {pin.partition("==")[0] for pin in pins} >= {"torch", "mlflow", "safetensors"}
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_the_code_of_a_model_is_whole(trained, versions, tmp_path):
    """With nothing of this project on the path but what lies in the model: -S leaves out its editable installation."""
    mlflow.set_tracking_uri(trained[0])
    code = Path(mlflow.artifacts.download_artifacts("models:/adaconv@champion/code", tracking_uri=trained[0]))
    program = "import sys; sys.path += sys.argv[1:]; import adaconv.stylize.stylizer as s; print(s.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, str(code), sysconfig.get_path("purelib")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(code))


def test_a_model_takes_pixels_or_image_files_and_gives_the_same_picture(trained, versions):
    uri, _, folder = trained
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/adaconv@champion")
    rng = np.random.default_rng(0)
    content, style = (rng.integers(0, 256, (1, *size, 3), np.uint8) for size in ((40, 56), (48, 32)))
    stylizer = Stylizer.from_folder(folder / "step-00000300")
    expected = np.asarray(stylizer.stylize(Image.fromarray(content[0]), stylizer.style_pack(Image.fromarray(style[0]))))
    by_pixels = model.predict({"content": content, "style": style})
    assert (by_pixels.shape, by_pixels.dtype) == ((1, 40, 56, 3), np.uint8)
    files = {"content": png(content[0]), "style": png(style[0])}
    by_bytes = model.predict(pd.DataFrame([files]))["stylized"][0]
    text = {name: base64.b64encode(data).decode() for name, data in files.items()}
    by_text = model.predict(text)["stylized"][0]
    assert by_text == by_bytes
    for found in (by_pixels[0], np.asarray(Image.open(io.BytesIO(by_bytes)))):
        np.testing.assert_array_equal(found, expected)
    given = {"alpha": 0.5, "color": "luminance", "style_side": 32}
    faded = model.predict({"content": content, "style": style}, params=given)[0]
    pack = stylizer.style_pack(Image.fromarray(style[0]), side=given.pop("style_side"))
    np.testing.assert_array_equal(faded, stylizer.stylize(content[0], pack, **given))
    served = model.unwrap_python_model()
    kept = list(served.packs)
    assert [side for _, _, side in kept] == [256, 32]  # though three calls had the first
    for other in range(33, 33 + 63):
        served._pack(Image.fromarray(style[0]), other)
    assert len(served.packs) == 64
    assert kept[0] not in served.packs
    coloured = io.BytesIO()  # Pillow forgets a profile where it lays transparency on white
    Image.fromarray(content[0]).convert("RGBA").save(coloured, "PNG", icc_profile=swapped_profile())
    by_profile = model.predict({"content": [coloured.getvalue()], "style": [files["style"]]})["stylized"][0]
    pack = stylizer.style_pack(Image.fromarray(style[0]))
    np.testing.assert_array_equal(Image.open(io.BytesIO(by_profile)), stylizer.stylize(Image.open(coloured), pack))
    with pytest.raises(UsageError, match="color: expected style, luminance, coral, found sepia"):
        model.predict({"content": content, "style": style}, params={"color": "sepia"})
    example = model.predict(model.input_example)["stylized"][0]
    assert Image.open(io.BytesIO(example)).size == (64, 64)
    for wrong, words in (
        ({"content": [b"GIF9"], "style": [b"x"]}, "content: not_an_image"),
        ({"content": ["écran.jpg"], "style": ["x"]}, "content: expected an image file in base64"),
        ({"content": content[:, :, :, :2], "style": style}, "pixels (H, W, 3) uint8"),
        ({"content": content.astype(float), "style": style}, "found float64"),
        ({"content": content.astype(int) + 256, "style": style}, "pixels from 0 to 255"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            model.predict(wrong)
    with pytest.raises(mlflow.exceptions.MlflowException, match="style"):
        model.predict({"content": content})


def test_a_champion_goes_back_step_by_step_and_every_move_is_told(trained, versions):
    uri, _, _ = trained
    client = MlflowClient(uri)
    first, second, third = (version.version for version in versions)

    def champion():
        return str(client.get_model_version_by_alias("adaconv", "champion").version)

    assert rollback(name="adaconv", alias="champion", reason="halos", tracking_uri=uri).version == second
    assert champion() == second
    tags = client.get_model_version("adaconv", second).tags
    assert tags["alias.champion.reason"] == "halos"
    assert tags["alias.champion.from"] == third
    assert "train/loss 1" in tags["alias.champion.metrics"]
    assert tags["alias.champion.by"]
    assert rollback(name="adaconv", alias="champion", reason="", tracking_uri=uri).version == first
    with pytest.raises(TrackingError, match=f"is version {first}, and nothing says what it was before"):
        rollback(name="adaconv", alias="champion", reason="", tracking_uri=uri)
    named = register(f"models:/adaconv/{third}", name="adaconv", alias="champion", reason="again", tracking_uri=uri)
    assert champion() == named.version == third
    assert rollback(name="adaconv", alias="champion", reason="", tracking_uri=uri).version == first
    told = [(move.before, move.version, move.rollback) for move in history_of(client, "adaconv", "champion")]
    assert told == [
        (None, first, False), (first, second, False), (second, third, False),
        (third, second, True), (second, first, True), (first, third, False), (third, first, True),
    ]  # fmt: skip
    assert len(client.search_model_versions("name = 'adaconv'")) == 3  # moves make no versions


def test_an_alias_that_was_moved_back_by_name_goes_back_all_its_way(trained, versions):
    uri = trained[0]
    first, second = (version.version for version in versions[:2])
    for version in (first, second, first):
        register(f"models:/adaconv/{version}", name="adaconv", alias="round", reason="", tracking_uri=uri)
    for version in (second, first):
        assert rollback(name="adaconv", alias="round", reason="", tracking_uri=uri).version == version
    with pytest.raises(TrackingError, match=f"is version {first}, and nothing says what it was before"):
        rollback(name="adaconv", alias="round", reason="", tracking_uri=uri)


def test_no_number_of_moves_outgrows_a_tag(trained, versions):
    """PostgreSQL keeps 5000 characters of a registered model's tag; SQLite does not count."""
    uri, client = trained[0], MlflowClient(trained[0])
    named = [f"models:/adaconv/{version.version}" for version in versions[:2]]
    for number in range(20):
        register(named[number % 2], name="adaconv", alias="long", reason="é" * 1000, tracking_uri=uri)
    assert [move.version for move in history_of(client, "adaconv", "long")] == [
        versions[number % 2].version for number in range(20)
    ]
    assert max(map(len, client.get_registered_model("adaconv").tags.values())) < 2500
    assert rollback(name="adaconv", alias="long", reason="", tracking_uri=uri).version == versions[0].version


def test_a_move_that_fails_leaves_the_alias_and_may_be_made_again(trained, versions, monkeypatch):
    uri, client = trained[0], MlflowClient(trained[0])
    first, second = (f"models:/adaconv/{version.version}" for version in versions[:2])
    register(first, name="adaconv", alias="fragile", reason="", tracking_uri=uri)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_tag", _refuse)
        with pytest.raises(TrackingError, match="cannot register adaconv"):
            register(second, name="adaconv", alias="fragile", reason="", tracking_uri=uri)
    assert str(client.get_model_version_by_alias("adaconv", "fragile").version) == versions[0].version
    register(second, name="adaconv", alias="fragile", reason="", tracking_uri=uri)
    assert rollback(name="adaconv", alias="fragile", reason="", tracking_uri=uri).version == versions[0].version


def _refuse(*_):
    raise OSError("no")


def test_the_same_checkpoint_gets_no_second_version(trained, versions):
    uri, _, folder = trained
    again = register(str(folder / "step-00000200"), name="adaconv", alias="candidate", reason="", tracking_uri=uri)
    assert again.version == versions[1].version
    with resolved_model("models:/adaconv@candidate", tracking_uri=uri) as (exact, local):
        assert exact == f"models:/adaconv/{again.version}"
        assert checkpoint.load_network(local)[1].step == 200
    assert not local.exists()  # a copy of 240 MB a job would fill the disk


@pytest.mark.parametrize("moment", ["create_logged_model", "create_model_version"])
def test_two_who_register_one_checkpoint_at_once_get_one_version(trained, monkeypatch, moment):
    uri, _, folder = trained
    client, found, name = MlflowClient(uri), str(folder / "step-00000300"), f"at-once-{moment}"
    run = client.get_run(checkpoint.meta_of(found)["run_id"])
    if moment == "create_logged_model":  # as if nobody had registered it
        monkeypatch.setattr(logged_model, "DIGEST_TAG", "a digest of its own")
        monkeypatch.setattr(registry, "DIGEST_TAG", "a digest of its own")
    before = {model.model_id for model in logged_models(client, run)}
    ours, others = getattr(MlflowClient, moment), []

    def after_another(self, *args, **kwargs):
        monkeypatch.setattr(MlflowClient, moment, ours)
        others.append(register(found, name=name, alias="other", reason="", tracking_uri=uri))
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, moment, after_another)
    mine = register(found, name=name, alias="mine", reason="", tracking_uri=uri)
    assert mine.version == others[0].version == "1"
    assert [str(version.version) for version in client.search_model_versions(f"name = '{name}'")] == ["1"]
    new = {model.model_id for model in logged_models(client, run)} - before
    assert len(new) == (moment == "create_logged_model")
    with resolved_model(f"models:/{name}@mine", tracking_uri=uri) as (_, local):
        assert checkpoint.load_network(local)[1].step == 300


def test_two_who_keep_a_runs_models_at_once_delete_none_of_each_others(tmp_path):
    """`runs.py sync` while the training uploads: both log the same weights, and each knows its own only."""
    uri, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "run" / "checkpoints"
    tracker = open_run(
        uri=uri, experiment="test", identity="run", name="run", params={}, tags={}, datasets={}, config_yaml="",
        spool_directory=tmp_path / "run" / "spool",
    )  # fmt: skip
    _, found = save_checkpoint(folder, 100, metrics={"probe/loss": 1.0}, **tracker.reference())
    close_run(tracker, "FINISHED")
    client = MlflowClient(uri)
    run = client.get_run(tracker.run_id)
    mine = logged_model.log_model(client, run, folder / "step-00000100", checkpoint_uri=found, roles="best,last")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logged_model, "logged_models", lambda *_: [])  # the other one looked before mine was there
        theirs = logged_model.log_model(client, run, folder / "step-00000100", checkpoint_uri=found, roles="best,last")
    assert mine.model_id != theirs.model_id
    assert logged_model.give_roles(client, run, {mine.model_id: "best,last"}) == []
    assert logged_model.give_roles(client, run, {theirs.model_id: "best,last"}) == []
    assert len(logged_models(client, run)) == 2
    save_checkpoint(folder, 200, metrics={"probe/loss": 0.5}, **tracker.reference())
    keep_models(client, run, str(folder))
    assert [model.tags["adaconv.step"] for model in logged_models(client, run)] == ["200"]


def test_of_many_runs_the_newest_whole_checkpoint_is_found_and_no_other_read(tmp_path, monkeypatch):
    """By when it was written, not by its step; a damaged one is passed over."""
    for run, step in (("a", 500), ("b", 100), ("b", 200), ("c", 900), ("d", 50)):
        save_checkpoint(tmp_path / run / "checkpoints", step)
    (tmp_path / "d" / "checkpoints" / "step-00000050" / "model.safetensors").write_bytes(b"cut")
    read, fetched = [], checkpoint.fetched
    monkeypatch.setattr(checkpoint, "fetched", lambda uri: read.append(uri) or fetched(uri))
    assert find_checkpoint(str(tmp_path)).endswith("c/checkpoints/step-00000900")
    assert len(read) == 2
    meta = tmp_path / "c" / "checkpoints" / "step-00000900" / "meta.json"
    meta.unlink()
    with pytest.raises(CheckpointError, match=r"meta\.json is not there, or no longer"):
        checkpoint.meta_of(str(meta.parent))
    meta.write_text("{")
    assert find_checkpoint(str(tmp_path)).endswith("b/checkpoints/step-00000200")
    with pytest.raises(CheckpointError, match="found no whole checkpoint below it"):
        find_checkpoint(str(tmp_path / "d"))


def test_what_cannot_be_registered_is_said(trained, versions, tmp_path):
    uri, _, _ = trained
    _, unknown = save_checkpoint(tmp_path / "checkpoints", run_id=None)
    with pytest.raises(CheckpointError, match="names no tracking run that is known here"):
        register(unknown, name="adaconv", alias=None, reason="", tracking_uri=uri)
    with pytest.raises(TrackingError, match="alias nosuch not found"):
        register("models:/adaconv@nosuch", name="adaconv", alias="champion", reason="", tracking_uri=uri)
    with (
        pytest.raises(UsageError, match="expected models:/adaconv@ALIAS or"),
        resolved_model("models:/adaconv", tracking_uri=uri),
    ):
        pass
    with pytest.raises(UsageError, match="expected models:/other@ALIAS"):
        register("models:/adaconv/1", name="other", alias="champion", reason="", tracking_uri=uri)


def test_runs_of_several_folders_share_a_database_and_no_artifacts(tmp_path):
    """One's output folder is deleted, and the other's model is there; without its files a model says so."""
    uri = f"sqlite:///{tmp_path / 'central' / 'mlflow.db'}"
    (tmp_path / "central").mkdir()
    for name in ("one", "two"):
        tracker = open_run(
            uri=uri, experiment="test", identity=name, name=name, params={}, tags={}, datasets={}, config_yaml="",
            spool_directory=tmp_path / name / "run" / "spool",
        )  # fmt: skip
        _, saved = save_checkpoint(tmp_path / name / "run" / "checkpoints", **tracker.reference())
        close_run(tracker, "FINISHED")
    register(saved, name="shared", alias="champion", reason="", tracking_uri=uri)
    shutil.rmtree(tmp_path / "one")
    with resolved_model("models:/shared@champion", tracking_uri=uri) as (_, local):
        assert checkpoint.load_network(local)[1].step == 7
    shutil.rmtree(tmp_path / "central" / "mlartifacts")
    with (
        pytest.raises(CheckpointError, match=r"models:/shared/1 holds no model.safetensors: its files are gone"),
        resolved_model("models:/shared@champion", tracking_uri=uri),
    ):
        pass


def test_a_checkpoint_is_registered_where_its_run_was_told_later(trained, tmp_path):
    """Its meta.json names the run's id of the first server; the second has another one."""
    _, tracker, folder = trained
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copytree(tracker.spool, tmp_path / "spool")
    moved, left = sync(tmp_path / "spool", uri=uri)
    assert left == 0
    version = register(str(folder / "step-00000200"), name="moved", alias=None, reason="", tracking_uri=uri)
    assert version.run_id == moved.run_id != tracker.run_id


@pytest.mark.timeout(60)
def test_runs_that_began_with_one_another_are_asked_once(trained):
    uri, tracker, folder = trained
    client = MlflowClient(uri)
    client.set_tag(tracker.run_id, "adaconv.init_from.run_id", tracker.run_id)
    found = trained_on(str(folder / "step-00000200"), tracking_uri=uri)
    client.delete_tag(tracker.run_id, "adaconv.init_from.run_id")
    assert found == {"content": ["/data/photos@v1"], "style": ["/data/paintings@v2"]}


@pytest.mark.parametrize(
    "uri", ["ftp://x", "htp://127.0.0.1", "s3://b/x", "sqlite://x.db", "mysql://h/x", "http://[::1"]
)
def test_what_is_no_address_of_a_server_is_told_in_a_line(uri, capsys, tmp_path):
    for argv in (["reap"], ["page", "--run", "a", "--output", str(tmp_path)]):
        assert runs.main([*argv, "--tracking-uri", uri]) == 1
        assert re.search(r"^pipelines/runs.py \w+: error: tracking: .+$", capsys.readouterr().err)


def test_the_best_and_the_last_are_kept_and_those_before_them_go(tmp_path, monkeypatch):
    """A run in two parts: models follow its checkpoints, and what is registered stays; MLflow tells one at a time."""
    for name in ("search_logged_models", "search_model_versions"):
        search = getattr(MlflowClient, name)
        monkeypatch.setattr(MlflowClient, name, lambda *a, search=search, **how: search(*a, **how | {"max_results": 1}))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder = tmp_path / "run" / "checkpoints"

    def part(*steps_and_losses):
        tracker = open_run(
            uri=uri, experiment="test", identity="run", name="run", params={}, tags={}, datasets={}, config_yaml="",
            spool_directory=tmp_path / "run" / "spool",
        )  # fmt: skip
        for step, loss in steps_and_losses:
            save_checkpoint(folder, step, metrics={"probe/loss": loss}, **tracker.reference())
        close_run(tracker, "FINISHED")
        client = MlflowClient(uri)
        run = client.get_run(tracker.run_id)
        kept = keep_models(client, run, str(folder))
        models = logged_models(client, run)
        return client, run, kept, {model.tags["adaconv.step"]: model.tags["adaconv.roles"] for model in models}

    _client, _run, kept, roles = part((100, 2.0), (200, 1.0), (300, 1.5))
    assert roles == {"200": "best", "300": "last"}
    assert set(kept) == {"best", "last"}
    register(str(folder / "step-00000300"), name="kept", alias=None, reason="", tracking_uri=uri)
    _, _, _, roles = part((400, 0.5))
    assert roles == {"300": "last", "400": "best,last"}  # 200 went, 300 has a version
    weights = list((tmp_path / "mlartifacts").rglob("model.safetensors"))
    assert len(weights) == 2
    damaged = folder / "step-00000400" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    _, _, kept, roles = part((500, 0.7))
    assert (set(kept), roles["500"]) == ({"best", "last"}, "best,last")  # the better one is lost

    client, run, _, _ = part((600, 0.4))
    for upload in ("begun", "not begun"):
        tags = {"adaconv.roles": "last"}
        left = client.create_logged_model(run.info.experiment_id, name="left", source_run_id=run.info.run_id, tags=tags)
        if upload == "begun":
            (tmp_path / "a").write_text("x")
            client.log_model_artifact(left.model_id, str(tmp_path / "a"))
        keep_models(client, run, str(folder))
        assert str(client.get_logged_model(left.model_id).status) == "PENDING"  # maybe another process's
        with monkeypatch.context() as later:
            later.setattr(logged_model, "_BROKEN_OFF_SECONDS", -10.0)
            keep_models(client, run, str(folder))
        with pytest.raises(MlflowException):
            client.get_logged_model(left.model_id)
