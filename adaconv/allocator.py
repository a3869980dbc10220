"""Memory that a step or an image frees is kept for the next one, instead of going back to the system and coming anew.

glibc maps each large block anew and unmaps it when it is freed, so the system clears every page of it at its first
touch, in every step. On CPUs this is a good part of a step (row train_step of bench/). GPU memory is not affected.
"""

import ctypes
import logging
import os
import platform

log = logging.getLogger(__name__)

_TUNABLES = {
    "mmap_max": 0,  # large blocks come from the heap, not from a mapping of their own
    "trim_threshold": 2**62,  # the end of the heap is never given back
    "top_pad": 2**28,  # and grows by 256 MiB at a time
    # One heap for all threads: other threads' heaps are pieces of 64 MiB that come and go whatever is said above, and
    # a rank's steps run in a thread of Ray's.
    "arena_max": 1,
}


# From malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD, whose values are of 32 bits.
_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 2**26}


def keep() -> None:
    """Do so from now on in this process, for what its main thread takes; nothing where the C library is not glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in _MALLOPT.items():
            libc.mallopt(option, value)


def give_back() -> None:
    """Let the system have what is free now; nothing where the C library is not glibc.

    What is free lies in pieces among what is not, and pieces of the wrong size are not used again: what a process takes
    grows with what it took before.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def environment() -> dict[str, str]:
    """What a process must find in its environment when it starts, to keep the most memory that it ever used.

    Empty where the C library is not glibc. glibc reads it once, before any code of ours; in a running process `mallopt`
    does not reach threads that already have a heap of their own.
    """
    library, version = platform.libc_ver()
    if library != "glibc":
        log.info("freed memory goes back to the system: the C library is no glibc")
        return {}
    log.info("freed memory is kept for reuse (glibc %s)", version)
    given = os.environ.get("GLIBC_TUNABLES")  # the last one counts where a setting is there twice
    ours = [f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items()]
    return {"GLIBC_TUNABLES": ":".join([*ours, given] if given else ours)}
