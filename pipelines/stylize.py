"""Contents x styles through a registered model: images, style packs, an index and a gallery.

    python pipelines/stylize.py --config conf/stylize/base.yaml --model models:/adaconv@champion \
        --tracking.uri sqlite:///mlflow.db --content photos/ --style paintings/ --output stylized/

The same command again makes only what is missing. Ends with 1 if a pair could not be made; the others stand.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.stylize import StylizeConfig


def plan(config: StylizeConfig) -> str:
    from adaconv.data.sources import list_images

    contents = len(list_images(config.content, flag="--content"))
    styles = len(list_images(config.style, flag="--style"))
    contents, styles = min(contents, config.limit_contents or contents), min(styles, config.limit_styles or styles)
    return (
        f"{contents} contents x {styles} styles = {contents * styles} outputs of {config.model} in {config.output}, "
        f"by {config.scaling.num_actors} actors"
    )


def execute(config: StylizeConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.sources import list_images
    from adaconv.orchestration.cluster import connect
    from adaconv.tracking.registry import resolve_model
    from adaconv.tracking.runs import default_uri

    list_images(config.content, flag="--content")  # a typo is answered before a cluster is started
    list_images(config.style, flag="--style")
    if storage.is_local(config.output):
        cli.require_writable(config.output, "--output")
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    model, folder = resolve_model(config.model, tracking_uri=default_uri(config.tracking.uri, Path.cwd()))
    with connect():
        from adaconv.orchestration.stylize_job import run_stylize_job

        return run_stylize_job(config, model=model, folder=folder)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(StylizeConfig, argv, prog="pipelines/stylize.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
