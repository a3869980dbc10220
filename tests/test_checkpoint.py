import contextlib
import hashlib
import json
import random
import resource

import pytest
import torch

from adaconv import checkpoint
from adaconv.errors import CheckpointError
from adaconv.model.encoder_weights import fingerprint
from tests.helpers import TINY_MODEL, save_checkpoint


def test_a_network_comes_back_as_it_was(tmp_path):
    network, uri = save_checkpoint(tmp_path)
    with checkpoint.fetched(uri) as folder:
        again, info = checkpoint.load_network(folder)
        assert checkpoint.load_trainer(folder)["moments"].tolist() == [1, 1, 1]
        assert checkpoint.data_of(str(folder)) == {"seed": 1}
    x, y = torch.rand(2, 1, 3, 32, 32)
    assert torch.equal(network.eval()(x, y), again(x, y))
    assert info.step == 7
    assert info.encoder_fingerprint == fingerprint(network.encoder)
    assert checkpoint.meta_of(uri)["run_id"] == "r"


def test_the_digest_is_the_weights(tmp_path):
    digests = [
        checkpoint.load_network(save_checkpoint(tmp_path / name, step)[1])[1].digest
        for name, step in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_checkpoint_without_its_last_file_is_none(tmp_path):
    for step in (1, 2):
        _, uri = save_checkpoint(tmp_path, step)
    (tmp_path / "step-00000002" / "meta.json").unlink()
    assert list(checkpoint.steps_in(str(tmp_path))) == [1]
    with pytest.raises(CheckpointError, match=r"found no meta\.json"), checkpoint.fetched(uri):
        pass


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "trainer.pt", "data.json"])
def test_a_changed_byte_is_found(tmp_path, name):
    _, uri = save_checkpoint(tmp_path)
    path = tmp_path / "step-00000007" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is not the file that was saved"), checkpoint.fetched(uri):
        pass
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"), checkpoint.fetched(uri):
        pass
    assert checkpoint.newest(str(tmp_path)) is None


def test_the_newest_whole_one_is_found(tmp_path):
    uris = [save_checkpoint(tmp_path, step)[1] for step in (9, 10)]
    assert checkpoint.newest(str(tmp_path)) == uris[1]
    (tmp_path / "step-00000010" / "meta.json").write_text("[]")
    assert checkpoint.newest(str(tmp_path)) == uris[0]


def test_other_formats_and_networks_are_refused(tmp_path):
    _, uri = save_checkpoint(tmp_path)
    path = tmp_path / "step-00000007" / "model.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(CheckpointError, match="expected model format 3, found 99"):
        checkpoint.load_network(uri)
    path.write_text(json.dumps({**described, "model": {**TINY_MODEL, "descriptor_channels": 9}}))
    with pytest.raises(CheckpointError, match="does not hold the network"):
        checkpoint.load_network(uri)
    weights = tmp_path / "step-00000007" / "model.safetensors"
    weights.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        checkpoint.load_network(uri)
    path.write_text(json.dumps({**described, "weights_sha256": hashlib.sha256(b"nonsense").hexdigest()}))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.load_network(uri)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"found no model\.safetensors"):
        checkpoint.load_network(uri)


def test_a_model_whose_bytes_changed_is_refused_and_nothing_else_is_raised(tmp_path):
    """A registered model has no meta.json beside it."""
    _, uri = save_checkpoint(tmp_path)
    draw = random.Random(0)
    for name in ("model.json", "model.safetensors"):
        path = tmp_path / "step-00000007" / name
        whole = path.read_bytes()
        for _ in range(60):
            changed = bytearray(whole)
            changed[draw.randrange(len(whole))] ^= draw.randrange(1, 256)
            path.write_bytes(changed)
            # A byte of model.json that says nothing of the network, such as one of its step, may change unheard.
            with contextlib.suppress(CheckpointError) if name == "model.json" else pytest.raises(CheckpointError):
                checkpoint.load_network(uri)
        path.write_bytes(whole)
    checkpoint.load_network(uri)


@pytest.mark.parametrize(
    ("last", "best", "left"), [(2, 0, [3, 4]), (1, 1, [1, 4]), (1, 2, [1, 3, 4]), (9, 1, [1, 2, 3, 4])]
)
def test_the_newest_and_the_best_stay(tmp_path, last, best, left):
    for step, loss in ((1, 0.5), (2, float("nan")), (3, 0.6), (4, 0.7)):
        save_checkpoint(tmp_path, step, metrics={"probe/loss": loss})
    checkpoint.keep(str(tmp_path), last=last, best=best)
    assert list(checkpoint.steps_in(str(tmp_path))) == left
    assert checkpoint.best_step(checkpoint.steps_in(str(tmp_path))) == min(
        left, key=lambda step: [0, 0.5, 9, 0.6, 0.7][step]
    )


def test_what_is_half_published_or_half_removed_goes(tmp_path):
    """By who was killed at it: each is 0.7 GB at full width, and nobody can read it. A newer one may be on its way."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step)
    for step in (1, 4):
        (tmp_path / checkpoint.name_of(step) / "meta.json").unlink()
    (tmp_path / "others").mkdir()
    checkpoint.keep(str(tmp_path), last=2, best=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others", *map(checkpoint.name_of, (2, 3, 4))]


def test_a_damaged_one_holds_up_neither_keeping_nor_choosing(tmp_path):
    """As after a loss of power: a training that goes on would meet it at each of its checkpoints."""
    for step, loss in ((1, 0.1), (2, 0.5), (3, 0.6), (4, 0.7)):
        save_checkpoint(tmp_path, step, metrics={"probe/loss": loss})
    (tmp_path / "step-00000001" / "meta.json").write_bytes(b"\0" * 100)
    for number, metrics in enumerate(("[]", '{"probe/loss": "x"}', '{"probe/loss": null}'), start=5):
        save_checkpoint(tmp_path / "odd", number, metrics={})
        odd = tmp_path / "odd" / f"step-0000000{number}" / "meta.json"
        odd.write_text(odd.read_text().replace('"metrics": {}', f'"metrics": {metrics}'))
        assert metrics in odd.read_text()
    assert checkpoint.best_step(checkpoint.steps_in(str(tmp_path / "odd"))) is None
    assert checkpoint.best_step(checkpoint.steps_in(str(tmp_path))) == 2
    checkpoint.keep(str(tmp_path), last=1, best=1)
    assert list(checkpoint.steps_in(str(tmp_path))) == [2, 4]


def test_a_damaged_one_that_is_newer_takes_no_place(tmp_path):
    """A run that was resumed before it keeps what it writes, and loses nothing when it is killed again."""
    for step in (1, 4):
        save_checkpoint(tmp_path, step, metrics={"probe/loss": 0.5 / step})
    (tmp_path / "step-00000004" / "model.safetensors").write_bytes(b"cut")
    _, uri = save_checkpoint(tmp_path, 2, metrics={"probe/loss": 0.4})
    checkpoint.keep(str(tmp_path), last=1, best=0, passed_over={4})
    assert checkpoint.newest(str(tmp_path)) == uri
    _, uri = save_checkpoint(tmp_path, 3, metrics={"probe/loss": 0.6})
    checkpoint.keep(str(tmp_path), last=1, best=1, passed_over={4})
    assert list(checkpoint.steps_in(str(tmp_path))) == [2, 3, 4]


@pytest.mark.parametrize("most", [1000, 60_000])  # bytes: too few for the weights, and for the trainer's state
def test_a_temporary_folder_that_takes_no_more_is_named(tmp_path, most):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write a checkpoint to the temporary folder /.*: "):
            save_checkpoint(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
