"""Status lines: when, and what they say."""

import re
from itertools import pairwise

import pytest

from adaconv.progress import Due, Progress, duration


@pytest.mark.parametrize("tick", [1, 4, 7])
def test_ten_minutes_have_less_than_twenty_lines_whenever_they_begin(tick):
    now, due = [0.0], []
    is_due = Due(clock=lambda: now[0])
    for second in range(tick, 3600, tick):
        now[0] = second
        if is_due():
            due.append(second)
    if tick == 1:
        assert due[:7] == [5, 10, 20, 40, 80, 120, 160]
    assert due[0] < 5 + tick
    assert max(later - one for one, later in pairwise(due)) < 40 + tick
    assert max(sum(first <= second < first + 600 for second in due) for first in due) < 20


def test_a_line_says_rate_and_eta():
    now, lines = [0.0], []
    progress = Progress("shard", total=100, clock=lambda: now[0], emit=lines.append)
    for second in range(1, 11):
        now[0] = second
        progress.advance(5, quarantined=second // 4)
    assert len(lines) == 2
    assert lines[0] == "shard 25/100 | 25 % | 5 images/s | 1 quarantined | eta 15 s"


def test_work_that_was_done_before_does_not_count_towards_the_rate():
    now, lines = [0.0], []
    progress = Progress("stylize", total=100, done=90, clock=lambda: now[0], emit=lines.append)
    now[0] = 10
    progress.advance(5)
    assert "95/100" in lines[0]
    assert "0.5 images/s" in lines[0]


def test_what_is_told_ahead_is_on_the_line_until_it_is_counted():
    now, lines = [0.0], []
    progress = Progress("stylize", total=100, clock=lambda: now[0], emit=lines.append)
    for seconds, ahead in ((6, 20), (12, 40)):
        now[0] = seconds
        progress.look_ahead(ahead)
    progress.look_ahead(0)
    progress.advance(45)
    assert lines[0] == "stylize 20/100 | 20 % | 3.33 images/s | eta 24 s"
    assert lines[1].startswith("stylize 40/100 ")
    assert progress.line().startswith("stylize 45/100 ")
    progress.look_ahead(70)  # some of which are among the 45
    assert progress.line().startswith("stylize 100/100 | 100 % ")


def test_what_is_found_done_does_not_count_towards_the_rate_either():
    """A job that goes on finds 9,000 of 10,000 in 9 s, then makes one a second: 900 are left, not two seconds' work."""
    now, lines = [0.0], []
    progress = Progress("stylize", total=10_000, clock=lambda: now[0], emit=lines.append)
    progress.advance(9000, free=True)
    now[0] = 100
    progress.advance(100)
    assert lines == ["stylize 9100/10000 | 91 % | 1 images/s | eta 15.0 min"]


def test_an_hour_of_what_was_there_says_nothing_of_the_rest():
    """900,000 were found done in an hour; 100,000 are left, and 100 are made in a second."""
    now, lines = [0.0], []
    progress = Progress("stylize", total=1_000_000, clock=lambda: now[0], emit=lines.append)
    for _ in range(900):
        now[0] += 4
        progress.advance(1000, free=True)
    assert progress.line().endswith("| 0 images/s | eta 6.7 min")  # as if all were there: nothing tells otherwise
    for _ in range(700):
        now[0] += 1
        progress.advance(100)
    assert progress.line() == "stylize 970000/1000000 | 97 % | 100 images/s | eta 5.0 min"


def test_answers_that_come_seldom_and_many_at_once_have_a_rate():
    now, lines = [0.0], []
    progress = Progress("stylize", total=10_000, clock=lambda: now[0], emit=lines.append)
    for _ in range(6):
        now[0] += 1200
        for _ in range(1000):
            progress.advance()
    now[0] += 1000
    assert re.search(r"\| 0\.(7|8)\d* images/s \| eta 1\.[345] h", progress.line())


def test_the_last_line_says_how_long_it_took():
    now, lines = [0.0], []
    progress = Progress("shard", clock=lambda: now[0], emit=lines.append)
    now[0] = 4
    progress.advance(8)
    progress.close()
    assert lines == ["shard 8 | 2 images/s | took 4 s"]


def test_durations_are_said_as_people_do():
    assert [duration(s) for s in (42, 210, 7560, 200000)] == ["42 s", "3.5 min", "2.1 h", "2.3 days"]
