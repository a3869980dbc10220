"""Records reach the other side once and in order, whatever happens in between."""

import json
import threading
import time
import tracemalloc

import pytest

from adaconv.tracking import spool as spool_module
from adaconv.tracking.spool import Record, Refused, Spool


class Server:
    """The other side: keeps what it took, and refuses while it is down."""

    def __init__(self):
        self.down, self.steps, self.calls = False, [], 0

    def deliver(self, records: list[Record]) -> None:
        self.calls += 1
        if self.down:
            raise ConnectionError("down")
        self.steps += [record.step for record in records if record.step not in self.steps]


def test_records_arrive_in_order(tmp_path):
    server = Server()
    spool = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    for step in range(50):
        spool.append("metrics", step, {"loss": 0.5})
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert server.steps == list(range(50))


def test_an_outage_loses_nothing_and_holds_nobody_up(tmp_path):
    server = Server()
    server.down = True
    spool = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    for step in range(10):
        spool.append("metrics", step, {"loss": 0.5})
    assert spool.flush(timeout_seconds=0.2) == 10
    server.down = False
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert server.steps == list(range(10))


def test_a_long_history_is_not_read_to_begin_and_not_counted_while_it_is_handed_over(tmp_path, monkeypatch):
    line = b'{"kind": "metrics", "step": 1, "timestamp_ms": 1, "values": {"loss": 0.5}}\n'
    (tmp_path / "records.jsonl").write_bytes(line * 20_000 + b"torn")
    taken, left, counted = [], Spool.left, []
    monkeypatch.setattr(Spool, "left", lambda spool: counted.append(1) or left(spool))
    tracemalloc.start()
    spool = Spool(tmp_path, lambda records: taken.append(len(records)) or time.sleep(0.02), interval_seconds=60)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(line) * 15_000  # other threads of this process have their share
    assert spool.flush(timeout_seconds=30) == 0
    spool.close()
    assert sum(taken) == 20_000
    assert len(counted) == 1


def test_what_is_left_is_handed_over_by_the_next_start(tmp_path):
    server = Server()
    server.down = True
    first = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    first.append("metrics", 1, {"loss": 0.5})
    first.close()
    server.down = False
    second = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    second.append("metrics", 2, {"loss": 0.4})
    assert second.flush(timeout_seconds=10) == 0
    second.close()
    assert server.steps == [1, 2]


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_rest_stays(tmp_path):
    server = Server()
    server.down = True
    first = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    first.append("metrics", 1, {"loss": 0.5})
    first.close()
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"kind": "metrics", "st')
    server.down = False
    second = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    second.append("metrics", 2, {"loss": 0.4})
    assert second.flush(timeout_seconds=10) == 0
    second.close()
    assert server.steps == [1, 2]
    assert all(json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines())


def test_appending_does_not_wait_for_a_server_that_hangs(tmp_path):
    """A server that never answers costs the writer nothing: 1000 records while it hangs."""
    released = threading.Event()
    spool = Spool(tmp_path, lambda records: released.wait(30) or None, interval_seconds=0.01)
    for step in range(1000):
        spool.append("metrics", step, {"loss": 0.5})
    assert spool.left() == 1000
    released.set()
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()


def test_a_full_disk_stops_nobody_and_loses_nothing(tmp_path):
    """Writes fail for a while, one of them half-way; every record arrives in order."""
    server = Server()
    spool = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    file, full = spool._file, True

    class Disk:
        def write(self, data):
            if full:
                file.write(data[: len(data) // 2])
                raise OSError(28, "No space left on device")
            return file.write(data)

        def close(self):
            file.close()

    spool._file = Disk()
    for step in range(10):
        spool.append("metrics", step, {"loss": 0.5})
    full = False
    spool.append("metrics", 10, {"loss": 0.5})
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert server.steps == list(range(11))


def test_a_record_that_is_refused_for_good_is_set_aside_alone(tmp_path):
    taken = []

    def deliver(records):
        if any(record.step == 3 for record in records):
            raise Refused("no such thing")
        taken.extend(record.step for record in records)

    spool = Spool(tmp_path, deliver, interval_seconds=60)
    for step in range(6):
        spool.append("metrics", step, {"loss": 0.5})
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert taken == [0, 1, 2, 4, 5]
    refused = json.loads((tmp_path / "refused.jsonl").read_text())
    assert (refused["step"], refused["answer"]) == (3, "no such thing")


def test_a_damaged_line_is_passed_over(tmp_path):
    server = Server()
    (tmp_path / "records.jsonl").write_text("\x00\x00 nonsense\n")
    spool = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    spool.append("metrics", 1, {"loss": 0.5})
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert server.steps == [1]


@pytest.mark.parametrize("noted", [b"100", b"", b"\0\0\0"])
def test_a_note_of_more_than_there_is_hides_no_record(tmp_path, noted):
    """A loss of power may take the end of the records, which are not synced, or the note's own bytes."""
    server = Server()
    (tmp_path / "drained").write_bytes(noted)
    spool = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    for step in range(3):
        spool.append("metrics", step, {"loss": 0.5})
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert server.steps == [0, 1, 2]


def test_a_note_of_more_than_there_is_does_not_fit_again_once_records_have_grown(tmp_path):
    server = Server()
    (tmp_path / "drained").write_bytes(b"100")
    server.down = True
    spool = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    for step in range(9):
        spool.append("metrics", step, {"loss": 0.5})
    spool.close()
    server.down = False
    spool = Spool(tmp_path, server.deliver, interval_seconds=0.01)
    assert spool.flush(timeout_seconds=10) == 0
    spool.close()
    assert server.steps == list(range(9))


def test_a_folder_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "_OWNER_GOES_SECONDS", 0.2)
    first = Spool(tmp_path, lambda records: None)
    with pytest.raises(BlockingIOError, match="another process tells this run"):
        Spool(tmp_path, lambda records: None)
    first.close()
    Spool(tmp_path, lambda records: None).close()
