"""A checkpoint's model as MLflow keeps it: code and safetensors, signature, example, pins, card; the same bytes once.

MLmodel, requirements.txt, input_example.json      what MLflow needs
MODEL_CARD.md, sample_grid.jpg                     what people need
artifacts/model/                                   model.safetensors, model.json
code/adaconv/                                      the rooms of this package that stylizing needs
"""

import importlib.metadata
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Run
from mlflow.models import Model, ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, ColSpec
from PIL import Image

import adaconv
from adaconv import checkpoint
from adaconv.checkpoint import ModelInfo, load_network
from adaconv.images import encode_jpeg
from adaconv.scratch import scratch_folder
from adaconv.tracking import model_card
from adaconv.tracking.runs import every, logged_images
from adaconv.tracking.tracker import GRID_GAP, GRID_KEY

log = logging.getLogger(__name__)

_REQUIREMENTS = ("mlflow", "torch", "numpy", "pillow", "pandas", "safetensors", "fsspec")
# Fewer files: each is a request, and a server with accounts takes a good part of a second for one.
_ROOMS = {
    *(
        "__init__.py",
        "py.typed",
        "allocator.py",
        "checkpoint.py",
        "errors.py",
        "images.py",
        "progress.py",
        "scratch.py",
        "storage.py",
    ),
    *("model", "stylize"),
}
DIGEST_TAG, _CHECKPOINT_TAG, _ROLES_TAG = "adaconv.digest", "adaconv.checkpoint", "adaconv.roles"
_SHOWN_METRICS = ("train/", "probe/")
_BROKEN_OFF_SECONDS = 3600.0  # of an upload: a younger one may be another process's
_EXAMPLE_SIDE, _GRID_SIDE, _LONGEST_DESCRIPTION = 64, 1024, 5000


def log_model(client: MlflowClient, run: Run, folder: Path, *, checkpoint_uri: str, roles: str = "") -> LoggedModel:
    """Keep a fetched checkpoint's model with its run; one of the same weights is there already and is found.

    Args:
        client: of the server.
        run: that made the checkpoint.
        folder: local folder of the checkpoint.
        checkpoint_uri: kept with the model.
        roles: `last`, `best`, `best,last`: such a model goes when another takes its role; empty stays.
    """
    network, info = load_network(folder)
    del network
    found = [one for one in logged_models(client, run) if one.tags.get(DIGEST_TAG) == info.digest]
    if found:
        return found[0]
    metrics = _metrics_at(client, run, info.step)
    tags = {DIGEST_TAG: info.digest, _CHECKPOINT_TAG: checkpoint_uri, "adaconv.step": str(info.step)}
    if roles:
        tags[_ROLES_TAG] = roles
    with scratch_folder("model") as scratch, _patient():
        made = client.create_logged_model(
            run.info.experiment_id,
            name=f"step-{info.step:08d}",
            source_run_id=run.info.run_id,
            tags=tags,
            params={name: f"{value:.6g}" for name, value in metrics.items()},
            model_type="style transfer",
        )
        target = scratch / "model"
        _save(client, run, folder, target, made, info, metrics, checkpoint_uri)
        client.log_model_artifacts(made.model_id, str(target))
    ready = client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(made.model_id, info.step)])
    return ready


def logged_models(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Whole models of a run; one whose upload broke off is none."""
    return [model for model in _models_of(client, run) if str(model.status) == "READY"]


def _models_of(client: MlflowClient, run: Run) -> list[LoggedModel]:
    return every(client.search_logged_models, [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")


def give_roles(client: MlflowClient, run: Run, roles: dict[str, str]) -> list[str]:
    """Say which models are the best and the last, and delete those that were and are not, files as well; so are those
    whose upload broke off, after an hour.

    What has a version in the registry stays.

    Args:
        client: of the server.
        run: whose models they are.
        roles: model id to `best`, `last` or `best,last`.

    Returns:
        ids of deleted models.
    """
    deleted, models = [], _models_of(client, run)
    kept = {model.tags.get(DIGEST_TAG) for model in models if model.model_id in roles}
    for model in models:
        is_whole = str(model.status) == "READY"
        is_left = not is_whole and model.creation_timestamp < (time.time() - _BROKEN_OFF_SECONDS) * 1000
        if model.model_id in roles:
            client.set_logged_model_tags(model.model_id, {_ROLES_TAG: roles[model.model_id]})
        # Of the same weights is what another process keeps that does the same for the run now. And whether it is
        # registered is asked at the last moment.
        elif (
            is_left or (is_whole and _ROLES_TAG in model.tags and model.tags.get(DIGEST_TAG) not in kept)
        ) and model.artifact_location not in _registered(client, run):
            _delete(client, model)
            deleted.append(str(model.model_id))
    return deleted


def delete_if_unused(client: MlflowClient, run: Run, model: LoggedModel) -> None:
    """Delete a copy of a model that is no version of any name, and neither the best nor the last of its run by now."""
    if _ROLES_TAG not in client.get_logged_model(model.model_id).tags and model.artifact_location not in _registered(
        client, run
    ):
        _delete(client, model)


def _registered(client: MlflowClient, run: Run) -> set[str]:
    return {version.source for version in every(client.search_model_versions, f"run_id = '{run.info.run_id}'")}


def _delete(client: MlflowClient, model: LoggedModel) -> None:
    """With its files, which MLflow would leave."""
    get_artifact_repository(model.artifact_location).delete_artifacts()
    client.delete_logged_model(model.model_id)


def card_of(client: MlflowClient, model: LoggedModel) -> str:
    """Its card, as long as a description in the registry may be."""
    with scratch_folder("card") as scratch:
        repository = get_artifact_repository(model.artifact_location)
        card = Path(repository.download_artifacts("MODEL_CARD.md", scratch)).read_text(encoding="utf-8")
    return model_card.as_description(card, _LONGEST_DESCRIPTION)


def newest_grid(client: MlflowClient, run_id: str, *, up_to_step: int) -> Image.Image | None:
    """The last sample grid that a run logged up to a step."""
    found = {step: path for key, step, path in logged_images(client, run_id) if key == GRID_KEY and step <= up_to_step}
    if not found:
        return None
    with scratch_folder("grid") as scratch:
        path = client.download_artifacts(run_id, found[max(found)], scratch)
        return Image.open(path).convert("RGB")


def _save(
    client: MlflowClient,
    run: Run,
    folder: Path,
    target: Path,
    made: LoggedModel,
    info: ModelInfo,
    metrics: dict[str, float],
    checkpoint_uri: str,
) -> None:
    scratch = target.parent
    weights = scratch / "weights"
    weights.mkdir()
    checkpoint.copy_model(folder, weights)
    package, needed = Path(adaconv.__file__).parent, scratch / "adaconv"
    shutil.copytree(package, needed, ignore=_what_stylizing_does_not_need)
    grid = newest_grid(client, run.info.run_id, up_to_step=info.step)
    crop = int(run.data.params.get("data.crop", _EXAMPLE_SIDE))
    anything = AnyType()
    mlflow.pyfunc.save_model(
        str(target),
        python_model=str(package / "tracking" / "served_model.py"),
        artifacts={"model": str(weights)},
        code_paths=[str(needed)],
        signature=ModelSignature(
            inputs=Schema([ColSpec(anything, "content"), ColSpec(anything, "style")]),
            outputs=Schema([ColSpec(anything, "stylized")]),
            params=ParamSchema(
                [
                    ParamSpec("style_side", "long", 256),
                    ParamSpec("alpha", "double", 1.0),
                    ParamSpec("color", "string", "style"),
                ]
            ),
        ),
        input_example=_example(grid, crop),
        pip_requirements=[f"{name}=={_release(name)}" for name in _REQUIREMENTS],
        mlflow_model=Model(run_id=run.info.run_id, model_id=made.model_id),
    )
    if grid is not None:
        shown = grid.copy()
        shown.thumbnail((_GRID_SIDE, _GRID_SIDE))
        (target / "sample_grid.jpg").write_bytes(encode_jpeg(shown, quality=90))
    card = model_card.render(
        title=f"{info.settings['model']['architecture']}, step {info.step}",
        info=info,
        run=run,
        checkpoint_uri=checkpoint_uri,
        metrics=metrics,
        grid="sample_grid.jpg" if grid is not None else None,
    )
    (target / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _what_stylizing_does_not_need(folder: str, names: list[str]) -> set[str]:
    top = Path(folder) == Path(adaconv.__file__).parent
    return {name for name in names if name == "__pycache__" or (top and name not in _ROOMS)}


def _example(grid: Image.Image | None, crop: int) -> dict[str, list[bytes]]:
    """A content and a style as JPEG files: the first of the sample grid, whose cells are `crop` wide."""
    content = style = Image.linear_gradient("L").convert("RGB")
    if grid is not None:
        second = crop + GRID_GAP
        content = grid.crop((0, second, crop, second + crop))
        style = grid.crop((second, 0, second + crop, crop))
    small = (_EXAMPLE_SIDE, _EXAMPLE_SIDE)
    return {
        name: [encode_jpeg(image.resize(small), quality=90)] for name, image in (("content", content), ("style", style))
    }


def _metrics_at(client: MlflowClient, run: Run, step: int) -> dict[str, float]:
    """The last value of each metric up to a step."""
    found = {}
    for name in run.data.metrics:
        if name.startswith(_SHOWN_METRICS):
            points = [point for point in client.get_metric_history(run.info.run_id, name) if point.step <= step]
            if points:
                found[name] = float(max(points, key=lambda point: point.step).value)
    return found


def _release(package: str) -> str:
    """The version without a build tag: `2.13.0`, not `2.13.0+cpu`, which no index holds."""
    return importlib.metadata.version(package).partition("+")[0]


@contextmanager
def _patient() -> Iterator[None]:
    """A server answers a large file only when it has stored it."""
    before = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "900"
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before or "30"
