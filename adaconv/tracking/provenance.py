"""Which code made a run: commit, what differs from it, and the packages around it; and who started it.

    a checkout                      git is asked
    an image                        the file COMMIT in the package, which infra/docker/Dockerfile makes
    a job's copy of a checkout      ADACONV_GIT_COMMIT and ADACONV_GIT_DIFF, as pipelines/submit.py gives them

A file tells of an image because variables of one would also tell of other code that a job brings to its nodes.
"""

import base64
import getpass
import importlib.metadata
import logging
import os
import shutil
import subprocess
import zlib
from pathlib import Path

from adaconv.scratch import scratch_folder

log = logging.getLogger(__name__)

_LONGEST_DIFF = 1_000_000  # characters
_LONGEST_VARIABLE = 64_000  # characters; Linux takes 128 KiB, and Ray puts all variables of a job into one argument
_COMMIT, _DIFF = "ADACONV_GIT_COMMIT", "ADACONV_GIT_DIFF"


def git_tags(folder: Path) -> dict[str, str]:
    """Commit and whether files differ from it, in our words and in those that MLflow's pages show; nothing where
    nobody knows.

    Args:
        folder: of the package.
    """
    described, _ = _code(folder)
    if not described:
        return {}
    commit = described.removesuffix("-dirty")
    return {"git.commit": commit, "git.dirty": str(commit != described), "mlflow.source.git.commit": commit}


def files(folder: Path) -> dict[str, str]:
    """Artifacts: `environment.txt`, every installed package, and `git.diff` where files differ from the commit."""
    installed = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    found = {"environment.txt": "\n".join(sorted(installed, key=str.lower)) + "\n"}
    _, diff = _code(folder)
    if diff:
        found["git.diff"] = diff
    return found


def variables(folder: Path) -> dict[str, str]:
    """For the environment of a job that runs a copy of this folder, without git's: what is known of it here."""
    described, diff = _code(folder)
    told = {_COMMIT: described} if described else {}
    if diff:
        packed = base64.b64encode(zlib.compress(diff.encode(), 9)).decode()
        if len(packed) <= _LONGEST_VARIABLE:
            return told | {_DIFF: packed}
        log.warning("what differs from the commit is too much to travel with the job; its run will lack git.diff")
    return told


def user() -> str:
    """Who runs this process; its number where the system knows no name for it, as in a container under any uid."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _code(folder: Path) -> tuple[str, str]:
    """The commit, with `-dirty` behind it where files differ, as `git describe` has it; and the difference."""
    known = _git(folder, "ls-files", ".")  # else the repository is somebody else's, around a virtual environment
    commit, status = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    if known and commit is not None and status is not None:
        return f"{commit.strip()}-dirty" if status else commit.strip(), _difference(folder)[:_LONGEST_DIFF]
    if (note := folder / "COMMIT").exists():
        return note.read_text().strip(), ""
    packed = os.environ.get(_DIFF, "")
    return os.environ.get(_COMMIT, ""), zlib.decompress(base64.b64decode(packed)).decode() if packed else ""


def _difference(folder: Path) -> str:
    """From the commit, with code that git does not know yet: it is in a copy of its index, which stays as it is."""
    index = (_git(folder, "rev-parse", "--git-path", "index") or "").strip()
    with scratch_folder("index") as scratch:
        try:
            shutil.copy(folder / index, scratch / "index")
        except OSError:
            return _git(folder, "diff", "HEAD") or ""
        aside = {"GIT_INDEX_FILE": str(scratch / "index")}
        _git(folder, "add", "--intent-to-add", ":(top)*.py", **aside)
        return _git(folder, "diff", "HEAD", **aside) or ""


def _git(folder: Path, *arguments: str, **variables: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout
