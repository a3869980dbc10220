"""Where images are, by the versions of a dataset."""

import hashlib
from pathlib import Path

import pytest

from adaconv import storage
from adaconv.data.changes import by_shard, excluded
from adaconv.data.manifest import latest_version, manifest_uri, publish_version, version_uri
from adaconv.data.selection import Criterion
from adaconv.data.trace import trace
from adaconv.errors import UsageError
from tests.helpers import build_version


def test_what_was_removed_is_known_though_the_version_that_had_it_is_gone(paintings, tmp_path):
    root = str(tmp_path / "data")
    before = build_version(paintings, root)
    (gone, rows), *others = by_shard(before.rows())
    criterion = Criterion("key", rows[0]["key"])
    found = trace([root], [criterion])
    assert [(one.version, one.images, one.shards) for one in found.holdings] == [(before, 1, (gone,))]
    stored = storage.read_range(f"{root}/shards/{gone}", rows[0]["offset"], rows[0]["size"])
    assert found.sha256 == {rows[0]["source_sha256"], hashlib.sha256(stored).hexdigest()}
    after = publish_version(
        root,
        recipe=before.recipe,
        shards=[shard for shard in before.shards if shard.name != gone],
        rows=[*(row for _, mine in others for row in mine), *(excluded(row, "removed_by_key", "") for row in rows)],
        after=latest_version(root),
        parent=before,
    )
    assert [one.version for one in trace([root], [criterion]).holdings] == [before]
    for uri in (version_uri(root, before.version), manifest_uri(root, before.version)):
        Path(uri).unlink()
    found = trace([root], [criterion])
    assert (found.keys, found.sha256, found.holdings) == ({rows[0]["key"]}, {rows[0]["source_sha256"]}, ())
    kept = others[0][1][0]["key"]
    assert [one.version for one in trace([root], [Criterion("key", kept)]).holdings] == [after]
    with pytest.raises(UsageError, match=r"in no version of .*: --key ff: no image has it"):
        trace([root], [criterion, Criterion("key", "ff")])
