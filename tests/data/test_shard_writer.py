import io
import tarfile

import pytest

from adaconv.data.shard_writer import _Tar


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
