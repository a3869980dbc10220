"""Checkpoints to named model versions, and any name of a model back to a local folder."""

import importlib.metadata
import logging
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

import adaconv
from adaconv import checkpoint
from adaconv.errors import CheckpointError, TrackingError, UsageError
from adaconv.tracking.mlflow_tracker import client_of

log = logging.getLogger(__name__)

_REQUIREMENTS = ("mlflow", "torch", "numpy", "pillow", "safetensors", "fsspec")


@dataclass(frozen=True)
class RegisteredVersion:
    name: str
    version: str
    alias: str | None
    uri: str
    run_id: str


def register(checkpoint_uri: str, *, name: str, alias: str | None, reason: str, tracking_uri: str) -> RegisteredVersion:
    """Log a checkpoint's model with the run that made it, and give it the next version of a name.

    Args:
        checkpoint_uri: a whole checkpoint; its `meta.json` names the run.
        name: of the registered model.
        alias: moved to the new version; None moves none.
        reason: kept as a tag of the version.
        tracking_uri: of the server or database that holds the run.

    Raises:
        CheckpointError: the checkpoint is not whole, or was not made by a tracked run.
        TrackingError: the registry cannot be reached or refuses.
    """
    folder = checkpoint.fetch(checkpoint_uri)
    meta = checkpoint.load_meta(folder)
    run_id = meta.get("run_id")
    if run_id is None:
        raise CheckpointError(f"{checkpoint_uri} names no tracking run; register a checkpoint of pipelines/train.py")
    try:
        client = client_of(tracking_uri)
        status = client.get_run(run_id).info.status
        logged = _log_model(folder, run_id, step=meta["step"])
        client.set_terminated(run_id, status)  # logging opened the run again
        version = mlflow.register_model(logged, name, tags={"checkpoint": checkpoint_uri, "step": str(meta["step"])})
        if alias:
            client.set_registered_model_alias(name, alias, version.version)
            client.set_model_version_tag(name, version.version, f"alias.{alias}.reason", reason or "registered")
    except (MlflowException, OSError) as error:
        raise TrackingError(f"cannot register {name} at {tracking_uri}: {error}") from error
    uri = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}"
    return RegisteredVersion(name, str(version.version), alias, uri, run_id)


def resolve_model(uri: str, *, tracking_uri: str | None) -> tuple[str, Path]:
    """A local folder with `model.safetensors` and `model.json`, and the exact version that a name means now.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or a checkpoint folder (local or s3://).
        tracking_uri: where models:/ and runs:/ are looked up.

    Returns:
        the URI with an alias replaced by its version, and the folder.

    Raises:
        UsageError: the name is not one of these.
        TrackingError: there is no such model, version or alias, or the registry cannot be reached.
        CheckpointError: the folder holds no whole model.
    """
    if not uri.startswith(("models:/", "runs:/")):
        return uri, checkpoint.fetch(uri)
    if tracking_uri is None:
        raise UsageError(f"{uri} is looked up in MLflow: give --tracking.uri or set MLFLOW_TRACKING_URI")
    try:
        client = client_of(tracking_uri)
        by_alias = re.fullmatch(r"models:/([^/@]+)@([^/]+)", uri)
        if by_alias:
            version = client.get_model_version_by_alias(*by_alias.groups()).version
            uri = f"models:/{by_alias[1]}/{version}"
        target = tempfile.mkdtemp(prefix="adaconv-model-")
        local = Path(mlflow.artifacts.download_artifacts(uri, dst_path=target, tracking_uri=tracking_uri))
    except (MlflowException, OSError) as error:
        raise TrackingError(f"{uri} at {tracking_uri}: {error}; pipelines/register.py makes model versions") from error
    found = sorted(local.rglob("model.safetensors"))
    if not found:
        raise CheckpointError(f"{uri} holds no model.safetensors: it was not registered by pipelines/register.py")
    return uri, found[0].parent


def find_checkpoint(path: str) -> str:
    """A checkpoint folder as it is; of a run or a folder of runs, the newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    from adaconv import storage

    if storage.exists(storage.join(path, "meta.json")):
        return path
    runs = [path, *storage.list_directories(path)]
    found = [uri for run in runs if (uri := checkpoint.newest(storage.join(run, "checkpoints")))]
    if not found:
        raise CheckpointError(
            f"expected a checkpoint, a run or a folder of runs at {path}, found no whole checkpoint below it; "
            "pipelines/train.py writes them"
        )
    return max(found, key=lambda uri: checkpoint.load_meta(checkpoint.fetch(uri))["time"])


def _log_model(folder: Path, run_id: str, *, step: int) -> str:
    """Log the model with its run; returns its models:/ URI."""
    picture = (-1, -1, -1, 3)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), picture, name) for name in ("content", "style")]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), picture)]),
    )
    package = Path(adaconv.__file__).parent
    with tempfile.TemporaryDirectory(prefix="adaconv-register-") as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        checkpoint.copy_model(folder, model)
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Add type hints", UserWarning)  # served_model.py says why there are none
            logged = mlflow.pyfunc.log_model(
                name="stylizer",
                python_model=str(package / "tracking" / "served_model.py"),
                artifacts={"model": str(model)},
                code_paths=[str(package)],
                signature=signature,
                input_example={name: np.zeros((1, 32, 32, 3), np.uint8) for name in ("content", "style")},
                pip_requirements=[f"{name}=={_release(name)}" for name in _REQUIREMENTS],
                step=step,
            )
    return str(logged.model_uri)


def _release(package: str) -> str:
    """The version without a build tag: `2.13.0`, not `2.13.0+cpu`, which no index holds."""
    return importlib.metadata.version(package).partition("+")[0]
