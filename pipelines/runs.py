"""What is done with runs that have ended.

    python pipelines/runs.py sync --runs runs/          hands over what an outage of the tracking server left on disk
    python pipelines/runs.py page --run NAME --output pages/    samples at every step, as one HTML page; --against NAME
    python pipelines/runs.py reap                       ends what is RUNNING though its process is dead

Each takes --help, --config and --dry-run as every pipeline does.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconv import cli
from adaconv.cli import Command
from adaconv.config.runs import PageConfig, ReapConfig, SyncConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


def sync(config: SyncConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.errors import TrackingError
    from adaconv.tracking.mlflow_tracker import sync
    from adaconv.tracking.results import keep_results
    from adaconv.tracking.runs import default_uri

    uri = default_uri(config.tracking_uri, Path.cwd()) if config.tracking_uri else None
    left, ids, going_on, problems = 0, {}, list[str](), list[str]()
    for spool in _spools(config):
        try:
            tracker, waiting = sync(spool, uri=uri, timeout_seconds=config.timeout_seconds)
        except TrackingError as error:
            if isinstance(error.__cause__, BlockingIOError):
                log.info("%s is of a run that is going on and hands over by itself", spool)
                going_on.append(str(spool))
            else:
                problems.append(str(error))
            continue
        left += waiting
        if waiting:
            problems.append(
                f"{waiting} records of {spool} are not handed over: {tracker.uri} did not take them in time; the same "
                "command goes on"
            )
            continue
        ids[tracker.description.name] = tracker.run_id
        folder = tracker.description.tags.get("adaconv.folder", str(spool.parent))
        keep_results(tracker, checkpoints=storage.join(folder, "checkpoints"))
    result = {"runs": ids, "left": left, "going_on": going_on}
    return {**result, "status": "failed", "error": "\n".join(problems)} if problems else result


def page(config: PageConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.errors import TrackingError
    from adaconv.tracking.results import find
    from adaconv.tracking.time_machine import PAGE_FILE, render

    client = _client(config.tracking_uri)
    runs = [find(client, name) for name in (config.run, config.against) if name]
    text = render(client, runs, max_bytes=int(config.max_mb * 1e6))
    if text is None:
        raise TrackingError(f"run {config.run} has logged no sample grids, so there is nothing to show")
    where = storage.join(storage.absolute(config.output), PAGE_FILE)
    storage.publish_bytes(where, text.encode())
    return {"page": where, "bytes": len(text.encode()), "runs": [run.info.run_id for run in runs]}


def reap(config: ReapConfig) -> dict[str, Any]:
    from adaconv.tracking.runs import reap

    reaped = reap(_client(config.tracking_uri))
    return {"reaped": [{"run_id": one.run_id, "name": one.name, "why": one.why} for one in reaped]}


def _client(tracking_uri: str | None) -> "MlflowClient":
    """Of a server that answers, or a database that is there."""
    from adaconv.tracking.runs import default_uri, ping, reader_of

    uri = default_uri(tracking_uri, Path.cwd())
    client = reader_of(uri)
    ping(uri)
    return client


def _spools(config: SyncConfig) -> list[Path]:
    folder = cli.require_directory(config.runs, "--runs")
    return sorted(path.parent for pattern in ("spool*", "*/spool*") for path in folder.glob(f"{pattern}/run.json"))


def plan_sync(config: SyncConfig) -> str:
    spools = _spools(config)
    return "\n".join(f"hand over what waits in {spool}" for spool in spools) or f"no spools below {config.runs}"


COMMANDS = {
    "sync": Command(SyncConfig, sync, plan_sync),
    "page": Command(PageConfig, page, lambda c: f"time-machine.html of run {c.run} in {c.output}"),
    "reap": Command(ReapConfig, reap, lambda c: "end what is RUNNING though its process is dead"),
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_command(COMMANDS, argv, prog="pipelines/runs.py", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
