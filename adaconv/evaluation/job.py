"""An evaluation from its configuration to its files: judge, pictures, scores of each model, verdict, page."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch

from adaconv import storage
from adaconv.errors import UsageError, WeightsError
from adaconv.evaluation import gate
from adaconv.evaluation.metrics import METRICS, Judge
from adaconv.evaluation.protocol import read_protocol
from adaconv.evaluation.report import render
from adaconv.evaluation.scores import Evaluation, Scores, table_of
from adaconv.model.encoder_weights import fingerprint, load_encoder
from adaconv.progress import Progress
from adaconv.stylize.stylizer import Stylizer

if TYPE_CHECKING:
    from adaconv.config.evaluate import EvaluateConfig, GateConfig

log = logging.getLogger(__name__)


def run_evaluation(
    config: EvaluateConfig, models: Mapping[str, Path], *, output: str, scratch: Path, holder: str | None
) -> dict[str, Any]:
    """Score every model and judge the first.

    Args:
        config: of the job.
        models: their exact names and local folders; the one that is judged first.
        output: folder or s3://bucket/prefix for `report.html`, `scores.parquet` and what a later start goes on from.
        scratch: local folder, for the files before they are published.
        holder: name of the model that has the alias; None where nobody has it.

    Returns:
        paths and numbers; `status` is `failed`, with `error`, where --promote asked and the model may not; `holder`
        where it has the alias already.

    Raises:
        UsageError: pictures that cannot be read, or a GPU that is not there.
        WeightsError: the judge's weights cannot be had.
    """
    device = _device(config.device)
    try:
        encoder = load_encoder(config.judge.weights, widths=config.judge.widths)
    except WeightsError as error:
        raise WeightsError(f"--judge.weights: {error}") from error
    protocol = read_protocol(
        config.content, config.style, judge=fingerprint(encoder), **config.protocol.model_dump(mode="python")
    )
    log.info(
        "protocol %s: %d contents x %d styles at %d pixels on %s",
        protocol.id,
        len(protocol.contents),
        len(protocol.styles),
        protocol.side,
        device,
    )
    evaluation = Evaluation(protocol, Judge(encoder.to(device)), device=device, output=output)
    pairs = len(protocol.contents) * len(protocol.styles)
    progress = Progress("evaluate", total=pairs * (len(models) + 1), unit="pairs")
    scores: list[Scores] = []
    for name, folder in models.items():
        stylizer = Stylizer.from_folder(folder, device=device, max_memory_gb=config.max_memory_gb)
        scores.append(evaluation.scores(name, stylizer, progress.advance))
    scores.append(evaluation.unchanged(progress.advance))
    progress.close()
    held = next((one for one in scores if one.model == holder), None)
    has_it = held is not None and held.digest == scores[0].digest  # maybe under another name
    verdict = _verdict(config.gate, scores, held) if config.promote and not has_it else None
    page = scratch / "report.html"
    page.write_text(
        render(scores, protocol, verdict, judge=config.judge.weights, alias=config.promote or ""), encoding="utf-8"
    )
    table = scratch / "scores.parquet"
    pq.write_table(table_of(scores, protocol), table)
    for file in (page, table):
        storage.publish_file(file, storage.join(output, file.name))
    result: dict[str, Any] = {
        "status": "done",
        "model": scores[0].model,
        "protocol": protocol.id,
        "pairs": pairs,
        "scores": {one.model: _told(one) for one in scores},
        "changes": {one.model: _changes(scores[0], one) for one in scores[1:-1]},
        "defects": {one.model: list(one.defects) for one in scores if one.defects},
        "report": storage.join(output, page.name),
        "table": storage.join(output, table.name),
    }
    if config.promote and has_it:
        result["holder"] = holder
    if verdict:
        result["gate"] = [str(one) for one in verdict.comparisons]
        if not verdict.promoted:
            result |= {
                "status": "failed",
                "error": f"{scores[0].model} may not become {config.promote}: {'; '.join(verdict.reasons)}",
            }
    return result


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: expected a GPU that PyTorch can use, found none; leave it out, or give cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _verdict(config: GateConfig, scores: list[Scores], held: Scores | None) -> gate.Verdict:
    """On the first, beside the unchanged contents, the last, and whoever has the alias."""
    judged, defects = scores[0], list(scores[0].defects)
    if not any(judged.of[name].mean() < scores[-1].of[name].mean() for name in ("style", "gram")):
        defects.append("no stylization: neither style nor gram is lower than that of the contents as they are")
    comparisons = []
    if held:
        margins = {name: getattr(config, name) for name in METRICS}
        comparisons = gate.compare(judged.of, held.of, margins=margins)
    return gate.judge(comparisons, require=config.require, defects=defects, first=held is None)


def _told(scores: Scores) -> dict[str, list[float | None]]:
    """Each metric's mean and 95 % interval."""
    return {name: _numbers(gate.interval(scores.of[name])) for name in METRICS}


def _changes(new: Scores, old: Scores) -> dict[str, list[float | None]]:
    """Each metric's change as a share of what it is by the other, and its 95 % interval."""
    return {name: _numbers(gate.change(new.of[name], old.of[name])) for name in METRICS}


def _numbers(told: gate.Interval) -> list[float | None]:
    """JSON has no word for what is no number."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in (told.mean, told.low, told.high)]
