"""What is made of a run when it has ended: its page, and models of its last and best checkpoints."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from adaconv import checkpoint, storage
from adaconv.errors import CheckpointError, Interrupted, TrackingError
from adaconv.tracking import time_machine
from adaconv.tracking.logged_model import give_roles, log_model
from adaconv.tracking.mlflow_tracker import MlflowTracker, sync
from adaconv.tracking.runs import NAME_TAG, RESULTS_TAG, client_of, every, find_run, goes_on, quoted
from adaconv.tracking.spool import handed_over

log = logging.getLogger(__name__)


def keep_results(tracker: MlflowTracker, *, checkpoints: str) -> dict[str, Any]:
    """Make the run's page and log the models of its last and best checkpoints; older ones of the kind are deleted.

    None of it is worth the training's end: what goes wrong is a warning, and `pipelines/runs.py sync` does it again.

    Args:
        tracker: of a run that has ended and is handed over.
        checkpoints: folder of the run's checkpoints.

    Returns:
        page (a local file or None) and models, role to URI.
    """
    page: str | None = None
    models: dict[str, str] = {}
    try:
        tracker.claim()
    except OSError as error:
        log.warning("tracking: no page and no models of run %s are made: %s", tracker.description.name, error)
        return {"page": page, "models": models}
    try:
        client = client_of(tracker.uri)
        run = client.get_run(tracker.run_id)
        if goes_on(run):  # on another machine
            return {"page": page, "models": models}
        page = keep_page(client, run, tracker.spool.parent)
        models = keep_models(client, run, checkpoints)
        client.set_tag(tracker.run_id, RESULTS_TAG, checkpoints)
    except Interrupted:
        raise
    except Exception as error:  # of MLflow, or of the library behind a store of artifacts, which has errors of its own
        log.warning("tracking: the page or the models of run %s are missing: %s", tracker.description.name, error)
    finally:
        tracker.release()
    return {"page": page, "models": models}


def hand_over(spool: Path, *, uri: str, checkpoints: str) -> int:
    """Hand over what an outage left in a spool, if anything; returns how many records are left."""
    if not _waiting(spool):
        return 0
    tracker, left = sync(spool, uri=uri)
    if left:
        log.warning("tracking: %s does not answer; %d records wait in %s", tracker.uri, left, spool)
    else:
        log.info("tracking: handed over what waited in %s", spool)
        keep_results(tracker, checkpoints=checkpoints)
    return left


def lacks_its_end(uri: str, run_id: str | None, experiment: str, identity: str) -> bool:
    """Whether a run is anything but FINISHED with its page and models.

    One that somebody deleted, or whose server does not answer, is left alone.
    """
    try:
        client = client_of(uri)
        run_id = run_id or find_run(client, experiment, identity)
        if run_id is None:  # nobody answered as long as it trained
            return True
        run = client.get_run(run_id)
        complete = run.info.status == "FINISHED" and RESULTS_TAG in run.data.tags
        return not complete and run.info.lifecycle_stage == "active"
    except (MlflowException, OSError) as error:
        log.warning("tracking: cannot ask %s how run %s ended: %s", uri, run_id or identity, error)
        return False


def keep_page(client: MlflowClient, run: Run, folder: Path) -> str | None:
    """The run's page, as its artifact and as a local file; None where it logged no sample grid."""
    page = time_machine.render(client, [run])
    if page is None:
        return None
    file = str(folder / time_machine.PAGE_FILE)
    storage.publish_bytes(file, page.encode())
    client.log_artifact(run.info.run_id, file)
    return file


def keep_models(client: MlflowClient, run: Run, checkpoints: str) -> dict[str, str]:
    """Models of the last and the best checkpoint that are whole: role to models:/ URI.

    Raises:
        CheckpointError: none is, of those that are there.
    """
    there, ids = checkpoint.steps_in(checkpoints), {}
    with ExitStack() as stack:
        folders: dict[int, Path] = {}
        while (roles := _roles(there)).keys() - folders:
            step = min(roles.keys() - folders)
            try:
                folders[step] = stack.enter_context(checkpoint.fetched(there[step]))
            except CheckpointError as error:
                del there[step]
                if not there:
                    raise
                log.warning("passing over a damaged checkpoint: %s", error)
        for step, named in roles.items():
            model = log_model(client, run, folders[step], checkpoint_uri=there[step], roles=named)
            ids[model.model_id] = named
    if ids:
        give_roles(client, run, ids)
    return {role: f"models:/{model_id}" for model_id, named in ids.items() for role in named.split(",")}


def _roles(steps: Mapping[int, str]) -> dict[int, str]:
    """Which of some checkpoints are the best and the last."""
    if not steps:
        return {}
    last, best = max(steps), checkpoint.best_step(steps)
    return {last: "best,last"} if best in (None, last) else {best: "best", last: "last"}


def find(client: MlflowClient, run: str) -> Run:
    """A run by its id or by its name.

    Raises:
        TrackingError: there is none, or more than one of this name.
    """
    experiments = [found.experiment_id for found in every(client.search_experiments)]
    try:
        return client.get_run(run)
    except MlflowException:
        try:
            found = every(client.search_runs, experiments, f"tags.`{NAME_TAG}` = {quoted(run)}")
        except MlflowException as error:
            raise TrackingError(f"cannot look for a run of the name {run}: {error}") from error
    if len(found) != 1:
        ids = ", ".join(one.info.run_id for one in found) or "none"
        raise TrackingError(f"expected one run with id or name {run}, found {ids}")
    return found[0]


def _waiting(spool: Path) -> bool:
    records = spool / "records.jsonl"
    return records.exists() and records.stat().st_size > handed_over(spool)
