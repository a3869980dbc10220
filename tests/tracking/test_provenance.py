"""Who and what made a run."""

import os
import pwd
import random
import subprocess

import pytest

from adaconv.tracking import provenance


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("ADACONV_GIT_COMMIT", "ADACONV_GIT_DIFF"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkout(tmp_path):
    """A folder in a repository of one commit."""
    settings = ("-c", "user.name=ann", "-c", "user.email=ann@example.org")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("one\n")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        subprocess.run(["git", *settings, *command], cwd=tmp_path, check=True)
    return tmp_path / "code"


def test_the_commit_is_told_and_what_differs_from_it(checkout):
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    tags = {"git.commit": said.stdout.strip(), "mlflow.source.git.commit": said.stdout.strip()}
    assert provenance.git_tags(checkout) == {**tags, "git.dirty": "False"}
    assert "git.diff" not in provenance.files(checkout)
    (checkout / "new.py").write_text("x\n")
    assert provenance.git_tags(checkout) == {**tags, "git.dirty": "True"}
    (checkout / "a.py").write_bytes(b"tw\xf6\n")  # not UTF-8
    subprocess.run(["git", "add", "a.py"], cwd=checkout, check=True)
    diff = provenance.files(checkout)["git.diff"]
    assert diff.startswith("diff --git a/code/a.py")
    assert "-one\n+tw�\n" in diff
    assert diff.endswith("+++ b/code/new.py\n@@ -0,0 +1 @@\n+x\n")
    left = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True)
    assert left.stdout == "M  code/a.py\n?? code/new.py\n"  # as it was


def test_a_difference_can_be_applied_whatever_it_ends_with(checkout):
    (checkout / "a.py").write_text("one\n\n\n\n")
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "2"], cwd=checkout, check=True
    )
    (checkout / "a.py").write_text("two\n\n\n\n")
    diff = provenance.files(checkout)["git.diff"]
    subprocess.run(["git", "checkout", "-q", "."], cwd=checkout, check=True)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=checkout.parent, check=True)
    assert (checkout / "a.py").read_text() == "two\n\n\n\n"


def test_a_repository_around_an_installed_package_is_not_its_own(checkout):
    (checkout / "venv").mkdir()
    (checkout / "venv" / "COMMIT").write_text("abc\n")
    assert provenance.git_tags(checkout / "venv")["git.commit"] == "abc"


def test_a_diff_is_cut_to_what_a_page_can_show(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "_LONGEST_DIFF", 10)
    (checkout / "a.py").write_text("two\n")
    assert provenance.files(checkout)["git.diff"] == "diff --git"


@pytest.mark.parametrize("without", ["repository", "commit", "git"])
def test_without_a_commit_nothing_is_told_of_git(tmp_path, monkeypatch, without):
    if without == "commit":
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    if without == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_tags(tmp_path) == {}
    assert list(provenance.files(tmp_path)) == ["environment.txt"]


def test_a_jobs_copy_knows_what_its_checkout_knew(checkout, tmp_path_factory, monkeypatch):
    copy = tmp_path_factory.mktemp("copy")
    for text in ("one\n", "t\xf6\n" * 100_000):
        (checkout / "a.py").write_text(text)
        told = provenance.variables(checkout)
        assert sum(map(len, told.values())) < 4000
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        assert provenance.git_tags(copy) == provenance.git_tags(checkout)
        assert provenance.files(copy) == provenance.files(checkout)
    assert provenance.git_tags(copy)["git.dirty"] == "True"
    assert provenance.variables(copy) == told  # from a job to one that it submits


def test_a_difference_that_no_variable_holds_stays_behind_and_is_told(checkout, caplog):
    (checkout / "a.py").write_text(random.Random(1).randbytes(60_000).hex())
    assert list(provenance.variables(checkout)) == ["ADACONV_GIT_COMMIT"]
    assert "too much to travel with the job" in caplog.text


def test_a_checkout_and_an_image_are_believed_before_the_environment(checkout, tmp_path_factory, monkeypatch):
    """Variables of a cluster's nodes must not speak for code that somebody brought to them, nor the other way."""
    monkeypatch.setenv("ADACONV_GIT_COMMIT", "f" * 40)
    assert provenance.git_tags(checkout)["git.commit"] != "f" * 40
    image = tmp_path_factory.mktemp("image")
    (image / "COMMIT").write_text("a" * 40 + "-dirty\n")
    assert provenance.git_tags(image) == {
        "git.commit": "a" * 40,
        "git.dirty": "True",
        "mlflow.source.git.commit": "a" * 40,
    }


def test_every_package_is_listed_once_in_order(tmp_path):
    lines = provenance.files(tmp_path)["environment.txt"].splitlines()
    assert lines == sorted(set(lines), key=str.lower)
    assert any(line.startswith("pytest==") for line in lines)


def test_a_user_without_a_name_is_told_by_number(monkeypatch):
    """`docker run --user 12345`: no entry in the container's list of users."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert provenance.user() == f"uid {os.getuid()}"
