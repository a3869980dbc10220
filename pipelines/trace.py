r"""Where images went: dataset versions, the runs and models that were trained on them, the outputs that show them.

    python pipelines/trace.py --dataset data/paintings --artist claude-monet --tracking-uri sqlite:///runs/mlflow.db \
        --stylized stylized/ --output trace/

Ask before `dataset.py gc`: of a version that is gone nobody knows which runs it was for. Nothing is changed; the answer
ends with the commands that would.
"""

import logging
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.trace import TraceConfig

log = logging.getLogger(__name__)

_SHOWN = 20


def plan(config: TraceConfig) -> str:
    where = [*(f"all versions of {root}" for root in config.dataset), "the runs trained on these", *config.stylized]
    return f"look for images in {', '.join(where)}"


def execute(config: TraceConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.manifest import split_spec
    from adaconv.data.selection import criteria_of
    from adaconv.data.trace import trace
    from adaconv.stylize.trace import trace_outputs
    from adaconv.tracking.runs import default_uri
    from adaconv.tracking.trace import runs_trained_on

    roots = list(dict.fromkeys(split_spec(spec)[0] for spec in config.dataset))
    images = trace(roots, criteria_of(config))
    log.info("%d images, in %d versions", len(images.keys), len(images.holdings))
    for held in images.holdings:
        log.info(
            "  %s@%s: %d of them in %d shards", held.version.root, held.version.version, held.images, len(held.shards)
        )
    uri = default_uri(config.tracking_uri, Path.cwd())
    runs = runs_trained_on([held.version.root_hash for held in images.holdings], tracking_uri=uri)
    digests = {digest for run in runs for digest in run.models}
    for run in runs:
        names = [name for known in run.models.values() for name in known]
        log.info("  run %s (%s): %s", run.name, run.run_id, ", ".join(names) or "no models")
    outputs = [one for root in config.stylized for one in trace_outputs(root, images.sha256, digests)]
    counted = Counter(one.by for one in outputs)
    log.info(
        "%d outputs: %d show them as content, %d as style, %d come of a model that was trained on them",
        len(outputs),
        *(counted[by] for by in ("content", "style", "model")),
    )
    held_in = [shlex.quote(root) for root in roots if any(held.version.root == root for held in images.holdings)]
    advice = [f"pipelines/dataset.py remove --dataset {root} {_flags(config)}" for root in held_in]
    advice += [f"pipelines/dataset.py gc --dataset {root} --keep-last 1" for root in held_in]
    advice += [f"train {run.name} anew on the versions that come of it" for run in runs]
    result: dict[str, Any] = {
        "images": len(images.keys),
        "keys": sorted(images.keys)[:_SHOWN],
        "versions": [
            {
                "dataset": held.version.root,
                "version": held.version.version,
                "images": held.images,
                "shards": held.shards,
            }
            for held in images.holdings
        ],
        "runs": [run.__dict__ for run in runs],
        "outputs": dict(counted),
        "advice": advice,
    }
    if config.output:
        named = storage.join(config.output, "outputs.txt")
        lines = "".join(f"{one.by}\t{_in_one_line(one.uri)}\n" for one in outputs)
        storage.publish_bytes(named, lines.encode())
        result["named"] = named
    for line in advice:
        log.info("to undo: %s", line)
    return result


def _in_one_line(uri: str) -> str:
    """What is deleted by the list is nothing that a name adds to it."""
    return cli.visible(uri).replace("\n", r"\u000a").replace("\t", r"\u0009")


def _flags(config: TraceConfig) -> str:
    from adaconv.data.selection import FLAGS

    given = {name.replace("_", "-"): getattr(config, name) for name in FLAGS}
    return " ".join(f"--{flag} {shlex.join(values)}" for flag, values in given.items() if values)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(TraceConfig, argv, prog="pipelines/trace.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
