"""That freed pages are used again; how much time that saves is a row of bench/."""

import os
import resource
import subprocess
import sys

import pytest

from adaconv import allocator

# Blocks as large as activations, taken and freed in a thread as a rank does it; page faults of five times more.
_PROGRAM = """
import resource, sys, threading

def steps(count):
    for _ in range(count):
        blocks = [b"x" * (mib << 20) for mib in (134, 67, 33, 8, 1)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    steps(5)
    before = faults()
    steps(5)
    print(faults() - before)

if sys.argv[1:] == ["keep"]:
    from adaconv import allocator
    allocator.keep()
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""


def faults(environment, *flags):
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *flags],
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
        text=True,
    )
    return int(found.stdout)


@pytest.mark.skipif(not allocator.environment(), reason="the C library is not glibc")
def test_freed_pages_are_used_again():
    pages = 5 * (134 + 67 + 33 + 8 + 1) * 2**20 / resource.getpagesize()
    assert faults({"GLIBC_TUNABLES": ""}) > 0.8 * pages
    assert faults(allocator.environment()) < 0.05 * pages
    assert faults({"GLIBC_TUNABLES": ""}, "keep") < 0.05 * pages


def test_other_c_libraries_are_left_as_they_are(monkeypatch, caplog):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    with caplog.at_level("INFO"):
        assert allocator.environment() == {}
    assert "no glibc" in caplog.text


_GROWN = """
import os
from adaconv import allocator

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

allocator.keep()
blocks = [b"x" * (1 << 20) for _ in range(200)]
del blocks[::2]  # holes between what stays
before = held()
allocator.give_back()
print(before - held())
"""


@pytest.mark.skipif(not allocator.environment(), reason="the C library is not glibc")
def test_what_is_free_goes_back_when_asked():
    done = subprocess.run([sys.executable, "-c", _GROWN], capture_output=True, check=True, text=True)
    assert int(done.stdout) > 90 << 20
