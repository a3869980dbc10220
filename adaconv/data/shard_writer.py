"""One shard: its tar, its manifest rows, the refused images with their reasons. The unit of commit."""

import hashlib
import json
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconv import storage
from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import ingest
from adaconv.data.manifest import Shard
from adaconv.data.plan import Candidate, ShardPlan
from adaconv.images import ImageError

if TYPE_CHECKING:
    import webdataset


def write_shard(plan: ShardPlan, recipe: RecipeConfig, root: str) -> tuple[Shard | None, list[dict[str, Any]]]:
    """Ingest a shard's images and publish its tar under the name of its content.

    Returns:
        the shard, or None if every image was refused; and a manifest row for each image.
    """
    import webdataset  # brings torch: three seconds that a worker which only looks at headers need not wait

    rows = []
    with tempfile.TemporaryDirectory(prefix="adaconv-shard-") as scratch:
        path = Path(scratch) / "shard.tar"
        with webdataset.TarWriter(str(path), encoder=False, mtime=0.0, user="", group="", mode=0o644) as tar:
            for candidate in plan.candidates:
                rows.append(_write_sample(tar, candidate, recipe))
        if not any(row["state"] != "quarantined" for row in rows):
            return None, rows
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard = Shard(
            name=f"{sha256[:16]}.tar",
            rows=sum(row["state"] != "quarantined" for row in rows),
            bytes=path.stat().st_size,
            sha256=sha256,
        )
        with tarfile.open(path) as written:
            places = {member.name: (member.offset_data, member.size) for member in written}
        for row in rows:
            if row["state"] != "quarantined":
                row["shard"] = shard.name
                row["offset"], row["size"] = places[f"{row['key']}.jpg"]
        storage.publish_file(path, storage.join(root, "shards", shard.name))
    return shard, rows


def row_of(candidate: Candidate, state: str, reason: str = "") -> dict[str, Any]:
    """A manifest row of an image that is in no shard (yet)."""
    return {
        "key": candidate.key,
        "state": state,
        "reason": reason,
        "source": candidate.source,
        "source_sha256": candidate.sha256,
        "label": candidate.label,
        "width": candidate.width,
        "height": candidate.height,
        "shard": None,
        "offset": None,
        "size": None,
    }


def _write_sample(tar: "webdataset.TarWriter", candidate: Candidate, recipe: RecipeConfig) -> dict[str, Any]:
    try:
        sample = ingest(storage.read_bytes(candidate.uri), candidate.source, recipe)
    except ImageError as error:
        return row_of(candidate, "quarantined", error.reason)
    described = {
        "source": candidate.source,
        "source_sha256": candidate.sha256,
        "label": candidate.label,
        "source_size": [candidate.width, candidate.height],
    }
    tar.write(
        {
            "__key__": candidate.key,
            "jpg": sample.jpeg,
            "json": json.dumps(described, sort_keys=True, ensure_ascii=False).encode(),
        }
    )
    row = row_of(candidate, "repaired" if sample.repairs else "kept", ",".join(sample.repairs))
    return {**row, "width": sample.width, "height": sample.height}
