"""What `ray job submit --working-dir` sends, known before it is sent: Ray answers too much with a bare status 413."""

import os
import shutil
import subprocess
from pathlib import Path

from adaconv.errors import UsageError

REQUEST_LIMIT_BYTES = 100 * 2**20  # of the dashboard's server, for the zipped folder
_NEVER_SENT = {".git", ".venv", "venv", "__pycache__"}  # Ray's own defaults


def package_files(folder: Path) -> dict[str, int]:
    """Files of a folder that are neither ignored by git nor by Ray: relative name to bytes.

    Outside a git checkout, and where git is not installed, only Ray's own exclusions are known.
    """
    names = _known_to_git(folder)
    if names is None:
        names = [
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if not _NEVER_SENT & set(path.relative_to(folder).parts)
        ]
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _known_to_git(folder: Path) -> list[str] | None:
    if not shutil.which("git"):
        return None
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return [name for name in os.fsdecode(listed.stdout).split("\0") if name] if listed.returncode == 0 else None


def refuse_too_large(folder: Path) -> int:
    """Bytes of a working directory, before compression.

    Raises:
        UsageError: Ray would not take it; names the largest files.
    """
    files = package_files(folder)
    total = sum(files.values())
    if total > REQUEST_LIMIT_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:5]
        named = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in largest)
        raise UsageError(
            f"the working directory {folder} has {total / 2**20:.0f} MiB that git does not ignore; Ray takes "
            f"{REQUEST_LIMIT_BYTES / 2**20:.0f} MiB. Largest: {named}. Move them, or list them in .gitignore"
        )
    return total
