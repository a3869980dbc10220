"""What every pipeline does around its work: configuration, plan, exit code, `result.json`.

exit code 0  done
          1  failed: the message says what was expected, what was found and what to do
          2  usage or configuration
        130  interrupted
        143  asked to stop, and stopped where it can go on
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from adaconv import ctrl_c  # first: what follows takes a second
from adaconv.config.base import Config, paths_of
from adaconv.config.load import load_config, to_yaml
from adaconv.errors import AdaConvError, UsageError, of_storage

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Config)

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but the newline and the tab
_SECONDS = ("ADACONV_CLUSTER_PATIENCE", "ADACONV_STORAGE_PATIENCE")


def _output_of(config: Any) -> str | None:
    output: str | None = getattr(config, "output", None)
    return output


def run(
    model: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str,
    doc: str | None,
    plan: Callable[[C], str],
    execute: Callable[[C], dict[str, Any]],
    output: Callable[[C], str | None] = _output_of,
) -> int:
    """Run one pipeline from its command line to its exit code.

    Args:
        model: the pipeline's configuration.
        argv: the command line without the program's name; None reads `sys.argv`.
        prog: how the pipeline is called, as in `pipelines/train.py`.
        doc: the text above the flags in `--help`.
        plan: what `--dry-run` prints after the resolved configuration; it may refuse by raising.
        execute: the work; what it returns goes to `result.json` in the output folder. A result whose `status` is
            `failed` (some parts were not made, the others stand) has an `error` and ends with exit code 1.
        output: where `result.json` goes; None for a pipeline that writes none.
    """
    _print_whatever_paths_hold()
    lines = _Lines(sys.stdout)
    lines.setFormatter(_Visible("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    try:
        _require_seconds()
        try:
            loaded = load_config(model, sys.argv[1:] if argv is None else argv, prog=prog, description=doc or "")
        except BrokenPipeError:  # `--help | head`
            return 0
        config = loaded.config
        with contextlib.suppress(OSError):  # see _Lines
            _say(f"# {prog}: resolved configuration\n{to_yaml(config)}")
        _refuse_relative_paths_in_a_job(config)
        if loaded.dry_run:
            _say(f"# plan (dry run: nothing is written)\n{plan(config)}")
            return 0
        return _execute(config, prog, execute, output(config))
    except AdaConvError as error:
        _tell(f"{prog}: error: {error}")
        return error.exit_code
    except OSError as error:
        _tell(f"{prog}: error: {of_storage(error)}")
        return 1
    except KeyboardInterrupt:
        ctrl_c.tell(prog)
        return ctrl_c.EXIT_CODE
    finally:
        _give_up_what_is_not_printed()


@dataclass(frozen=True)
class Command:
    """One of several that a pipeline has; the fields are arguments of `run`."""

    config: type[Config]
    execute: Callable[[Any], dict[str, Any]]
    plan: Callable[[Any], str]
    output: Callable[[Any], str | None] = _output_of


def run_command(commands: Mapping[str, Command], argv: Sequence[str] | None, *, prog: str, doc: str | None) -> int:
    """Run the command that the first argument names, by its name in `commands`; the other arguments are its flags."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        _say(f"usage: {prog} {{{','.join(commands)}}} [--config FILE] [flags]\n\n{doc}")
        _give_up_what_is_not_printed()
        return 0
    if name not in commands:
        found = f"found {name!r}" if name else "found none"
        _tell(f"{prog}: error: expected a command, one of {', '.join(commands)}; {found}")
        return UsageError.exit_code
    command = commands[name]
    how: dict[str, Any] = {"plan": command.plan, "execute": command.execute, "output": command.output}
    return run(command.config, rest, prog=f"{prog} {name}", doc=doc, **how)


class _Lines(logging.StreamHandler[TextIO]):
    """The work goes on where nobody reads its lines any more (`| head`), or the disk of its log is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def visible(text: str) -> str:
    """Text without what commands a terminal, as escapes of JSON: names of files may hold it."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _say(text: str) -> None:
    """Print what is asked for.

    Raises:
        OSError: it is lost, as on a full disk; not where its reader has had enough (`| head`).
    """
    with contextlib.suppress(BrokenPipeError):
        print(visible(text), flush=True)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # the exit code says that something is wrong
        print(visible(text), file=sys.stderr, flush=True)


def _give_up_what_is_not_printed() -> None:
    """What is left in a buffer would fail once more when Python ends, and make the exit code 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _print_whatever_paths_hold() -> None:
    """Names of files may hold what the terminal's encoding has not, and bytes that are no text: as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_seconds() -> None:
    """Settings of the environment are read when a store or a node is waited for, which may be hours from now.

    Raises:
        UsageError: names the first that is wrong.
    """
    for name in _SECONDS:
        given = os.environ.get(name, "0")
        try:
            is_right = float(given) >= 0
        except ValueError:
            is_right = False
        if not is_right:
            raise UsageError(f"{name}: expected a number of seconds, found {given!r}")


def _refuse_relative_paths_in_a_job(config: Config) -> None:
    """In a Ray job they would lie in the unpacked package, which is thrown away, and on one node only.

    Raises:
        UsageError: names each.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # which Ray sets for a submitted job
        return
    relative = []
    for name, kind, given in paths_of(config):
        if kind == "server" and given is None:
            given = os.environ.get("MLFLOW_TRACKING_URI")
        for path in filter(None, given if isinstance(given, tuple) else (given,)):
            file = path.removeprefix("sqlite:///")
            a_word = kind != "path" and file == path and not Path(path).exists()
            if not a_word and not re.match(r"[a-z0-9]+:/", file) and not Path(file).expanduser().is_absolute():
                relative.append(f"--{name.replace('_', '-')} {path}")
    if relative:
        raise UsageError(
            f"{', '.join(relative)}: a Ray job runs in a copy of the working directory that is thrown away; give "
            "absolute paths that every node sees, or s3://"
        )


def _execute(config: C, prog: str, execute: Callable[[C], dict[str, Any]], output: str | None) -> int:
    started = time.monotonic()
    result = execute(config)
    result = {"pipeline": Path(prog).stem, "status": "done", **result, "seconds": round(time.monotonic() - started, 2)}
    text = json.dumps(result, indent=2, ensure_ascii=False)
    told = f"\n# {prog}: {result['status']} after {result['seconds']:.0f} s\n{text}"
    if output is not None:
        from adaconv import storage

        where = storage.join(output, "result.json")
        # Paths may hold bytes that are no text: their escapes are those of JSON too.
        storage.publish_bytes(where, text.encode(errors="backslashreplace") + b"\n")
        told += f"\nresult: {where}"
    _say(told)
    if result["status"] == "failed":
        _tell(f"{prog}: error: {result['error']}")
        return 1
    return 0


def require_directory(path: str, flag: str) -> Path:
    """A local folder that a flag names, or one clear line."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UsageError(f"{flag}: expected a folder, found nothing at {folder}")
    if not folder.is_dir():
        raise UsageError(f"{flag}: expected a folder, found a file at {folder}")
    return folder.absolute()


def require_writable(output: str) -> None:
    """Refuse an --output on a disk that cannot be written to, in one clear line; its folder is made if need be."""
    from adaconv import storage

    if not storage.is_local(output):  # which the first write asks
        return
    folder = Path(output).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot make the folder {folder}: {error.strerror}; choose another") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(
            f"--output: no permission to write to {folder}; choose another folder or change its permissions"
        )
