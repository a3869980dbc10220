import io
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest

from adaconv.data.ingest import ingest
from adaconv.data.plan import ShardPlan
from adaconv.data.shard_writer import _Tar, write_shard
from adaconv.data.sources import iter_images
from tests.helpers import RECIPE, look_at


@pytest.mark.parametrize("blocks", range(tarfile.RECORDSIZE // tarfile.BLOCKSIZE))
def test_a_tar_is_as_tarfile_writes_it_wherever_its_last_record_ends(blocks):
    members = {"first.jpg": b"x" * 700, "second.json": b"", "third.jpg": bytes(blocks * tarfile.BLOCKSIZE)}
    written, wanted = io.BytesIO(), io.BytesIO()
    ours = _Tar(written)
    with tarfile.TarFile(fileobj=wanted, mode="w", format=tarfile.USTAR_FORMAT) as theirs:
        for name, data in members.items():
            ours.add(name, data)
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            theirs.addfile(member, io.BytesIO(data))
    ours.end()
    assert written.getvalue() == wanted.getvalue()
    assert ours.size == len(wanted.getvalue())


def test_a_file_that_changed_since_it_was_looked_at_is_refused(photos, tmp_path):
    """Though it is a whole picture still, as long as before: its key and its books would be another's."""
    shutil.copytree(photos, tmp_path / "in")
    candidates = look_at(iter_images((str(tmp_path / "in"),)))
    path = Path(candidates[3].found.uri)
    with path.open("r+b") as file:
        file.seek(13)  # density, as the JFIF header tells it: no pixel depends on it
        byte = file.read(1)[0]
        file.seek(13)
        file.write(bytes((byte ^ 1,)))
    shard, rows = write_shard(ShardPlan(tuple(candidates)), str(tmp_path / "out"), partial(ingest, recipe=RECIPE))
    assert shard.rows == len(candidates) - 1
    assert [row["reason"] for row in rows if row["state"] == "quarantined"] == ["changed"]
    assert rows[3]["state"] == "quarantined"
