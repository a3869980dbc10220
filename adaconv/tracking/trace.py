"""Which runs were trained on a version of a dataset, themselves or through a model, and which models came of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from adaconv.errors import TrackingError
from adaconv.tracking.logged_model import DIGEST_TAG, logged_models
from adaconv.tracking.runs import INITIAL_RUN_TAG, every, reader_of

_HASH_TAGS = ("adaconv.content_hash", "adaconv.style_hash")


@dataclass(frozen=True)
class TrainedRun:
    """`models`: sha256 of weights to the names that they go by, models:/NAME/VERSION and @ALIAS, or an id."""

    run_id: str
    name: str
    status: str
    models: dict[str, list[str]]


def running_on(root_hashes: Iterable[str], *, tracking_uri: str) -> list[str]:
    """Names of the runs that read one of these versions and are RUNNING, in any experiment.

    Raises:
        TrackingError: the backend cannot be reached.
    """
    try:
        client = reader_of(tracking_uri)
        experiments = [one.experiment_id for one in every(client.search_experiments)]
        running = every(client.search_runs, experiments, "attributes.status = 'RUNNING'")
    except (MlflowException, OSError) as error:
        raise TrackingError(f"cannot look for runs at {tracking_uri}: {error}") from error
    wanted = set(root_hashes)
    return [run.info.run_name for run in running if wanted & {run.data.tags.get(tag) for tag in _HASH_TAGS}]


def runs_trained_on(root_hashes: Iterable[str], *, tracking_uri: str) -> list[TrainedRun]:
    """Runs whose contents or styles were one of these versions, or that began with a model of such; in any experiment.

    Raises:
        TrackingError: the backend cannot be reached.
    """
    try:
        client = reader_of(tracking_uri)
        experiments = [one.experiment_id for one in every(client.search_experiments, view_type=ViewType.ALL)]
        found: dict[str, Run] = {}
        wanted = [(tag, value) for value in root_hashes for tag in _HASH_TAGS]
        while wanted:
            tag, value = wanted.pop()
            runs = every(client.search_runs, experiments, f"tags.`{tag}` = '{value}'", run_view_type=ViewType.ALL)
            new = {run.info.run_id: run for run in runs if run.info.run_id not in found}
            found |= new
            wanted += [(INITIAL_RUN_TAG, run_id) for run_id in new]
        told = []
        for run_id, run in found.items():
            models: dict[str, list[str]] = {}
            versions = every(client.search_model_versions, f"run_id = '{run_id}'")
            for model in (one for one in logged_models(client, run) if DIGEST_TAG in one.tags):  # others log models too
                names = [
                    f"models:/{version.name}{kind}"
                    for version in versions
                    if version.source == model.artifact_location
                    for kind in (
                        f"/{version.version}",
                        *(f"@{alias}" for alias in client.get_model_version(version.name, version.version).aliases),
                    )
                ]
                models[model.tags[DIGEST_TAG]] = names or [f"models:/{model.model_id}"]
            told.append(TrainedRun(run_id, run.info.run_name, run.info.status, models))
        return told
    except (MlflowException, OSError) as error:
        raise TrackingError(f"cannot look for runs at {tracking_uri}: {error}") from error
