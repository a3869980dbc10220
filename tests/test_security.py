"""What comes from a shared place may mean harm: pickles, paths that climb, pictures that unfold, passwords in URIs."""

import hashlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import mlflow
import pytest

from adaconv import checkpoint
from adaconv.data.loader import SampleReader
from adaconv.data.manifest import _text_of, open_version, publish_version
from adaconv.data.report import render
from adaconv.data.shard_cache import default_cache_dir
from adaconv.data.verify import verify_shard
from adaconv.errors import CheckpointError, DatasetError, TrackingError, UsageError
from adaconv.stylize.outputs import pack_name, slug
from adaconv.tracking.registry import resolved_model
from adaconv.tracking.runs import default_uri, local_folder
from adaconv.tracking.spool import Spool
from tests.helpers import build_version, save_checkpoint


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def tree(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


# Pickles


@pytest.fixture
def saved(tmp_path):
    _, uri = save_checkpoint(tmp_path / "run")
    return Path(uri)


def replace_file(folder, name, data):
    """As somebody would who can write there: the hashes agree."""
    (folder / name).write_bytes(data)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_the_bomb_goes_off_where_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "went-off")))
    assert (tmp_path / "went-off").is_dir()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, before it refuses
@pytest.mark.parametrize("how", ["plain", "torch"])
def test_a_pickle_in_a_checkpoint_is_refused(saved, tmp_path, how):
    import torch

    mark, held = tmp_path / "went-off", io.BytesIO()
    if how == "torch":
        torch.save({"step": 7, "optimizer": Bomb(mark)}, held)
    else:
        pickle.dump(Bomb(mark), held)
    for name, load in (("trainer.pt", checkpoint.load_trainer), ("model.safetensors", checkpoint.load_network)):
        replace_file(saved, name, held.getvalue())
        with checkpoint.fetched(str(saved)) as folder, pytest.raises((CheckpointError, pickle.UnpicklingError)):
            load(folder)
    assert not mark.exists()


def test_a_pickled_model_of_the_registry_is_not_unpickled(tmp_path):
    """Another's model under a name that a job is given: MLflow itself would run it."""
    uri, mark = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "went-off"
    client = mlflow.MlflowClient(uri)
    run = client.create_run(client.create_experiment("x", artifact_location=str(tmp_path / "artifacts")))
    model = tmp_path / "model"
    model.mkdir()
    (model / "python_model.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    (model / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n")
    client.log_artifacts(run.info.run_id, str(model), "evil")
    evil = resolved_model(f"runs:/{run.info.run_id}/evil", tracking_uri=uri)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"), evil:
        pass
    assert not mark.exists()


# Paths that climb


def evil_zip(path, image):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../climbed.jpg", "/climbed.jpg", "a/../../climbed.jpg", "..\\climbed.jpg", "good.jpg"):
            archive.writestr(name, image + name.encode())  # bytes of their own, so that none is a duplicate
    return path


def test_members_of_a_zip_never_leave_the_output(tmp_path, photos):
    from adaconv.data.sources import iter_images

    (tmp_path / "in").mkdir()
    source = evil_zip(tmp_path / "in" / "evil.zip", next(photos.glob("*.jpg")).read_bytes())
    before = tree(tmp_path)
    version = build_version(source, str(tmp_path / "in" / "deep" / "data"))
    found = [image.source for image in iter_images((str(source),))]
    assert found == ["climbed.jpg", "good.jpg"]  # names are labels; those that climb are passed over, as hidden ones
    assert version.books["found"] == 2
    made = tree(tmp_path) - before
    assert all(path.startswith("in/deep") for path in made)
    assert not [path for path in made if "climbed" in path]
    for shard in version.shards:
        with tarfile.open(version.shard_uri(shard.name)) as tar:
            assert all("/" not in name and ".." not in name for name in tar.getnames())


def test_members_of_a_tar_never_leave_it(tmp_path, photos):
    """A shard is read by offsets; whatever its members are called, nothing is unpacked."""
    version = build_version(photos, str(tmp_path / "deep" / "data"))
    shard, uri = version.shards[0], Path(version.shard_uri(version.shards[0].name))
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w") as tar:
        for name in ("../../climbed.jpg", "/tmp/climbed.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 100_000
            tar.addfile(member, io.BytesIO(bytes(100_000)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    uri.write_bytes(evil.getvalue())
    before = tree(tmp_path)
    reader = SampleReader(version)
    assert verify_shard(version.root, shard, lambda: [r for r in version.rows() if r["shard"] == shard.name])
    reader.read(0)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["../../climbed.tar", "/tmp/climbed.tar", "..\\climbed.tar", ".."])
def test_a_shards_name_never_leaves_the_cache(tmp_path, photos, name):
    """A version that is consistent in itself, hashes and all, whose shard is called by a path that climbs."""
    root = tmp_path / "data"
    version = build_version(photos, str(root))
    described = json.loads((root / "versions" / f"{version.version}.json").read_text())
    del described["root_hash"]
    described["shards"][0]["name"] = name
    text = _text_of(described)
    evil = json.loads(text)["root_hash"][:16]
    (root / "versions" / f"{evil}.json").write_bytes(text)
    with pytest.raises(DatasetError, match="expected the name of a file below shards/"):
        open_version(f"{root}@{evil}")
    assert open_version(f"{root}@{version.version}").shards == version.shards


@pytest.mark.parametrize(
    "source", ["../../x.jpg", "/etc/passwd", "a/../../../b.png", "..", "x\0y.jpg", "..\\..\\x.jpg"]
)
def test_names_of_outputs_stay_in_their_folder(source):
    for name in (slug(source), pack_name(source, "0" * 64).removeprefix("styles/")):
        assert "/" not in name
        assert "\\" not in name
        assert "\0" not in name
        assert not name.startswith(".")


# Pictures that unfold


def png_bomb(side):
    """A few kilobytes that would be `side` x `side` pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    pixels = b"".join(packer.compress(row) for _ in range(min(side, 2000))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


INGEST = """
import re, sys
from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import Refusal, ingest, look
from adaconv.images import ImageError, decode

def peak():
    # Not ru_maxrss, which begins at that of the process that this one was started by.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

data, before = open(sys.argv[1], "rb").read(), peak()
recipe = RecipeConfig()
refused = [look(data, recipe), ingest(data, 'bomb.png', recipe)]
assert all(isinstance(answer, Refusal) for answer in refused), refused
assert {answer.reason for answer in refused} == {"too_many_pixels"}, refused
try:
    decode(data)
except ImageError as error:
    assert error.reason == "too_many_pixels"
else:
    raise SystemExit("decoded")
print(peak() - before)
"""


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_pixel_bomb_is_refused_in_little_memory(tmp_path, side):
    """Sharding and stylizing judge it by its header: 432 MB and 10.8 GB of pixels are never made."""
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_bomb(side))
    assert bomb.stat().st_size < 400_000
    done = subprocess.run(
        [sys.executable, "-c", INGEST, str(bomb)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # kB


def test_a_bomb_in_a_zip_is_read_no_further_than_it_says(tmp_path):
    """A member that unfolds to more than the archive's directory tells is refused; memory holds what was told."""
    from adaconv.data.sources import iter_images, read_found
    from adaconv.images import ImageError

    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(50_000_000))
    data = path.read_bytes()
    said = (50_000_000).to_bytes(4, "little")
    path.write_bytes(data.replace(said, (1000).to_bytes(4, "little")))
    (found,) = iter_images((str(path),))
    with pytest.raises(ImageError) as refused:
        read_found(found)
    assert refused.value.reason in ("crc_mismatch", "deflate_error")


# Passwords


def test_a_password_in_the_tracking_uri_is_refused_without_repeating_it(tmp_path):
    for uri in ("http://me:hunter2@127.0.0.1:5000", "postgresql+psycopg://me:hunter2@db/mlflow"):
        with pytest.raises(TrackingError) as refused:
            default_uri(uri, tmp_path)
        assert "carries a password" in str(refused.value)
        assert "hunter2" not in str(refused.value)
    assert default_uri("http://127.0.0.1:5000", tmp_path) == "http://127.0.0.1:5000"


def test_a_checkpoint_does_not_say_who_gets_the_account(tmp_path, monkeypatch):
    """MLflow's client sends it to whichever server it is told, and a checkpoint may be anybody's."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where a file of MLflow's may have an account
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    there = "https://elsewhere.example:5000"
    assert default_uri(None, tmp_path, found=there) == there  # nothing to send
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    for known in ("", "https://mlflow.example", "http://elsewhere.example:5000", "https://elsewhere.example:5001"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", known)
        with pytest.raises(TrackingError, match=f"give --tracking.uri {there}") as refused:
            default_uri(None, tmp_path, found=there)
        assert "hunter2" not in str(refused.value)
        for odd in ("HTTPS://elsewhere.example:5000", f" {there}", "http://h:99999", "http://[bad"):
            with pytest.raises(TrackingError):  # MLflow reads the first two as the same server
                default_uri(None, tmp_path, found=odd)
    assert default_uri(there, tmp_path, found=there) == there  # the user said so
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{there}/path")
    assert default_uri(None, tmp_path, found=there) == there
    assert default_uri(None, tmp_path, found="sqlite:////x.db") == "sqlite:////x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example:443")
    assert default_uri(None, tmp_path, found="https://MLflow.example") == "https://MLflow.example"


# Pages


def test_names_fill_nothing_in_and_run_nothing(photos, tmp_path):
    """Marks and markup in labels and sources."""
    version = build_version(photos, str(tmp_path))
    odd = [{**row, "label": "{{sheet}}", "source": "<script>alert(1)</script>"} for row in version.rows()]
    latest = {"after": version.version, "parent": version}
    child = publish_version(version.root, recipe=version.recipe, shards=version.shards, rows=odd, **latest)
    page = render(child, distance=0, sheet=2)
    assert "<td>{{sheet}}</td>" in page
    assert page.count("<script") == 0 < page.count("&lt;script")
    assert "default-src 'none'" in page


# Folders that others can write to


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_folder_of_somebody_else_is_not_taken_for_ours(tmp_path, monkeypatch):
    """Shards of it would count as verified, and its records say which files are removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for known in (default_cache_dir, lambda: str(local_folder("s3://bucket/runs"))):
        folder = Path(known())
        assert folder.parent == tmp_path
        folder.mkdir()
        assert known() == str(folder)
        os.chown(folder, 65534, 65534)
        with pytest.raises(UsageError, match="found somebody else's"):
            known()
        folder.rmdir()
        folder.symlink_to(tmp_path)
        with pytest.raises(UsageError, match="found somebody else's"):
            known()


def test_a_record_names_no_file_outside_of_its_spool(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years")
    (tmp_path / "spool").mkdir()
    record = {"kind": "image", "step": 1, "timestamp_ms": 1, "values": {"key": "samples/grid", "file": str(precious)}}
    (tmp_path / "spool" / "records.jsonl").write_text(json.dumps(record) + "\n")
    spool = Spool(tmp_path / "spool", lambda records: None, interval_seconds=0.01)
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert precious.read_text() == "years"


@pytest.mark.parametrize("meta", ["[]", "[" * 200_000, '{"format": 3}', '{"format": 3, "files": {"model.json": 1}}'])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, meta):
    _, uri = save_checkpoint(tmp_path)
    (Path(uri) / "meta.json").write_text(meta)
    with pytest.raises(CheckpointError), checkpoint.fetched(uri):
        pass
