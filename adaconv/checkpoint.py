"""The contract between training, the registry and stylization: one folder a checkpoint, published whole or not at all.

    step-00012000/
      model.safetensors   everything inference needs, the frozen encoder included
      model.json          what network it is: configuration, encoder fingerprint, format number, the weights' sha256
      trainer.pt          optimizer and step, loaded with weights_only
      data.json           root hashes of the datasets, identity of the run, samples seen
      meta.json           bytes and sha256 of each file above; written last

Nothing here is unpickled from a shared place. Locally a folder is written aside and renamed; on s3:// `meta.json` comes
last, and a folder without it does not exist for anybody.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaconv import storage
from adaconv.errors import CheckpointError, UsageError
from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import StyleTransferNet, build_network
from adaconv.scratch import scratch_folder

log = logging.getLogger(__name__)

FORMAT = 3
BEST_BY = "probe/loss"  # a function of the weights alone, where a batch's loss would choose by luck
MODEL_FILES = ("model.safetensors", "model.json")  # what inference needs
_PREFIX = "step-"


@dataclass(frozen=True)
class ModelInfo:
    """What a network is. `digest` is the sha256 of its weights; `settings` builds it again."""

    digest: str
    settings: Mapping[str, Any]
    encoder_fingerprint: str
    step: int


def name_of(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def save(
    folder: str,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    encoder_fingerprint: str,
    trainer: Mapping[str, Any],
    data: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> str:
    """Publish a checkpoint below a folder (local or s3://) and return its URI.

    Args:
        folder: of the run's checkpoints.
        step: updates done.
        weights: of the whole network, on the CPU.
        settings: `model` (arguments of build_network) and `encoder_widths`.
        encoder_fingerprint: of the encoder's weights.
        trainer: tensors and plain containers.
        data: kept as `data.json`.
        meta: further keys of `meta.json`, such as the tracking run and `metrics`, which `keep` compares.
    """
    with scratch_folder("checkpoint") as aside:
        try:
            save_file(dict(weights), aside / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # what it met on the disk, such as that it is full
            raise OSError(f"cannot write a checkpoint to the temporary folder {aside}: {error}") from error
        described = {"format": FORMAT, "step": step, "encoder_fingerprint": encoder_fingerprint, **settings}
        _write_json(aside / "model.json", {**described, "weights_sha256": _sha256(aside / "model.safetensors")})
        try:
            torch.save(dict(trainer), aside / "trainer.pt")
        except RuntimeError as error:  # PyTorch's for the same
            raise OSError(f"cannot write a checkpoint to the temporary folder {aside}: {error}") from error
        _write_json(aside / "data.json", data)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(aside.iterdir())}
        _write_json(aside / "meta.json", {"format": FORMAT, "step": step, "time": time.time(), **meta, "files": files})
        uri = storage.join(folder, name_of(step))
        storage.publish_directory(aside, uri, last="meta.json")
    return uri


def steps_in(folder: str) -> dict[int, str]:
    """Whole checkpoints below a folder: step to URI, in order of steps. A folder without `meta.json` is none."""
    found = {}
    for entry in storage.walk(folder, may_vanish=True):  # one listing: a request for each is too many for many ranks
        name, _, file = entry.path.partition("/")
        step = _step_of(name)
        if file == "meta.json" and step is not None:
            found[step] = storage.join(folder, name)
    return dict(sorted(found.items()))


def _step_of(name: str) -> int | None:
    digits = name.removeprefix(_PREFIX)
    return int(digits) if name.startswith(_PREFIX) and digits.isdigit() else None


def newest(folder: str) -> str | None:
    """The newest checkpoint below a folder whose files are as its `meta.json` says; damaged ones are passed over."""
    return next(filter(is_whole, reversed(steps_in(folder).values())), None)


def is_whole(uri: str) -> bool:
    """Whether a checkpoint's files are as its `meta.json` says; a damaged one is told."""
    try:
        with fetched(uri):
            return True
    except CheckpointError as error:
        log.warning("passing over a damaged checkpoint: %s", error)
        return False


def keep(folder: str, *, last: int, best: int, passed_over: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest `last` and the `best` with the lowest `BEST_BY`, of equals the older.

    Those `passed_over` when the run was resumed are damaged: they take no place, and stay for who may mend them. What
    was half published or half removed, before the newest, goes: nobody can read it, and it is as large.
    """
    whole = steps_in(folder)
    for uri in storage.list_directories(folder):
        step = _step_of(storage.name_of(uri))
        if step is not None and step not in whole and step < max(whole, default=0):
            storage.remove_directory(uri)
    steps = {step: uri for step, uri in whole.items() if step not in passed_over}
    newest_steps = list(steps)[-last:]
    best_steps = _ranked(steps)[:best] if best and len(steps) > last else []
    for step, uri in steps.items():
        if step not in newest_steps and step not in best_steps:
            storage.remove_directory(uri, first="meta.json")


def best_step(steps: Mapping[int, str]) -> int | None:
    """Which of some checkpoints, by step, has the lowest `BEST_BY`; None where none has it."""
    return next(iter(_ranked(steps)), None)


def _ranked(steps: Mapping[int, str]) -> list[int]:
    """Those that have `BEST_BY`, lowest first, of equals the older; a damaged `meta.json` has none."""

    def score_of(uri: str) -> float:
        try:
            return float(meta_of(uri).get("metrics", {}).get(BEST_BY, math.inf))
        except (CheckpointError, AttributeError, TypeError, ValueError) as error:
            log.warning("passing over a damaged checkpoint, %s: %s", uri, error)
            return math.nan

    where = next(iter(steps.values()), "")
    scores = zip(storage.few_at_once(score_of, steps.values(), where=where), steps, strict=True)
    return [step for _, step in sorted(one for one in scores if math.isfinite(one[0]))]


def meta_of(uri: str) -> dict[str, Any]:
    """`meta.json` of a checkpoint, of which nothing else is fetched or verified.

    Raises:
        CheckpointError: it is damaged, or gone.
    """
    try:
        data = storage.read_bytes(storage.join(uri, "meta.json"))
    except FileNotFoundError:  # a training that goes on keeps the newest ones
        raise CheckpointError(f"{uri}: meta.json is not there, or no longer") from None
    return _object_of(data, f"{uri}: meta.json")


def require(uri: str) -> None:
    """Nothing, if a checkpoint was published there.

    Raises:
        CheckpointError: none was.
    """
    if not storage.exists(storage.join(uri, "meta.json")):
        raise CheckpointError(
            f"expected a checkpoint at {uri}, found no meta.json there; name a folder such as "
            ".../checkpoints/step-00001000"
        )


@contextlib.contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """A local folder with the checkpoint's files, each compared with its sha256; from an object store for the block.

    Raises:
        CheckpointError: it is not there, incomplete, damaged, or of another format.
    """
    require(uri)
    with storage.local_directory(uri) as local:
        meta = _read_json(local / "meta.json")
        if meta.get("format") != FORMAT:
            raise CheckpointError(
                f"{uri}: expected format {FORMAT}, found {meta.get('format')}; use the release that wrote it"
            )
        try:
            files = {name: (expected["bytes"], expected["sha256"]) for name, expected in meta["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{uri}: meta.json does not list the checkpoint's files: {error!r}") from None
        for name, (size, sha256) in files.items():
            path = local / name
            if not path.exists():
                raise CheckpointError(f"{uri}: {name} is missing")
            if path.stat().st_size != size or _sha256(path) != sha256:
                raise CheckpointError(f"{uri}: {name} is not the file that was saved (its sha256 differs)")
        yield local


def public_name(uri: str) -> str:
    """A model's name for what travels: of a checkpoint no more than its folder's, for paths are nobody else's."""
    return uri if is_mlflow_uri(uri) else storage.name_of(uri)


def is_mlflow_uri(uri: str) -> bool:
    """Whether a model is named as MLflow names those that it keeps."""
    return uri.startswith(("models:/", "runs:/"))


def load_network(folder: Path | str) -> tuple[StyleTransferNet, ModelInfo]:
    """The network of a checkpoint or registered model: a local folder with `model.safetensors` and `model.json`.

    Returns:
        the network, in eval mode on the CPU, and what it is.

    Raises:
        CheckpointError: a file is missing, is no safetensors file, is not what was saved, or does not fit the
            configuration beside it.
    """
    folder = Path(folder)
    weights = folder / "model.safetensors"
    for path in (folder / name for name in MODEL_FILES):
        if not path.exists():
            raise CheckpointError(f"expected a model in {folder}, found no {path.name}")
    described = _read_json(folder / "model.json")
    if described.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: expected model format {FORMAT}, found {described.get('format')}")
    digest = _sha256(weights)
    if described.get("weights_sha256") != digest:
        raise CheckpointError(f"{weights} is not the file that was saved (its sha256 differs from model.json's)")
    try:
        network = build_network(encoder=VGGEncoder(widths=tuple(described["encoder_widths"])), **described["model"])
        info = ModelInfo(
            digest=digest,
            settings={"model": described["model"], "encoder_widths": described["encoder_widths"]},
            encoder_fingerprint=described["encoder_fingerprint"],
            step=described["step"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError, UsageError) as error:
        raise CheckpointError(f"{folder}: model.json does not describe a model: {error}") from error
    try:
        network.load_state_dict(load_file(weights))
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is not a safetensors file: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{weights} does not hold the network that model.json describes: {error}") from error
    return network.eval(), info


def load_trainer(folder: Path) -> dict[str, Any]:
    """`trainer.pt` of a fetched checkpoint."""
    saved: dict[str, Any] = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    return saved


def data_of(uri: str) -> dict[str, Any]:
    """`data.json` of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or gone.
    """
    try:
        return _object_of(storage.read_bytes(storage.join(uri, "data.json")), f"{uri}: data.json")
    except FileNotFoundError:
        raise CheckpointError(f"{uri}: data.json is not there, or no longer") from None


def copy_model(folder: Path, target: Path) -> None:
    """Only what inference needs of a fetched checkpoint."""
    for name in MODEL_FILES:
        shutil.copy2(folder / name, target / name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return _object_of(path.read_bytes(), str(path))


def _object_of(data: bytes, what: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{what}: expected a JSON object, found {type(values).__name__}")
    return values
