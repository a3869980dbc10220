"""The whole way, small: raw images -> shards -> training -> registered model -> stylized images and a gallery.

    python pipelines/demo.py
    python pipelines/demo.py --content DIR --style DIR

Each stage is the command line that is printed; any of them can be run again by hand. Takes minutes on a laptop.
The network is tiny and its encoder seeded: this shows the system at work, not what a trained model can do.
"""

import contextlib
import json
import logging
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.demo import DemoConfig

log = logging.getLogger(__name__)

_REPO = Path(__file__).resolve().parents[1]


def stages(config: DemoConfig, root: Path) -> list[tuple[str, list[str]]]:
    """The commands of the demo in order: (stage, arguments after `python`)."""
    content = config.content or str(root / "generated" / "photos")
    style = config.style or str(root / "generated" / "paintings")
    photos, paintings, runs = str(root / "data" / "photos"), str(root / "data" / "paintings"), str(root / "runs")
    tracking = ["--tracking.uri", f"sqlite:///{root / 'mlflow.db'}"]
    conf = _REPO / "conf"
    return [
        ("shard photographs", _command("shard", conf, "--source", content, "--output", photos)),
        ("shard paintings", _command("shard", conf, "--source", style, "--output", paintings)),
        (
            "train",
            [
                *_command("train", conf, "--content", photos, "--style", paintings, "--output", runs, *tracking),
                *("--train.steps", str(config.steps), "--scaling.num-workers", str(config.num_workers)),
            ],
        ),
        (
            "register",
            [
                *("pipelines/register.py", "--model", runs, "--name", "adaconv", "--alias", "champion"),
                *("--reason", "made by the demo", "--output", str(root / "model"), *tracking),
            ],
        ),
        (
            "stylize",
            [
                *_command("stylize", conf, "--model", "models:/adaconv@champion", *tracking),
                *("--content", content, "--style", style, "--output", str(root / "stylized")),
                *("--limit-contents", str(config.grid_contents), "--limit-styles", str(config.grid_styles)),
            ],
        ),
    ]


def _command(pipeline: str, conf: Path, *flags: str) -> list[str]:
    return [f"pipelines/{pipeline}.py", "--config", str(conf / pipeline / "smoke.yaml"), *flags]


def plan(config: DemoConfig) -> str:
    return "\n".join(
        f"{name}: {_shown(arguments)}" for name, arguments in stages(config, Path(config.output).absolute())
    )


def execute(config: DemoConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.sources import list_images

    for flag in ("content", "style"):
        if (folder := getattr(config, flag)) is not None:
            list_images((folder,), flag=f"--{flag}")  # a typo is answered here, not by the third stage
    cli.require_writable(config.output)
    root = Path(config.output).absolute()
    config = config.model_copy(
        update={f: storage.absolute(v) for f in ("content", "style") if (v := getattr(config, f)) is not None}
    )
    _draw_missing(config, root)
    seconds = {}
    for name, arguments in stages(config, root):
        began = time.monotonic()
        print(f"\n=== {name}: {_shown(arguments)}", flush=True)
        code = _run([sys.executable, *arguments])
        if code:
            from adaconv.errors import JobError

            raise JobError(f"the stage '{name}' ended with exit code {code}; its message is above")
        seconds[name] = round(time.monotonic() - began, 1)
    database = f"sqlite:///{root / 'mlflow.db'}"
    return {
        "seconds_of": seconds,
        "run_id": _result(root / "runs")["run_id"],
        "model": _result(root / "model")["model"],
        "gallery": _result(root / "stylized")["gallery"],
        "samples_over_time": str(Path(_result(root / "runs")["run"]) / "time-machine.html"),
        "mlflow_ui": shlex.join(["mlflow", "ui", "--backend-store-uri", database, "--port", "5000"]),
    }


def _run(command: list[str]) -> int:
    """Exit code of a stage, which is asked to stop when the demo is, and is waited for."""
    asked = threading.Event()

    def stop(*_: object) -> None:
        asked.set()
        stage.terminate()

    with subprocess.Popen(command, cwd=_REPO) as stage:
        before = signal.signal(signal.SIGTERM, stop)
        try:
            code = stage.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(subprocess.TimeoutExpired):
                stage.wait(timeout=10)  # a terminal's Ctrl-C reaches the stage as well, a signal to the demo does not
            stage.terminate()
            stage.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return 128 + signal.SIGTERM if asked.is_set() else code


def _draw_missing(config: DemoConfig, root: Path) -> None:
    from adaconv.data.synthetic import generate_paintings, generate_photos

    for given, folder, draw in (
        (config.content, "photos", generate_photos),
        (config.style, "paintings", generate_paintings),
    ):
        target = root / "generated" / folder
        if given is None and len(list(target.glob("*.jpg"))) < config.images:
            began = time.monotonic()
            draw(target, config.images, seed=0)
            log.info("drew %d %s in %.1f s: %s", config.images, folder, time.monotonic() - began, target)


def _result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _shown(arguments: Sequence[str]) -> str:
    return shlex.join(["python", *arguments])


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(DemoConfig, argv, prog="pipelines/demo.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
