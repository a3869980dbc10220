"""Decoders in a process of their own, for images one of which is thought to kill whoever decodes it.

    python -m adaconv.data.isolation      answers on stdout for each request on stdin, until stdin ends

A frame is a line of JSON, whose `bytes` says how many raw bytes follow it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import IO, Any

from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import Header, Refusal, Sample, ingest, look

_ATTEMPTS = 2  # deaths by one image's hand before it is refused: the first may have had another cause
_KILLS_ADMITTED = 5  # SIGKILL comes from outside: an operator, or memory that ran out


class IsolatedDecoder:
    """`look` and `ingest` as in ingest.py, and a refusal `decoder_crashed` for what kills the process twice."""

    def __init__(self, recipe: RecipeConfig) -> None:
        self._recipe = recipe.model_dump_json()
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "IsolatedDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def look(self, data: bytes) -> Header | Refusal:
        answer = self._ask("look", "", data)
        assert not isinstance(answer, Sample)
        return answer

    def ingest(self, data: bytes, name: str) -> Sample | Refusal:
        answer = self._ask("ingest", name, data)
        assert not isinstance(answer, Header)
        return answer

    def _ask(self, what: str, name: str, data: bytes) -> Header | Sample | Refusal:
        deaths: list[int] = []
        while True:
            child = self._child or self._start()
            assert child.stdin
            assert child.stdout
            try:
                _send(child.stdin, {"what": what, "name": name, "recipe": self._recipe}, data)
                values, payload = _receive(child.stdout)
            except (BrokenPipeError, EOFError):
                deaths.append(self._end())
                if len(deaths) - deaths.count(-signal.SIGKILL) >= _ATTEMPTS or len(deaths) > _KILLS_ADMITTED:
                    return Refusal("decoder_crashed", f"the decoder ended with {_name_of(deaths[-1])}")
                continue
            kind = values.pop("kind")
            if kind == "header":
                return Header(**values)
            if kind == "sample":
                return Sample(**{**values, "repairs": tuple(values["repairs"])}, jpeg=payload)
            return Refusal(**values, thumbnail=payload or None)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "adaconv.data.isolation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        return self._child

    def _end(self) -> int:
        """End the child; its exit code."""
        child, self._child = self._child, None
        if child is None:
            return 0
        assert child.stdin
        assert child.stdout
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        return child.wait()


def _name_of(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def _send(pipe: IO[bytes], values: dict[str, Any], payload: bytes) -> None:
    pipe.write(json.dumps({**values, "bytes": len(payload)}).encode() + b"\n" + payload)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    values = json.loads(line)
    size = values.pop("bytes")
    payload = pipe.read(size)
    if len(payload) < size:
        raise EOFError
    return values, payload


def _answer(values: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    recipe = RecipeConfig.model_validate_json(values["recipe"])
    answer = look(data, recipe) if values["what"] == "look" else ingest(data, values["name"], recipe)
    if isinstance(answer, Header):
        return {"kind": "header", **asdict(answer)}, b""
    if isinstance(answer, Sample):
        described = asdict(answer)
        jpeg = described.pop("jpeg")
        return {"kind": "sample", **described}, jpeg
    return {"kind": "refusal", "reason": answer.reason, "detail": answer.detail}, answer.thumbnail or b""


def main() -> int:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a decoder prints is no answer
    while True:
        try:
            values, data = _receive(sys.stdin.buffer)
        except EOFError:
            return 0
        _send(answers, *_answer(values, data))


if __name__ == "__main__":
    sys.exit(main())
