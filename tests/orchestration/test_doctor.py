"""What the doctor says of a machine where something is missing: always a finding, never a traceback."""

import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

from adaconv import storage
from adaconv.config.doctor import DoctorConfig
from adaconv.model.encoder_weights import IMAGENET_URL
from adaconv.orchestration import doctor
from adaconv.orchestration.doctor import examine
from adaconv.tracking.mlflow_tracker import open_run
from adaconv.tracking.runs import PROCESS_TAG, client_of, process_here
from pipelines.doctor import main


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which MLflow sets too: it is taken back after the test
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    return tmp_path


def found(check, **config):
    return [(finding.level, finding.what) for finding in examine(DoctorConfig(**config), [check])]


def test_without_git_the_working_directory_is_measured_all_the_same(home, monkeypatch):
    """As in the project's image."""
    monkeypatch.setenv("PATH", "")
    (home / "a.py").write_text("x")
    (home / ".venv").mkdir()
    (home / ".venv" / "b.py").write_text("x")
    ((level, what),) = found(doctor.job_package, working_dir=str(home))
    assert level == "ok"
    assert "sends 1 files" in what


def test_a_working_directory_that_is_not_there_fails(home):
    for given in (f"{home}/no", "~/no"):
        ((level, what),) = found(doctor.job_package, working_dir=given)
        assert (level, what) == ("FAIL", f"--working-dir: expected a folder, found none at {home}/no")


def test_a_working_directory_that_ray_does_not_take_names_its_largest_files(home, monkeypatch):
    for size in (30, 10, 40, 20):
        (home / f"{size}.bin").write_bytes(b"x" * size)
    monkeypatch.setattr(doctor, "REQUEST_LIMIT_BYTES", 100)
    assert [level for level, _ in found(doctor.job_package, working_dir="~")] == ["ok"]
    monkeypatch.setattr(doctor, "REQUEST_LIMIT_BYTES", 99)
    (finding,) = doctor.job_package(DoctorConfig(working_dir="~"))
    assert finding.level == "FAIL"
    assert finding.do == "list in .gitignore: ['40.bin', '30.bin', '20.bin']"


def test_packages_are_compared_with_the_pins(home, monkeypatch):
    monkeypatch.setattr(doctor, "_REPO", home)
    assert found(doctor.python_and_packages)[1][1].startswith("constraints.txt is not here")
    torch, extensions = version("torch").partition("+")[0], version("typing_extensions")
    pins = home / "constraints.txt"
    pins.write_text(f"torch=={torch}\ntyping-extensions=={extensions}\nnobody-has-this==1.0\n")
    assert found(doctor.python_and_packages)[1] == ("ok", "2 packages as pinned in constraints.txt")
    pins.write_text(f"torch=={torch}\ntyping-extensions==0.1\n")
    ((level, what),) = found(doctor.python_and_packages)[1:]
    assert (level, what) == ("note", f"other versions than tested: typing-extensions {extensions} (pinned 0.1)")


def test_a_folder_of_the_home_is_found(home):
    ((level, what),) = found(doctor.storage_of_output, output="~/out")
    assert level == ("ok" if shutil.disk_usage(home).free > 10e9 else "note")
    assert f"{home}/out is not there yet, and can be made and written to" in what
    assert not (home / "out").exists()  # it may be mistyped
    (home / "out").mkdir()
    assert f"{home}/out is writable" in found(doctor.storage_of_output, output="~/out")[0][1]
    assert list((home / "out").iterdir()) == []


def test_an_output_that_cannot_be_written_fails(home):
    (home / "file").write_text("")
    ((level, what),) = found(doctor.storage_of_output, output="~/file/out")
    assert level == "FAIL"
    assert what.startswith(f"cannot use {home}/file/out: ")


def test_an_output_on_s3_has_no_disk(bucket):
    ((level, what),) = found(doctor.storage_of_output, output=f"{bucket}/out")
    assert level == "ok"
    assert f"{bucket}/out is writable" in what
    assert "GB free" not in what
    assert list(storage.walk(bucket)) == []


def test_weights_are_looked_for_and_never_fetched(home):
    ((level, what),) = found(doctor.encoder_weights, encoder_weights="seeded:3")
    assert (level, what.partition(":")[0]) == ("note", "encoder weights seeded")
    ((level, what),) = found(doctor.encoder_weights)
    assert (level, IMAGENET_URL in what) == ("note", True)
    ((level, what),) = found(doctor.encoder_weights, encoder_weights="https://127.0.0.1:9/vgg.pth")
    assert (level, "the first training downloads https://127.0.0.1:9/vgg.pth" in what) == ("note", True)
    for wrong in (str(home / "vgg.pth"), "seeded:x"):
        ((level, what),) = found(doctor.encoder_weights, encoder_weights=wrong)
        assert (level, "expected" in what) == ("FAIL", True)
    (home / "vgg.pth").write_bytes(b"")
    ((level, what),) = found(doctor.encoder_weights, encoder_weights=str(home / "vgg.pth"))
    assert (level, what) == ("ok", f"encoder weights {home}/vgg.pth: {home}/vgg.pth")


def test_an_address_of_jobs_is_none_for_pipelines(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    ((level, what),) = found(doctor.ray_cluster)
    assert (level, what.partition(" ")[0]) == ("note", "RAY_ADDRESS=http://127.0.0.1:8265")


def test_runs_on_s3_are_looked_for_where_a_training_tells_of_them(home, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    ((level, what),) = found(doctor.tracking, output="s3://bucket/runs")
    assert (level, what.partition(" is made")[0]) == (
        "ok",
        f"tracking: sqlite:///{home}/adaconv-runs-{os.geteuid()}/mlflow.db",
    )


def test_a_run_of_a_dead_process_is_ended(home):
    assert "is made by the first run" in found(doctor.tracking, output="~")[0][1]
    assert not (home / "mlflow.db").exists()
    uri = f"sqlite:///{home}/mlflow.db"
    run = {"experiment": "test", "params": {}, "tags": {}, "datasets": {}, "config_yaml": ""}
    tracker = open_run(uri=uri, identity="a", name="a", spool_directory=home / "a" / "spool", **run)
    tracker.release()
    # By name: MLflow's own setting is a global, which threads of runs that other tests left may change.
    assert found(doctor.tracking, tracking_uri=uri) == [("ok", f"tracking: {uri} answers, 2 experiments")]
    client_of(uri).set_tag(tracker.run_id, PROCESS_TAG, process_here().replace(f" {os.getpid()} ", " 999999999 "))
    (_, ended) = found(doctor.tracking, tracking_uri=uri)
    assert ended[0] == "note"
    assert f"run a ({tracker.run_id}) was left RUNNING and is FAILED now" in ended[1]
    assert client_of(uri).get_run(tracker.run_id).info.status == "FAILED"


def test_what_to_do_follows_where_there_is_something():
    assert str(doctor.Finding("ok", "all is well")) == "ok    all is well"
    assert str(doctor.Finding("FAIL", "it is gone", "look for it")) == "FAIL  it is gone -> look for it"


def test_a_damaged_database_is_named(home):
    (home / "mlflow.db").write_text("damaged")
    ((level, what),) = found(doctor.tracking, output="~")
    assert level == "FAIL"
    assert what.startswith(f"tracking: sqlite:///{home}/mlflow.db does not answer: ")
    assert what.endswith("file is not a database")


def test_a_check_that_raises_has_failed_and_the_next_is_made(monkeypatch, capsys):
    def of_the_moon(config):
        yield doctor.Finding("ok", "it is there")
        raise ZeroDivisionError("of its phase\nand more")

    monkeypatch.setattr(doctor, "CHECKS", (of_the_moon, doctor.python_and_packages))
    assert main([]) == 1
    written = capsys.readouterr()
    assert "FAIL  of the moon could not be checked: ZeroDivisionError: of its phase -> " in written.out
    assert "ok    Python 3" in written.out
    assert "1 of 4 checks failed" in written.err
