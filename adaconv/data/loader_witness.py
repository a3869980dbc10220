"""What a loader's worker was at when it gave no batch in time: the sample, its shard, and the worker's Python stack."""

import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

_NOTE_BYTES = 1024
_ANSWER_SECONDS = 2.0
_FRAMES = 12  # innermost ones that are told
_WORKERS = 4  # that are told of

_own: Any = None  # in a worker: its _Seen


class _Seen(ctypes.Structure):
    """In memory that the worker and its reader share."""

    _fields_ = (("pid", ctypes.c_int), ("stacks", ctypes.c_int), ("doing", ctypes.c_char * _NOTE_BYTES))


def witnesses(context: BaseContext, workers: int) -> list[Any]:
    """One for each worker, made by the process that will read its batches."""
    return [context.RawValue(_Seen) for _ in range(workers)]


def bear(witness: Any) -> None:
    """In a worker: be seen from now on. A signal writes its stack to a file that lies in memory alone."""
    global _own
    _own, witness.pid, witness.stacks = witness, os.getpid(), -1
    if hasattr(os, "memfd_create"):  # Linux; elsewhere there is no stack to be had from without
        with suppress(OSError):  # a sandbox may forbid it
            witness.stacks = os.memfd_create("stacks")
            faulthandler.register(signal.SIGUSR2, file=witness.stacks, all_threads=False)


def note(doing: str) -> None:
    """In a worker: what it does now; nothing is between batches. In any other process no more than a call."""
    if _own is not None:
        _own.doing = doing.encode(errors="replace")[: _NOTE_BYTES - 1]


def told(seen: Sequence[Any]) -> str:
    """What the workers that are at something are at, a line each and their stacks; empty where none is."""
    busy = [(number, one) for number, one in enumerate(seen) if one.doing]
    lines = []
    for number, one in busy[:_WORKERS]:
        doing = one.doing.decode(errors="replace")
        lines.append(f"worker {number} (pid {one.pid}) was at {doing}{_stack(one)}")
    if len(busy) > _WORKERS:
        lines.append(f"and {len(busy) - _WORKERS} workers more")
    return "\n".join(lines)


def _stack(seen: Any) -> str:
    if seen.stacks < 0:
        return ""
    with suppress(OSError):  # it is gone
        stacks, found = Path(f"/proc/{seen.pid}/fd/{seen.stacks}"), ""
        os.kill(seen.pid, signal.SIGUSR2)
        asked = time.monotonic()
        while time.monotonic() - asked < _ANSWER_SECONDS:
            time.sleep(0.05)
            before, found = found, stacks.read_text(errors="replace")
            if found and found == before:  # all of it is there
                _, *frames = found.rstrip().splitlines()  # innermost first
                return ", in" + "".join(f"\n{frame}" for frame in frames[:_FRAMES])
        return ", and does not answer: the system holds it, as one whose disk is away"
    return ", and is gone"
