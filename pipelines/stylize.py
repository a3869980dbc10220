r"""Contents x styles through a registered model: images, style packs, an index and a gallery.

    python pipelines/stylize.py --config conf/stylize/base.yaml --model models:/adaconv@champion \
        --tracking.uri sqlite:///mlflow.db --content photos/ --style paintings/ --output stylized/

The same command again makes only what is missing. Ends with 1 if more pairs could not be made than --budget.share
allows, which is none; the others stand.

    python pipelines/stylize.py --replay stylized/images/monet/cat-0123456789abcdef.png --content photos/

makes an output again from its recipe, and ends with 1 if the bytes are others.
"""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.stylize import StylizeConfig

log = logging.getLogger(__name__)


def plan(config: StylizeConfig) -> str:
    if config.replay:
        return f"make {config.replay} again from its recipe and compare the bytes"
    from adaconv.orchestration.stylize_plan import plan_job
    from adaconv.tracking.registry import exact_model

    _check_apart(config)
    model = exact_model(config.model, tracking_uri=_tracking_uri(config))
    return f"{plan_job(config)} of {model} in {config.output}"


def execute(config: StylizeConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.orchestration.cluster import connect
    from adaconv.orchestration.stylize_plan import plan_job
    from adaconv.tracking.registry import resolved_model

    if config.tile.scratch:  # actors have other working directories
        tile = config.tile.model_copy(update={"scratch": storage.absolute(config.tile.scratch)})
        config = config.model_copy(update={"tile": tile})
    resolved = partial(resolved_model, tracking_uri=_tracking_uri(config))

    if config.replay:
        from adaconv.stylize.replay import replay

        given = config.model_dump(include={"model", "content", "style"})
        return replay(config.replay, resolved=resolved, scratch=config.tile.scratch, **given)
    _check_apart(config)
    job = plan_job(config)  # a mistake is answered before a cluster is started
    assert config.output is not None
    cli.require_writable(config.output)
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    with resolved(config.model) as (model, folder), connect():
        if model != config.model:
            log.info("%s is %s", config.model, model)
        from adaconv.orchestration.stylize_job import run_stylize_job

        return run_stylize_job(config, job, model=model, folder=folder)


def _tracking_uri(config: StylizeConfig) -> str:
    from adaconv.tracking.runs import default_uri

    return default_uri(config.tracking.uri, Path.cwd())


def _check_apart(config: StylizeConfig) -> None:
    from adaconv.stylize.inputs import check_apart

    assert config.output is not None
    for name, sources in (("content", config.content), ("style", config.style)):
        check_apart(sources, config.output, flag=f"--{name}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(StylizeConfig, argv, prog="pipelines/stylize.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
