"""Which code made a run: commit, what differs from it, and the packages around it; and who started it."""

import getpass
import importlib.metadata
import os
import subprocess
from pathlib import Path

_LONGEST_DIFF = 1_000_000  # characters


def git_tags(folder: Path) -> dict[str, str]:
    """Commit and whether files differ from it, in our words and in those that MLflow's pages show; nothing where the
    code does not lie in a checkout, as in a Ray job.
    """
    commit, status = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    if commit is None or status is None:
        return {}
    return {"git.commit": commit, "git.dirty": str(bool(status)), "mlflow.source.git.commit": commit}


def files(folder: Path) -> dict[str, str]:
    """Artifacts: `environment.txt`, every installed package, and `git.diff` where files differ from the commit."""
    installed = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    found = {"environment.txt": "\n".join(sorted(installed, key=str.lower)) + "\n"}
    if diff := _git(folder, "diff", "HEAD"):
        found["git.diff"] = diff[:_LONGEST_DIFF] + "\n"
    return found


def user() -> str:
    """Who runs this process; its number where the system knows no name for it, as in a container under any uid."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, errors="replace", check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
