"""pipelines/dataset.py: what needs no cluster, and what a user can get wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest

from adaconv.data.manifest import list_versions, open_version
from adaconv.tracking.runs import client_of
from pipelines import dataset
from tests.helpers import build_version, child_of


def answer(capsys, *argv):
    try:
        code = dataset.main([str(argument) for argument in argv])
    except SystemExit as exit_:
        code = exit_.code or 0
    written = capsys.readouterr()
    assert "Traceback" not in written.out + written.err
    return code, written.out, written.err


@pytest.fixture
def root(content_version, tmp_path):
    shutil.copytree(content_version.root, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (
            (),
            2,
            "expected a command, one of append, remove, diff, versions, rollback, verify, similar, report, gc; found",
        ),
        (("verfy",), 2, "found 'verfy'"),
        (("verify",), 2, "--dataset"),
        (("verify", "--dataset", "{}/nothing"), 2, "found no LATEST in it; pipelines/shard.py makes one"),
        (("verify", "--dataset", "{}/data@abc"), 2, "has no version abc; it has"),
        (
            ("remove", "--dataset", "{}/data"),
            2,
            "--key, --label, --artist, --source-pattern or --exclude",
        ),
        (("remove", "--dataset", "{}/data", "--artist", "monet", "--dry-run"), 2, "--artist monet: no image"),
        (("remove", "--dataset", "{}/data", "--artist", ""), 2, "artist.0: string should have"),
        (("append", "--dataset", "{}/data", "--source", "{}/nothing"), 2, "found nothing there"),
        (("append", "--dataset", "{}/data", "--source", "{}/nothing", "--dry-run"), 2, "found nothing there"),
        (("diff", "--dataset", "{}/data", "--against", "{}/nothing", "--dry-run"), 2, "found no LATEST in it"),
        (("similar", "--dataset", "{}/data", "--against", "{}/nothing", "--dry-run"), 2, "found no LATEST in it"),
        (("similar", "--dataset", "{}/data", "--distance", "9"), 2, "distance"),
        (("gc", "--dataset", "{}/nothing"), 2, "found no LATEST in it"),
        (("versions", "--dataset", "{}/nothing"), 2, "found no version in it"),
        (("rollback", "--dataset", "{}/data", "--to", "abc"), 2, "has no version abc; it has"),
        (("rollback", "--dataset", "{}/data", "--to", "../x"), 2, "to: string should match"),
        (("rollback", "--dataset", "{}/data@abc", "--to", "abc"), 2, "without @abc"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_wrong_input_is_answered_in_a_line(capsys, root, argv, code, words):
    found, _, err = answer(capsys, *(part.replace("{}", str(root.parent)) for part in argv))
    assert found == code, err
    assert words in err


@pytest.mark.parametrize("command", list(dataset.COMMANDS))
def test_every_command_explains_itself(capsys, command):
    code, out, _ = answer(capsys, command, "--help")
    assert code == 0
    assert f"pipelines/dataset.py {command}" in out
    assert "--dataset" in out


def test_commands_are_listed(capsys):
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    assert set(dataset.COMMANDS) <= set(re.findall(r"\w+", out))


def test_a_report_is_written(capsys, root, tmp_path):
    assert answer(capsys, "report", "--dataset", root, "--output", tmp_path / "out")[0] == 0
    page = Path(json.loads((tmp_path / "out" / "result.json").read_text())["report"])
    assert open_version(str(root)).root_hash in page.read_text()


def test_a_damaged_version_is_named(capsys, root):
    path = next((root / "versions").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"rows": ', b'"rows":  ', 1))
    code, _, err = answer(capsys, "verify", "--dataset", root)
    assert code == 1
    assert path.name in err
    assert "the file is damaged" in err


def test_a_leak_from_training_to_evaluation_is_found(capsys, root, photos, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    names = sorted(path.name for path in photos.iterdir())[:2]
    for name in names:
        shutil.copy(photos / name, folder / f"other_{name}")
    build_version(folder, str(tmp_path / "evaluated"))
    out = tmp_path / "out"
    flags = ("--dataset", root, "--against", tmp_path / "evaluated", "--output", out)
    code, _, err = answer(capsys, "similar", *flags)
    assert code == 1
    assert "2 pairs of images lie in both" in err
    listed = json.loads((out / "result.json").read_text())["listed"]
    assert sorted((pair["first"], pair["second"]) for pair in listed) == [(n, f"other_{n}") for n in names]
    assert all(pair["same_bytes"] for pair in listed)
    assert answer(capsys, "similar", "--dataset", root)[0] == 0


def test_a_dry_run_tells_of_both_sides(capsys, root, photos, style_version):
    _, told, _ = answer(capsys, "append", "--dataset", root, "--source", photos, "--dry-run")
    assert re.search(rf"24 images, \d+ shards; to it 24 images, \d+\.\d MB from {photos}", told)
    _, told, _ = answer(capsys, "diff", "--dataset", root, "--against", style_version.root, "--dry-run")
    assert f"; against version {style_version.version} of {style_version.root}" in told


def test_a_difference_is_told(capsys, root, tmp_path):
    version = open_version(str(root)).version
    flags = ("--dataset", root, "--against", f"{root}@{version}", "--output", tmp_path / "out")
    assert answer(capsys, "diff", *flags)[0] == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (told["added"], told["removed"], told["kept"]) == (0, 0, 24)


def test_versions_are_listed_and_a_rollback_moves_latest(capsys, root, tmp_path):
    first = open_version(str(root))
    second = child_of(first, 2)
    out = tmp_path / "out"
    assert answer(capsys, "versions", "--dataset", root, "--output", out)[0] == 0
    told = json.loads((out / "result.json").read_text())["versions"]
    assert [(v["version"], v["parent"], v["latest"]) for v in told] == [
        (first.version, None, False),
        (second.version, first.version, True),
    ]
    assert [(v["images"], v["shards"]) for v in told] == [(24, 5), (sum(s.rows for s in second.shards), 2)]
    flags = ("rollback", "--dataset", root, "--to", first.version)
    assert f"from {second.version} to {first.version}" in answer(capsys, *flags, "--dry-run")[1]
    assert open_version(str(root)) == second
    assert answer(capsys, *flags)[0] == 0
    assert open_version(str(root)) == first
    assert json.loads((root / "result.json").read_text())["before"] == second.version
    (root / "versions" / f"{second.version}.json").write_text("{")
    _, listed, _ = answer(capsys, "versions", "--dataset", root, "--dry-run")
    assert re.search(rf"{first.version} .* 24 images \| 5 shards .* LATEST", listed)
    assert re.search(rf"{second.version} .* found damage\n", listed)


def test_garbage_is_planned_then_deleted(capsys, root):
    orphan = root / "shards" / "0123456789abcdef.tar"
    orphan.write_bytes(b"orphan")
    flags = ("gc", "--dataset", root, "--older-than-hours", "0")
    code, out, _ = answer(capsys, *flags, "--dry-run")
    assert code == 0
    assert "1 files" in out
    assert orphan.exists()
    assert answer(capsys, *flags)[0] == 0
    assert not orphan.exists()


def test_what_a_training_reads_is_not_deleted(capsys, root, tmp_path, monkeypatch):
    first = open_version(str(root))
    second = child_of(first, 2)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = client_of(uri)
    run = client.create_run("0", run_name="reads-it", tags={"adaconv.content_hash": first.root_hash})
    client.create_run("0", run_name="reads-latest", tags={"adaconv.content_hash": second.root_hash})
    flags = ("gc", "--dataset", root, "--keep-last", 1)
    for more in (("--dry-run",), ()):
        code, _, err = answer(capsys, *flags, "--tracking-uri", uri, *more)
        assert code == 2
        assert f"versions {first.version} were to be deleted, but trainings" in err
        assert "some of them: reads-it. Wait" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'nowhere.db'}")
    code, _, err = answer(capsys, *flags)
    assert (code, "expected MLflow's database at" in err) == (1, True)
    assert open_version(f"{root}@{first.version}") == first
    client.set_terminated(run.info.run_id, "FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert answer(capsys, *flags)[0] == 0
    assert list_versions(str(root)) == [second.version]
