"""A new run that begins with the weights of another: what it has of it, what is refused, and what a kill changes."""

import pytest
import torch

from adaconv import checkpoint
from adaconv.errors import CheckpointError, ConfigError
from adaconv.tracking.tracker import RecordingTracker
from adaconv.training.loop import NoControl
from adaconv.training.start import load_initial, publish_initial
from tests.training.runs import config_of, run, same_weights, weights

STEPS = 40
NEW = {"init_from": "models:/adaconv@champion", "train__learning_rate": 5e-4, "train__seed": 1}


@pytest.fixture(scope="module")
def trained(content_version, style_version, tmp_path_factory):
    """The checkpoint that a run with a moving average ended with, and its losses."""
    folder, tracker = tmp_path_factory.mktemp("trained"), RecordingTracker()
    told = {"train__steps": STEPS, "train__ema_decay": 0.5, "checkpoint__every_steps": STEPS}
    run(content_version, style_version, folder, tracker=tracker, tracking__samples_every_steps=STEPS, **told)
    return folder / checkpoint.name_of(STEPS), tracker.series("train/loss")


def begin(trained, content, style, folder, **changes):
    config = config_of(content, style, **NEW, **changes)
    initial = load_initial(config, trained[0], uri="models:/adaconv/3", run_id="r")
    meta = {"init_from": initial.origin}
    return publish_initial(initial, config, content=content, style=style, checkpoints=str(folder), meta=meta)


def test_step_0_has_the_weights_and_the_encoder_that_training_goes_on_from(
    trained, content_version, style_version, tmp_path
):
    """Those that stylize, which are an average. On other datasets the encoder would be calibrated otherwise."""
    uri = begin(trained, style_version, content_version, tmp_path)
    theirs, ours = (checkpoint.load_network(folder)[1] for folder in (trained[0], uri))
    assert same_weights(weights(tmp_path, 0), weights(trained[0].parent, STEPS))
    average, last = weights(tmp_path, 0), checkpoint.load_trainer(trained[0])["weights"]
    assert any(not torch.equal(average[f"transfer.{name}"], last[name]) for name in last)
    assert (ours.step, ours.digest, ours.encoder_fingerprint) == (0, theirs.digest, theirs.encoder_fingerprint)
    assert checkpoint.meta_of(uri)["init_from"] == {
        "uri": "models:/adaconv/3",
        "step": STEPS,
        "digest": theirs.digest,
        "run_id": "r",
    }
    tracker = RecordingTracker()
    run(style_version, content_version, tmp_path, tracker=tracker, **NEW)
    assert [step for step, _, _ in tracker.images] == [0, 2, 4]
    assert checkpoint.load_network(tmp_path / checkpoint.name_of(4))[1].encoder_fingerprint == ours.encoder_fingerprint
    moments = checkpoint.load_trainer(tmp_path / checkpoint.name_of(4))["optimizer"]["state"]
    assert {moment["step"].item() for moment in moments.values()} == {4}


def test_it_goes_on_learning_from_where_the_other_was(trained, content_version, style_version, tmp_path):
    begin(trained, content_version, style_version, tmp_path, train__steps=STEPS)
    tracker = RecordingTracker()
    run(content_version, style_version, tmp_path, tracker=tracker, **NEW, train__steps=STEPS)
    losses = [[loss for _, loss in series] for series in (trained[1], tracker.series("train/loss"))]
    random, then, now, last = (sum(series[first : first + 10]) for series in losses for first in (0, STEPS - 10))
    assert 1.1 * then > now > 1.1 * last
    assert random > 1.5 * now


def test_a_kill_before_its_first_checkpoint_changes_nothing(trained, content_version, style_version, tmp_path):
    class Killed(NoControl):
        def word(self):
            raise KeyboardInterrupt

    for folder in ("whole", "killed"):
        begin(trained, content_version, style_version, tmp_path / folder, train__ema_decay=0.9)
    changes = {**NEW, "train__ema_decay": 0.9}
    run(content_version, style_version, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(content_version, style_version, tmp_path / "killed", control=Killed(), **changes)
    assert list(checkpoint.steps_in(str(tmp_path / "killed"))) == [0]
    run(content_version, style_version, tmp_path / "killed", **changes)
    assert same_weights(weights(tmp_path / "killed", 4), weights(tmp_path / "whole", 4))


def test_ranks_begin_with_no_other_weights(trained, content_version, style_version, tmp_path):
    """Not with random ones where theirs are lost, and not with those of another model of the same run's name."""
    uri = begin(trained, content_version, style_version, tmp_path)
    other = {**NEW, "init_from": "models:/adaconv@candidate"}
    with pytest.raises(CheckpointError, match=r"init_from \('models:/adaconv@champion' then, 'models:/adaconv@candid"):
        run(content_version, style_version, tmp_path, **other)
    (tmp_path / checkpoint.name_of(0) / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="with the weights of models:/adaconv@champion, found none that is whole"):
        run(content_version, style_version, tmp_path, **NEW)
    assert begin(trained, content_version, style_version, tmp_path) == uri  # the driver's part of the same command
    assert run(content_version, style_version, tmp_path, **NEW).finished


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__descriptor_channels": 16}, r"another: model\.descriptor_channels \(expected 16, found 8\)\. Give"),
        (
            {"model__architecture": "adain", "model__output_activation": "sigmoid"},
            r"architecture \(expected 'adain', found 'adaconv'\), .*activation \(expected 'sigmoid', found 'none'\)",
        ),
        ({"encoder__widths": [8, 8, 8, 16]}, r"encoder\.widths \(expected \[8, 8, 8, 16\], found \[4, 8, 8, 16\]\)"),
        (
            {"encoder__weights": "seeded:1"},
            r"seeded:1 with encoder\.normalise data, found one of other weights",
        ),
        ({"encoder__normalise": "none"}, r"encoder\.normalise none, found one with encoder\.normalise data"),
    ],
)
def test_another_network_is_refused_by_name(trained, content_version, style_version, tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        begin(trained, content_version, style_version, tmp_path, **changes)
    assert not list(tmp_path.iterdir())
