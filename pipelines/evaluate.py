r"""A model on pictures that are fixed once: scores with intervals, a page, and an alias if it earns it.

    python pipelines/evaluate.py --config conf/evaluate/base.yaml --model models:/adaconv@candidate \
        --tracking.uri sqlite:///mlflow.db --content held-out/photos --style held-out/paintings \
        --output evaluated --promote champion

The same command again measures only what is missing. With --promote it ends with 1 where the model may not have the
alias; report.html says why.
"""

import logging
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.evaluate import EvaluateConfig

log = logging.getLogger(__name__)


def plan(config: EvaluateConfig) -> str:
    from adaconv.evaluation.protocol import choose

    wanted = config.protocol.model_dump(include={"contents", "styles"})
    contents, styles = (len(items) for items in choose(config.content, config.style, **wanted))
    gate = f", then the gate of {config.promote}" if config.promote else ""
    return f"{contents} contents x {styles} styles: {contents * styles} pairs by each model{gate}"


def execute(config: EvaluateConfig) -> dict[str, Any]:
    from adaconv import checkpoint, storage
    from adaconv.errors import TrackingError, UsageError
    from adaconv.scratch import scratch_folder
    from adaconv.tracking.registry import named_by, note_evaluation, promote, resolved_model, source_of, trained_on
    from adaconv.tracking.runs import default_uri

    log.info("%s", plan(config))  # a mistake is answered before a model is fetched
    cli.require_writable(config.output)
    model, tracked_at = source_of(config.model)
    others = [source_of(name)[0] for name in config.against]
    tracking_uri = default_uri(config.tracking.uri, Path.cwd(), found=tracked_at)
    registered = re.fullmatch(r"models:/([^/@]+)(?:@[^/]+|/\d+)", model)
    if config.promote and checkpoint.is_mlflow_uri(model) and not registered:
        raise UsageError(
            f"--promote: expected models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint, found --model {model}"
        )
    name = registered[1] if registered else config.name
    holder = named_by(name, config.promote, tracking_uri=tracking_uri) if config.promote else None
    with ExitStack() as held:
        uris = [model, *([holder] if holder else []), *others]
        models = dict(held.enter_context(resolved_model(uri, tracking_uri=tracking_uri)) for uri in uris)
        model = next(iter(models))
        seen = _seen_in_training(config, trained_on(model, tracking_uri=tracking_uri))
        from adaconv.evaluation.job import run_evaluation

        scratch = held.enter_context(scratch_folder("evaluation"))
        result = run_evaluation(config, models, output=storage.absolute(config.output), scratch=scratch, holder=holder)
        result |= {"seen_in_training": seen} if seen else {}
        if "holder" in result:
            model = result["holder"]
        elif config.promote and result["status"] == "done":
            reason = f"gate, protocol {result['protocol']}: {'; '.join(result['gate']) or 'the first'}"
            version = promote(
                model, name=name, alias=config.promote, held_by=holder, reason=reason, tracking_uri=tracking_uri
            )
            model = f"models:/{version.name}/{version.version}"
            result |= {"promoted": version.uri, "version": version.version}
        noted = ("protocol", "pairs", "scores", "gate", "error", "seen_in_training")
        evaluation: dict[str, Any] = {key: result[key] for key in noted if key in result}
        try:
            note_evaluation(model, evaluation, scratch / "report.html", tracking_uri=tracking_uri)
        except TrackingError as error:  # all else stands
            result |= {"status": "failed", "error": "; ".join(filter(None, (result.get("error"), str(error))))}
    return result


def _seen_in_training(config: EvaluateConfig, datasets: dict[str, list[str]]) -> dict[str, list[str]]:
    """Pictures of the protocol, or near copies, that a model was trained on: its scores flatter."""
    import numpy as np

    from adaconv.data.ingest import perceptual_hash
    from adaconv.data.manifest import open_version
    from adaconv.data.similar import seen_in
    from adaconv.errors import AdaConvError
    from adaconv.evaluation.protocol import choose, open_exhibit
    from adaconv.images import ImageError

    wanted = config.protocol.model_dump(include={"contents", "styles"})
    seen = {}
    for name, items in zip(("content", "style"), choose(config.content, config.style, **wanted), strict=True):
        if name not in datasets:
            log.info("whether the model was trained on the %s pictures is not known", name)
            continue
        pictures = []
        for item in items:
            with suppress(ImageError):  # who reads the protocol names them all
                pictures.append((item, perceptual_hash(open_exhibit(item)[0])))
        hashes = np.array([value for _, value in pictures], np.uint64)
        found: dict[int, str] = {}
        for spec in datasets[name]:
            try:
                found |= seen_in(open_version(spec), hashes)
            except (AdaConvError, OSError) as error:
                log.warning("whether the %s pictures are among those of %s is not known: %s", name, spec, error)
        if found:
            told = [f"{pictures[place][0].source} (as {source})" for place, source in sorted(found.items())]
            log.warning(
                "%d of %d pictures of --%s, or near copies, are among those that the model was trained on: %s; its "
                "scores flatter",
                *(len(found), len(items), name, ", ".join(told[:5])),
            )
            seen[name] = told
    return seen


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(EvaluateConfig, argv, prog="pipelines/evaluate.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
