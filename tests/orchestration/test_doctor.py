"""What the doctor says of a machine where something is missing: always a finding, never a traceback."""

import pytest

from adaconv.config.doctor import DoctorConfig
from adaconv.orchestration import doctor
from adaconv.orchestration.doctor import examine
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
    ((level, what),) = found(doctor.job_package, working_dir=f"{home}/no")
    assert (level, what) == ("FAIL", f"--working-dir: expected a folder, found none at {home}/no")


def test_a_folder_of_the_home_is_found(home):
    ((level, what),) = found(doctor.storage_of_output, output="~/out")
    assert level in ("ok", "note")
    assert "~/out is writable" in what
    assert (home / "out").is_dir()


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
