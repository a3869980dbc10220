"""What the driver of a training does around the ranks; they are the real loop, here in this process."""

import contextlib
import io
import json
import os
import pickle
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from adaconv import checkpoint
from adaconv.data.manifest import open_version
from adaconv.orchestration import cluster, train_job
from adaconv.tracking import mlflow_tracker, results
from adaconv.tracking.registry import register
from adaconv.training.loop import train
from pipelines.train import main
from tests.helpers import TINY_TRAINING, save_checkpoint

STEPS = 4
SMALL = {
    "encoder.weights": "seeded:0",
    **TINY_TRAINING,
    "data.cache-dir": "cache",
    "train.steps": STEPS,
    "train.global-batch-size": 2,
    "train.ledger": "ledger",
    "checkpoint.every-steps": 2,
    "tracking.uri": "sqlite:///runs/mlflow.db",
}


class User:
    """Trains from a working directory, with relative paths; ranks run in another one."""

    def __init__(self, monkeypatch, folder: Path, content, style) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self._data = {"content": content.root, "style": style.root, "output": "runs"}
        self.ranks = folder / "ranks"
        self.ranks.mkdir(parents=True)
        self.trained, self.kept = 0, 0
        monkeypatch.setattr(cluster, "connect", contextlib.nullcontext)
        monkeypatch.setattr(train_job, "run_train_job", self._ranks)
        monkeypatch.setattr(results, "keep_page", lambda *_, **__: None)
        monkeypatch.setattr(results, "keep_models", self._keep)

    def train(self, *more) -> int:
        self._monkeypatch.chdir(self.folder)
        told = [word for name, value in (self._data | SMALL).items() for word in (f"--{name}", *str(value).split())]
        return main([*told, *map(str, more)])

    def result(self):
        return json.loads((self.folder / "runs" / "result.json").read_text())

    def client(self):
        return MlflowClient(f"sqlite:///{self.folder}/runs/mlflow.db")

    def register(self, checkpoint_uri, alias):
        uri = f"sqlite:///{self.folder}/runs/mlflow.db"
        return register(str(checkpoint_uri), name="adaconv", alias=alias, reason="", tracking_uri=uri)

    def run(self, result):
        return self.client().get_run(result["run_id"])

    def steps(self):
        """Of the ledger's newest file: step to keys of contents."""
        newest = max((self.folder / "ledger").iterdir())
        return {line["step"]: line["content"] for line in map(json.loads, newest.read_text().splitlines())}

    def _ranks(self, config, *, run_folder, tracker, meta):
        tracker = pickle.loads(pickle.dumps(tracker))
        with contextlib.chdir(self.ranks):
            result = train(
                config,
                content=open_version(config.content),
                style=open_version(config.style),
                checkpoints=f"{run_folder}/checkpoints",
                device=torch.device("cpu"),
                tracker=tracker,
                start_from=None if config.resume in ("auto", "none") else config.resume,
                meta=meta,
            )
            self.trained += 1
            tracker.flush(timeout_seconds=30)
            tracker.close()
        return asdict(result)

    def _keep(self, client, run, checkpoints):
        self.kept += 1
        if self.kept == 1:
            end()
        return {}


def end(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # until it is heard


@pytest.fixture(scope="module")
def user(content_version, style_version, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield User(monkeypatch, tmp_path_factory.mktemp("user"), content_version, style_version)


@pytest.fixture(scope="module")
def first(user):
    """The result of a training whose driver ended after the last checkpoint, and again among the models it keeps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        # The end of a process would let go of the run.
        monkeypatch.setattr(mlflow_tracker, "close_run", lambda tracker, *_, **__: (tracker.release(), end()))
        with contextlib.redirect_stderr(io.StringIO()) as told:
            assert user.train() == 143
    assert "error: stopped; the same command goes on" in told.getvalue()
    assert user.train() == 143
    assert user.train() == 0
    return user.result()


def test_the_same_command_ends_a_run_that_lacks_its_end_alone(user, first):
    assert (user.trained, user.kept) == (1, 2)
    assert (first["step"], first["finished"]) == (STEPS, True)
    assert user.run(first).info.status == "FINISHED"
    assert user.train() == 0
    assert (user.trained, user.kept) == (1, 2)
    (Path(first["run"]) / "spool" / "drained").write_bytes(b"")  # as a loss of power leaves it
    assert user.train() == 0
    assert user.trained == 1


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
def test_the_same_command_makes_a_damaged_last_checkpoint_again(user, first, name):
    last, trained = Path(first["checkpoint"]), user.trained
    (last / name).write_bytes(b"")
    assert user.train() == 0
    assert user.trained == trained + 1
    assert user.result()["checkpoint"] == str(last) == checkpoint.newest(str(last.parent))
    assert sorted(user.steps()) == [2, 3]


def test_ranks_find_relative_paths(user, first):
    history = user.client().get_metric_history(first["run_id"], "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert (user.folder / "ledger").exists()
    assert not list(user.ranks.iterdir())


def test_a_start_from_a_checkpoint_is_a_run_of_its_own(user, first, capsys):
    whole, before = user.steps(), user.trained
    start = Path(first["checkpoint"]).with_name(checkpoint.name_of(2))
    told = ("--resume", start.relative_to(user.folder), "--data.skip-batches", "2:3")
    for _ in range(2):
        assert user.train(*told) == 0
    second = user.result()
    assert user.trained == before + 1
    assert second["name"] != first["name"]
    assert (sorted(user.steps()), user.steps()[2]) == ([2, 3], whole[3])
    assert user.run(second).data.tags["adaconv.started_from"] == str(start)
    assert sorted(checkpoint.steps_in(f"{first['run']}/checkpoints")) == [2, 4]
    capsys.readouterr()
    assert user.train(*told, "--name", first["name"]) == 2
    assert "expected a run that has no checkpoints yet" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_written(user, first, capsys):
    start = Path(first["checkpoint"]).with_name(checkpoint.name_of(2))
    runs, tracked = sorted((user.folder / "runs").iterdir()), len(user.client().search_runs(["1"]))
    for told in (("--resume", start), ("--name", first["name"])):
        for more in ((), ("--dry-run",)):
            assert user.train(*told, "--loss.style-weight", 7, *more) == 1
            assert "different: loss.style_weight (10.0 then, 7.0 now)" in capsys.readouterr().err
    assert sorted((user.folder / "runs").iterdir()) == runs
    assert len(user.client().search_runs(["1"])) == tracked


def test_a_checkpoint_that_no_training_wrote_is_refused(user, tmp_path, capsys):
    _, uri = save_checkpoint(tmp_path)
    assert user.train("--resume", uri, "--dry-run") == 1
    assert "data.json is not what pipelines/train.py writes" in capsys.readouterr().err


def test_a_run_that_differs_in_one_thing_is_told_of(user, first, capsys):
    """As after an append: whoever meant to go on would find out days later."""
    told = (
        f"{first['run']} is another run, at step {STEPS}; different: loss.style_weight (10.0 then, 7.0 now). This one"
    )
    for flags, words in (
        (("--loss.style-weight", 7), told),
        (("--loss.style-weight", 7, "--resume", "none"), None),
        (("--loss.style-weight", 7, "--data.crop", 24), None),
        ((), f"it goes on from {first['checkpoint']}"),
    ):
        assert user.train(*flags, "--dry-run") == 0
        out = capsys.readouterr().out
        assert words in out if words else "another run" not in out


def test_a_run_begins_with_the_weights_of_a_registered_model(user, first, capsys, monkeypatch):
    """Those that its name meant at the first start, also where nothing was trained before the second."""
    learnt = user.register(first["checkpoint"], "champion")
    told = ("--init-from", "models:/adaconv@champion", "--train.learning-rate", 1e-5, "--data.crop", 24)
    model = checkpoint.meta_of(first["checkpoint"])["files"]["model.safetensors"]["sha256"]
    origin = f"uri {learnt.uri.replace('@champion', '/1')}, step {STEPS}, digest {model}, run_id {first['run_id']}"
    assert user.train(*told, "--dry-run") == 0
    assert f"weights of step 0: {origin}\n" in capsys.readouterr().out
    with monkeypatch.context() as lost:
        lost.setattr(train_job, "run_train_job", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            user.train(*told)
    earlier = Path(first["checkpoint"]).with_name(checkpoint.name_of(2))
    user.register(earlier, "champion")
    assert user.train(*told) == 0
    second = user.result()
    assert second["name"] != first["name"]
    there = checkpoint.steps_in(f"{second['run']}/checkpoints")
    assert list(there) == [0, 2, STEPS]
    assert checkpoint.meta_of(there[0])["files"]["model.safetensors"]["sha256"] == model
    assert checkpoint.meta_of(there[STEPS])["init_from"] == {
        "uri": "models:/adaconv/1",
        "step": STEPS,
        "digest": model,
        "run_id": first["run_id"],
    }
    data = user.run(second).data
    assert data.params["init_from"] == "models:/adaconv@champion"
    assert (data.tags["adaconv.init_from.uri"], data.tags["adaconv.init_from.digest"]) == ("models:/adaconv/1", model)
    version = user.register(there[STEPS], "tuned")
    card = user.client().get_model_version("adaconv", version.version).description
    assert f"Began with the weights of `models:/adaconv/1` (step {STEPS}, `{model}`)." in card
    trained = user.trained
    capsys.readouterr()
    assert user.train(*told) == 0
    assert (user.trained, user.result()["name"]) == (trained, second["name"])


def test_another_beginning_is_another_run(user, first):
    """The newest checkpoint of a run's folder, and one of its checkpoints, by relative paths."""
    names = {first["name"]}
    for model, step in ((f"runs/{first['name']}", STEPS), (f"runs/{first['name']}/checkpoints/step-00000002", 2)):
        assert user.train("--init-from", model) == 0
        origin = checkpoint.meta_of(user.result()["checkpoint"])["init_from"]
        assert origin["uri"] == f"{first['run']}/checkpoints/{checkpoint.name_of(step)}"
        assert (origin["step"], origin["run_id"]) == (step, first["run_id"])
        names.add(user.result()["name"])
    assert len(names) == 3


def test_a_beginning_that_cannot_be_leaves_nothing(user, first, capsys):
    before = sorted((user.folder / "runs").iterdir())
    for told, words, code in (
        (("models:/adaconv@nobody",), "models:/adaconv@nobody at sqlite", 1),
        (("models:/adaconv",), "expected models:/adaconv@ALIAS or models:/adaconv/VERSION", 2),
        (("nowhere",), "expected a checkpoint, a run or a folder of runs at", 1),
        (("runs", "--model.descriptor-channels", 16), "model.descriptor_channels (expected 16, found 8)", 2),
    ):
        for more in ((), ("--dry-run",)):
            capsys.readouterr()
            assert user.train("--init-from", *told, *more) == code
            assert words in capsys.readouterr().err
    for more in ((), ("--dry-run",)):
        assert user.train("--resume", "atuo", *more) == 1
        assert "expected a checkpoint at" in capsys.readouterr().err
        assert user.train("--encoder.weights", "vgg.pth", *more) == 1
        assert "encoder.weights vgg.pth: expected imagenet" in capsys.readouterr().err
    assert sorted((user.folder / "runs").iterdir()) == before


def test_a_dry_run_downloads_no_encoder(user, first, capsys, monkeypatch):
    monkeypatch.setattr("adaconv.download._ATTEMPTS", 1)
    weights = "http://127.0.0.1:9/vgg.pth"
    assert user.train("--init-from", "runs", "--encoder.weights", weights, "--dry-run") == 0
    assert f"its encoder is compared with {weights} by the run, for that is not here yet" in capsys.readouterr().out
    assert user.train("--init-from", "runs", "--encoder.weights", weights) == 1
    assert "Connection refused" in capsys.readouterr().err


def test_pictures_of_ones_own_are_looked_at_and_change_no_weights(user, first, capsys):
    folder = user.folder / "pictures"
    folder.mkdir()
    Image.new("RGB", (80, 60), "red").save(folder / "red.png")
    assert user.train("--name", "own", "--tracking.contents-from", "pictures") == 0
    own = checkpoint.meta_of(user.result()["checkpoint"])
    usual = checkpoint.meta_of(first["checkpoint"])
    assert own["files"]["model.safetensors"]["sha256"] == usual["files"]["model.safetensors"]["sha256"]
    assert own["metrics"]["probe/loss"] != usual["metrics"]["probe/loss"]
    (folder / "broken.jpg").write_bytes(b"no image")
    for more in ((), ("--dry-run",)):
        capsys.readouterr()
        assert user.train("--name", "other", "--tracking.contents-from", "pictures", *more) == 2
        answer = capsys.readouterr().err
        assert "--tracking.contents-from" in answer
        assert "found broken.jpg: not_an_image" in answer
    assert not (user.folder / "runs" / "other").exists()
