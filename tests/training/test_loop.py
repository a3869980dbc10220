"""The real loop in this process, and on two ranks: what it resumes, and that ranks do not change the result."""

import json
import os
import re
import shutil
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adaconv import checkpoint, storage
from adaconv.data.loader import PairDataset
from adaconv.data.manifest import open_version
from adaconv.errors import CheckpointError, NonFiniteError
from adaconv.tracking.tracker import RecordingTracker
from adaconv.training import loop
from adaconv.training.loop import NoControl
from adaconv.training.probe import collapse, probe_of
from adaconv.training.state import make_state
from adaconv.training.step import train_step
from tests.training.runs import config_of, run, same_weights, weights


class StopAfter(NoControl):
    def __init__(self, steps):
        self.left = steps

    def word(self):
        self.left -= 1
        return "go" if self.left else "stop"


@pytest.fixture(scope="module")
def unbroken(content_version, style_version, tmp_path_factory):
    """Four steps in one go: the tracker and the folder."""
    folder, tracker = tmp_path_factory.mktemp("unbroken"), RecordingTracker()
    result = run(content_version, style_version, folder, tracker=tracker)
    assert (result.step, result.finished) == (4, True)
    return tracker, folder


def test_a_run_tells_losses_grids_and_checkpoints(unbroken):
    tracker, folder = unbroken
    for name in ("loss", "content_loss", "style_loss", "identity_loss", "tv_loss", "learning_rate", "gradient_norm"):
        assert [step for step, _ in tracker.series(f"train/{name}")] == [1, 2, 3, 4], name
    assert [step for step, _ in tracker.series("data/wait_share")] == [1, 2, 3, 4]
    assert [(step, key, image.shape) for step, key, image in tracker.images] == [
        (step, "samples/grid", (3 * 32 + 2 * 4, 3 * 32 + 2 * 4, 3)) for step in (0, 2, 4)
    ]
    assert [step for step, _ in tracker.checkpoints] == [2, 4]
    assert sorted(checkpoint.steps_in(str(folder))) == [2, 4]


def test_a_resumed_run_equals_the_unbroken_one_to_the_bit(content_version, style_version, unbroken, tmp_path):
    shutil.copytree(unbroken[1] / checkpoint.name_of(2), tmp_path / checkpoint.name_of(2))
    tracker = RecordingTracker()
    run(content_version, style_version, tmp_path, tracker=tracker)
    assert same_weights(weights(tmp_path, 4), weights(unbroken[1], 4))
    both = [t.series("train/loss") for t in (tracker, unbroken[0])]
    assert both[0] == both[1][2:]
    assert [step for step, _, _ in tracker.images] == [4]


def test_the_encoder_is_calibrated_alike_whatever_the_batch(content_version, style_version, unbroken, tmp_path):
    """On as many images, and no more at once: a batch of 512 would be 8,192 of them."""
    run(content_version, style_version, tmp_path, train__steps=1, train__global_batch_size=6)
    of_four = checkpoint.load_network(unbroken[1] / checkpoint.name_of(4))[1]
    of_six = checkpoint.load_network(tmp_path / checkpoint.name_of(1))[1]
    assert of_four.encoder_fingerprint == of_six.encoder_fingerprint


def test_a_stop_request_leaves_a_checkpoint_to_go_on_from(content_version, style_version, unbroken, tmp_path):
    result = run(content_version, style_version, tmp_path, control=StopAfter(1))
    assert (result.step, result.finished) == (1, False)
    assert result.checkpoint.endswith("step-00000001")
    assert run(content_version, style_version, tmp_path).finished
    assert same_weights(weights(tmp_path, 4), weights(unbroken[1], 4))


def test_micro_batches_and_workers_do_not_change_the_result(content_version, style_version, tmp_path):
    """With small steps: Adam makes a whole one of any gradient, however small, and large ones let rounding grow."""
    series = []
    for changes in ({}, {"train__micro_batch_size": 3, "data__loader_workers": 1}):
        tracker = RecordingTracker()
        folder = tmp_path / str(len(series))
        run(content_version, style_version, folder, tracker=tracker, train__learning_rate=1e-6, **changes)
        series.append({name: dict(tracker.series(name)) for name in ("train/loss", "train/gradient_norm")})
    found, wanted = series[1], series[0]
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
    assert found["train/gradient_norm"] == pytest.approx(wanted["train/gradient_norm"], rel=1e-3)


def _rank(rank, world, port_file, folder, content, style):
    torch.set_num_threads(1)
    store = dist.FileStore(port_file, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    run(open_version(content), open_version(style), folder)
    dist.barrier()
    # DDP holds on to gloo's threads; one that lets go of a Python object while the interpreter ends aborts the process.
    os._exit(0)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_do_not_change_the_result(content_version, style_version, unbroken, tmp_path, world):
    """Step 2 comes from one rank, steps 3 and 4 from several, with shares of different size for three."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(unbroken[1] / checkpoint.name_of(2), folder / checkpoint.name_of(2))
    args = (world, str(tmp_path / "store"), str(folder), content_version.root, style_version.root)
    mp.spawn(_rank, args=args, nprocs=world)
    ours, wanted = weights(folder, 4), weights(unbroken[1], 4)
    # Adam makes a whole step of 1e-3 of any gradient, however small: where it is but rounding, a weight may differ.
    apart = [((ours[name] - wanted[name]).abs() > 1e-4 + 1e-3 * wanted[name].abs()).flatten() for name in ours]
    assert torch.cat(apart).float().mean() < 1e-3


def test_another_configuration_is_refused_by_name(content_version, style_version, unbroken, tmp_path):
    shutil.copytree(unbroken[1], tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"loss\.style_weight \(10\.0 then, 5\.0 now\)"):
        run(content_version, style_version, tmp_path, loss__style_weight=5.0)
    with pytest.raises(CheckpointError, match="content dataset"):
        run(style_version, style_version, tmp_path)


def test_a_damaged_newest_checkpoint_is_passed_over(content_version, style_version, unbroken, tmp_path):
    shutil.copytree(unbroken[1], tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / checkpoint.name_of(4) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    run(content_version, style_version, tmp_path)
    assert same_weights(weights(tmp_path, 4), weights(unbroken[1], 4))


def test_old_checkpoints_are_removed(content_version, style_version, tmp_path):
    run(content_version, style_version, tmp_path, checkpoint__every_steps=1)
    assert sorted(checkpoint.steps_in(str(tmp_path))) == [3, 4]
    meta = json.loads((tmp_path / "step-00000004" / "meta.json").read_text())
    assert set(meta["files"]) == {"model.safetensors", "model.json", "trainer.pt", "data.json"}


def test_a_run_starts_from_a_checkpoint_of_another_folder(content_version, style_version, unbroken, tmp_path):
    run(content_version, style_version, tmp_path, start_from=str(unbroken[1] / checkpoint.name_of(2)))
    assert same_weights(weights(tmp_path, 4), weights(unbroken[1], 4))


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(content_version, style_version, tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"step \d+: the norm of the gradient is (nan|inf).*contents \['[0-9a-f]{32}'"
    ):
        run(content_version, style_version, tmp_path, loss__style_weight=1e38, train__clip_norm=None)
    assert not checkpoint.steps_in(str(tmp_path))


@pytest.mark.parametrize("kept", [True, False])
def test_moments_are_those_of_their_weights_in_either_layout(content_version, style_version, tmp_path, kept):
    """A run may go on with the other `channels_last`: fused Adam pairs weights and moments as they lie in memory."""
    run(content_version, style_version, tmp_path, train__channels_last=kept)
    steps = []
    for channels_last in (kept, not kept):
        config = config_of(content_version, style_version, train__channels_last=channels_last)
        with checkpoint.fetched(str(tmp_path / checkpoint.name_of(4))) as folder:
            network, _ = checkpoint.load_network(folder)
            state = make_state(network, config.train, device=torch.device("cpu"))
            state.load_trainer_dict(checkpoint.load_trainer(folder))
        weights = list(state.network.transfer.parameters())
        before = [p.detach().clone() for p in weights]
        for p in weights:
            p.grad = torch.zeros_like(p)  # so that a step is of the moments alone
        state.optimizer.step()
        steps.append([p.detach() - old for p, old in zip(weights, before, strict=True)])
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other)


def test_the_style_encoder_may_learn_at_its_own_rate(content_version, style_version, tmp_path):
    runs = []
    for rate in (1.0, 1e-6):
        folder = tmp_path / str(rate)
        run(
            content_version,
            style_version,
            folder,
            train__style_encoder_rate=rate,
            train__steps=2,
            checkpoint__every_steps=1,
        )
        first, second = weights(folder, 1), weights(folder, 2)
        runs.append(
            {
                n: (first[n] - second[n]).abs().max().item()
                for n in ("transfer.style_encoder.linear.weight", "transfer.scales.0.convs.0.weight")
            }
        )
    assert runs[1]["transfer.style_encoder.linear.weight"] < 1e-4 * runs[0]["transfer.style_encoder.linear.weight"]
    assert runs[1]["transfer.scales.0.convs.0.weight"] > 0.1 * runs[0]["transfer.scales.0.convs.0.weight"]


def test_an_average_of_the_weights_is_kept_and_resumed(content_version, style_version, unbroken, tmp_path):
    """Checkpoints give it to stylize; training goes on with the weights themselves."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(content_version, style_version, whole, train__ema_decay=0.5)
    shutil.copytree(whole / checkpoint.name_of(2), broken / checkpoint.name_of(2))
    run(content_version, style_version, broken, train__ema_decay=0.5)
    assert same_weights(weights(broken, 4), weights(whole, 4))
    plain = weights(unbroken[1], 4)
    trained = checkpoint.load_trainer(whole / checkpoint.name_of(4))["weights"]
    assert all(torch.equal(trained[n], plain[f"transfer.{n}"]) for n in trained)  # the average changes no training
    name = "transfer.scales.0.convs.0.weight"
    steps = [
        checkpoint.load_trainer(whole / checkpoint.name_of(s))["weights"][name.removeprefix("transfer.")]
        for s in (2, 4)
    ]
    assert not torch.equal(weights(whole, 4)[name], steps[1])
    assert (weights(whole, 4)[name] - steps[1]).abs().max() < 2 * (steps[0] - steps[1]).abs().max()


def test_the_best_checkpoint_stays(content_version, style_version, tmp_path):
    tracker = RecordingTracker()
    run(
        content_version,
        style_version,
        tmp_path,
        tracker=tracker,
        checkpoint__every_steps=1,
        checkpoint__keep_last=1,
        train__learning_rate=1.0,  # far too large, and rising: every step is worse than the one before
        train__warmup_steps=4,
        train__clip_norm=None,
    )
    metas = {step: checkpoint.meta_of(uri) for step, uri in checkpoint.steps_in(str(tmp_path)).items()}
    losses = {step: meta["metrics"]["probe/loss"] for step, meta in metas.items()}
    assert 4 in losses
    assert [step for step, _ in tracker.checkpoints] == [1, 2, 3, 4]
    assert min(losses, key=losses.get) == checkpoint.best_step(checkpoint.steps_in(str(tmp_path))) != 4


def test_a_damaged_checkpoint_takes_the_place_of_none_that_follows(content_version, style_version, tmp_path):
    """Not even where its step is not written again, as after a notice between two of them."""
    cadence = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 4, "checkpoint__keep_best": 0}
    run(content_version, style_version, tmp_path, **cadence)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"cut")
    shutil.rmtree(tmp_path / "step-00000004")
    cadence |= {"checkpoint__every_steps": 2, "checkpoint__keep_last": 2}
    run(content_version, style_version, tmp_path, **cadence)
    assert list(checkpoint.steps_in(str(tmp_path))) == [2, 3, 4]


def test_a_notice_leads_to_a_checkpoint_and_the_run_goes_on(content_version, style_version, unbroken, tmp_path):
    class OnceAfterFirst(NoControl):
        said = False

        def word(self):
            word = "go" if self.said else "checkpoint"
            self.said = True
            return word

    tracker = RecordingTracker()
    run(content_version, style_version, tmp_path, control=OnceAfterFirst(), tracker=tracker)
    assert [step for step, _ in tracker.checkpoints] == [1, 2, 4]
    assert same_weights(weights(tmp_path, 4), weights(unbroken[1], 4))


def test_a_checkpoint_that_cannot_be_written_ends_the_run(content_version, style_version, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        run(content_version, style_version, tmp_path / "file" / "checkpoints")


def test_a_stop_leaves_a_checkpoint_though_the_one_before_could_not_be_written(
    content_version, style_version, tmp_path, monkeypatch
):
    """The store was away once, and is back."""
    publish, away = storage.publish_directory, [ConnectionError("no answer in 60 s")]

    def publish_when_back(*given, **more):
        if away:
            raise away.pop()
        publish(*given, **more)

    monkeypatch.setattr(storage, "publish_directory", publish_when_back)
    tracker = RecordingTracker()
    result = run(content_version, style_version, tmp_path, control=StopAfter(3), tracker=tracker)
    assert (result.step, result.finished, list(checkpoint.steps_in(str(tmp_path)))) == (3, False, [3])
    assert [step for step, _ in tracker.checkpoints] == [3]


def test_old_checkpoints_that_cannot_be_removed_end_no_run(
    content_version, style_version, tmp_path, monkeypatch, caplog
):
    """As where a store lets nobody delete."""
    caplog.set_level("INFO")

    def refuse(*_, **__):
        raise PermissionError("no right to delete")

    monkeypatch.setattr(storage, "remove_directory", refuse)
    tracker = RecordingTracker()
    changes = {"checkpoint__keep_last": 1, "checkpoint__keep_best": 0, "checkpoint__every_steps": 1}
    assert run(content_version, style_version, tmp_path, tracker=tracker, **changes).finished
    there = list(checkpoint.steps_in(str(tmp_path)))
    assert there == [step for step, _ in tracker.checkpoints] == [1, 2, 3, 4]
    assert "step 4 is saved, but none before it could be removed: no right to delete" in caplog.text


def test_a_checkpoint_that_failed_is_told_at_once(content_version, style_version, tmp_path, monkeypatch):
    """Who asked for it, for a node is about to go, asks again."""

    class Asking(NoControl):
        asked, failed = 0, 0

        def word(self):
            self.asked += 1
            if self.asked == 3:
                assert refused.wait(20)
                for thread in threading.enumerate():
                    if thread.name == "checkpoint-writer":  # which is still cleaning up
                        thread.join(20)
            return "checkpoint" if self.asked == 1 else "go"

        def not_published(self):
            self.failed += 1

        def say(self, line):
            said.append(line)

    def refuse(*_, **__):
        refused.set()
        raise ConnectionError("no answer in 60 s")

    control, refused, said = Asking(), threading.Event(), []
    monkeypatch.setattr(storage, "publish_directory", refuse)
    with pytest.raises(ConnectionError):
        run(content_version, style_version, tmp_path, control=control, checkpoint__every_steps=100)
    assert control.failed
    assert "WARNING a checkpoint could not be written, step 4 is tried instead: no answer in 60 s" in said


def test_a_checkpoint_that_was_published_is_told_though_the_run_fails(
    content_version, style_version, tmp_path, monkeypatch
):
    """By the rank that fails; and where that was killed, by the next start."""

    def lose_a_peer(state, *given, **more):
        if state.step == 2:
            raise RuntimeError("connection closed by peer")
        return train_step(state, *given, **more)

    tracker, again = RecordingTracker(), RecordingTracker()
    with monkeypatch.context() as lost:
        lost.setattr(loop, "train_step", lose_a_peer)
        with pytest.raises(RuntimeError, match="closed by peer"):
            run(content_version, style_version, tmp_path, tracker=tracker)
    assert [step for step, _ in tracker.checkpoints] == [2]
    run(content_version, style_version, tmp_path, tracker=again)
    assert [step for step, _ in again.checkpoints] == [2, 4]


def test_a_start_from_a_checkpoint_that_has_all_steps_is_refused(content_version, style_version, unbroken, tmp_path):
    last = str(unbroken[1] / checkpoint.name_of(4))
    with pytest.raises(CheckpointError, match=r"is at step 4, train\.steps is 4: expected a step before the last"):
        run(content_version, style_version, tmp_path, start_from=last)


def test_the_ledger_holds_the_keys_of_every_step(content_version, style_version, tmp_path):
    run(content_version, style_version, tmp_path / "checkpoints", train__ledger=str(tmp_path / "ledger"))
    (file,) = (tmp_path / "ledger").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(len(line["content"]) == len(line["style"]) == 4 for line in lines)


def test_a_run_that_goes_on_may_skip_batches(content_version, style_version, tmp_path):
    """Two steps, then two more without the batches in between: what a run of six steps took last."""

    def keys(folder):
        lines = [line for file in (tmp_path / folder).iterdir() for line in file.read_text().splitlines()]
        return [line["content"] for line in sorted(map(json.loads, lines), key=lambda line: line["step"])]

    run(content_version, style_version, tmp_path / "all", train__ledger=str(tmp_path / "whole"), train__steps=6)
    run(content_version, style_version, tmp_path / "some", train__ledger=str(tmp_path / "less"), train__steps=2)
    told = {"train__ledger": str(tmp_path / "less"), "data__skip_batches": ["2:4"]}
    run(content_version, style_version, tmp_path / "some", **told)
    whole = keys("whole")
    assert keys("less") == [*whole[:2], *whole[4:]]
    with pytest.raises(CheckpointError, match=r"data.skip_batches \(\['2:4'\] then, none now, before step 4\)"):
        run(content_version, style_version, tmp_path / "some", train__steps=5)


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        (["5"], r"skip_batches \(5\): expected FIRST:END"),
        (["7:7"], "END above FIRST"),
        ([f"5:{10**30}", "9:10"], "two ranges hold batch 9"),
        (["٣:٥"], "expected FIRST:END"),
        (["0:9", "8:10"], "two ranges hold batch 8"),
    ],
)
def test_ranges_to_skip_that_mean_nothing_are_refused(content_version, style_version, ranges, told):
    with pytest.raises(ValueError, match=told):
        config_of(content_version, style_version, data__skip_batches=ranges)


@pytest.mark.parametrize(("size", "crop"), [(5, 24), (7, 32)])
def test_crops_whose_maps_kernels_cannot_mirror_are_refused(content_version, style_version, size, crop):
    model = {"descriptor_channels": 8, "groups": [16, 4, 2, 1], "kernel_size": size, "descriptor_size": size}
    config_of(content_version, style_version, model=model, data__crop=crop)
    with pytest.raises(ValueError, match=rf"data\.crop \({crop - 8}\) must be at least {crop} with model.kernel_size"):
        config_of(content_version, style_version, model=model, data__crop=crop - 8)


class Listening(NoControl):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_a_loader_that_starves_the_steps_is_told_with_what_to_do(content_version, style_version, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_STARVING_WINDOW_SECONDS", 0.5)
    decode = PairDataset.__getitem__
    monkeypatch.setattr(PairDataset, "__getitem__", lambda *given: time.sleep(0.3) or decode(*given))
    listening = Listening()
    run(content_version, style_version, tmp_path, control=listening, train__steps=8, tracking__samples_every_steps=9)
    (told,) = [line for line in listening.lines if "WARNING" in line]
    assert listening.lines[-1].startswith("step 00008/8 | loss ")  # the last step has its line, due or not
    step, share = re.match(r"WARNING step (\d+): steps waited for data for (\d+) % of the last", told).groups()
    assert int(step) > 1
    assert 10 < int(share) <= 100
    assert "Raise data.loader_workers (now 0 a rank)" in told


@pytest.mark.parametrize(
    ("waits", "told"),
    [
        (lambda minute: 0.11, [2, 13, 24]),  # not of the first minute; again after ten
        (lambda minute: 0.10, []),
        (lambda minute: 1.0 if minute in (0, 7, 9) else 0.0, [8]),  # windows 1, 8 and 10
    ],
)
def test_hunger_is_told_a_minute_at_a_time_and_again_after_ten(content_version, style_version, waits, told):
    now = [0.0]
    hunger = loop._Hunger(config_of(content_version, style_version), clock=lambda: now[0])
    said = []
    for second in range(1, 30 * 60 + 1):
        now[0] = second
        if hunger.add(waits((second - 1) // 60)):
            said.append(second / 60)
    assert said == told


def test_outputs_that_collapse_are_told(content_version, style_version, tmp_path):
    """A network whose last layer is zero paints every picture in one colour."""

    listening = Listening()
    run(content_version, style_version, tmp_path, control=listening, train__steps=1, train__learning_rate=1e-9)
    assert not [line for line in listening.lines if "WARNING" in line]
    network, _ = checkpoint.load_network(tmp_path / checkpoint.name_of(1))
    config = config_of(content_version, style_version)
    probe, loss = probe_of(config, content_version, style_version), config.loss
    assert collapse(probe.look(network, loss).metrics) is None
    with torch.no_grad():
        for weight in network.transfer.scales[-1].convs[-1].parameters():
            weight.zero_()
        network.transfer.scales[-1].convs[-1].bias.copy_(torch.tensor([0.1, 0.5, 0.9]))  # one colour need not be grey
    assert "lost their contrast (0.00 of" in collapse(probe.look(network, loss).metrics)
    network, _ = checkpoint.load_network(tmp_path / checkpoint.name_of(1))
    with torch.no_grad():
        network.transfer.style_encoder.linear.weight.zero_()
    assert "do not depend on the style" in collapse(probe.look(network, loss).metrics)
