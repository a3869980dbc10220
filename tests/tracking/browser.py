"""A real browser without a screen."""

import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium")
_QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync", "--window-size=1400,1500")  # fmt: skip


def chromium(*arguments: object, budget_ms: int = 60_000) -> str:
    """Open a page for so many milliseconds of its own time; what the browser says."""
    with tempfile.TemporaryDirectory(prefix="adaconv-browser-", ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_QUIET, f"--user-data-dir={profile}", f"--virtual-time-budget={budget_ms}"]
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def page_text(url: str) -> str:
    """The page as it is after its scripts ran."""
    return chromium("--dump-dom", url)


def screenshot(url: str, target: Path) -> Path:
    chromium(f"--screenshot={target}", url)
    return target
