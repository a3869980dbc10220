import random
import tracemalloc
from pathlib import Path

import pytest

from adaconv.stylize.books import Books


def row(number, **more):
    return {"state": "done", "reason": "", "content": f"ä {number}\n.jpg", "style": "s.jpg", "seconds": 0.5} | more


def test_rows_come_in_any_order_and_are_read_in_the_plans(tmp_path):
    rows = [row(number) for number in range(1000)]
    rows[3] |= {"state": "failed", "reason": "content truncated"}
    rows[4] |= {"state": "failed", "reason": "style too_thin"}
    rows[5] |= {"state": "failed", "reason": "style too_thin"}
    with Books(tmp_path / "rows", len(rows)) as books:
        for number in random.Random(0).sample(range(len(rows)), len(rows)):
            books.enter(number, rows[number])
        assert list(books.rows()) == rows
    assert books.states == {"done": 997, "failed": 3}
    assert books.failures == {"content truncated (ä 3\n.jpg)", "style too_thin (s.jpg)"}


def test_a_pair_without_a_row_is_no_closed_book(tmp_path):
    with Books(tmp_path / "rows", 2) as books:
        books.enter(1, row(1))
        with pytest.raises(AssertionError, match="every pair"):
            next(books.rows())


@pytest.mark.parametrize("pairs", [1, 100_000])  # what is held back for one large write, and what is not
def test_a_full_disk_is_named(pairs):
    def keep():
        with Books(Path("/dev/full"), pairs) as books:
            for number in range(pairs):
                books.enter(number, row(number))
            next(books.rows())

    with pytest.raises(OSError, match="No space") as caught:
        keep()
    assert caught.value.filename == "/dev/full"


def test_a_pair_that_comes_twice_is_no_closed_book(tmp_path):
    with Books(tmp_path / "rows", 2) as books:
        books.enter(1, row(1))
        with pytest.raises(AssertionError, match="once"):
            books.enter(1, row(1))


def test_memory_does_not_grow_with_rows(tmp_path):
    with Books(tmp_path / "rows", 20_001) as books:
        books.enter(20_000, row(20_000))
        tracemalloc.start()
        for number in range(20_000):
            books.enter(number, row(number))
        for _ in books.rows():
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1_000_000  # bytes: other threads of this process have their share, and the rows would be several MB
