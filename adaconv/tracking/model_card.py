"""What is to be known of a model, as a page of Markdown that travels with it."""

import re
from collections.abc import Mapping

from mlflow.entities import Run

from adaconv.checkpoint import ModelInfo

_SHOWN_PARAMS = ("model.", "loss.", "encoder.", "data.resize", "data.crop", "train.")

_INITIAL = "Began with the weights of `{uri}` (step {step}, `{digest}`)."

_LIMITS = """\
- Made for photographs as contents and paintings as styles; what else it is given is beyond what it saw.
- It sees pictures at the size of its crops ({crop} px) in training; much larger ones show finer, weaker strokes.
- Output sizes equal content sizes; sides that are no multiple of 8 are padded inside.
- Nothing here says whose style may be imitated, or what may be done with a stylized photograph of a person.
- Encoder weights `{weights}`.{seeded}
"""

_LICENCES = """\
- Code: Apache-2.0.
- Method: AdaConv is covered by patents of its authors (US 12,340,440 B2 and its family), whatever the licence of the
  code says; check your use.
- Encoder: torchvision's VGG-19, trained on ImageNet, whose images are for research; seeded weights are free of it.
- Training images: the licences of the two datasets above apply to what is made of them. Many paintings of WikiArt are
  under copyright; COCO's photographs have licences of their own, each.
"""


def render(
    *, title: str, info: ModelInfo, run: Run, checkpoint_uri: str, metrics: Mapping[str, float], grid: str | None
) -> str:
    """The card.

    Args:
        title: heading.
        info: the network.
        run: that made it.
        checkpoint_uri: where its training state lies.
        metrics: of the run at the model's step.
        grid: name of the sample grid's file beside the card, if there is one.
    """
    params, tags = run.data.params, run.data.tags
    datasets = [one.dataset for one in (run.inputs.dataset_inputs if run.inputs else [])]
    data = [
        f"| {one.name} | `{one.source}` | `{tags.get(f'adaconv.{one.name}_hash', one.digest)}` |" for one in datasets
    ]
    settings = {name: params[name] for name in sorted(params) if name.startswith(_SHOWN_PARAMS)}
    weights = params.get("encoder.weights", "of an unknown source")
    seeded = " Random features: for tests and offline runs, not for quality." if weights.startswith("seeded:") else ""
    prefix = "adaconv.init_from."
    initial = {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}
    sections = {
        "": f"Step {info.step} of run `{run.info.run_name}` ({run.info.run_id}).\n"
        f"Weights `{info.digest}`.\nCheckpoint `{checkpoint_uri}`.\n"
        f"Code `{tags.get('git.commit', 'of an unknown commit')}`"
        + (" with changes.\n" if tags.get("git.dirty") == "True" else ".\n")
        + (f"{_INITIAL.format_map(initial)}\n" if initial else ""),
        "Samples": f"Styles in the top row, contents on the left.\n\n![sample grid]({grid})\n" if grid else "",
        "Data": _table(("dataset", "version", "root hash"), data),
        "Metrics": _table(("metric", "value"), [f"| {k} | {v:.6g} |" for k, v in sorted(metrics.items())]),
        "Use": "Give `content` and `style`: bytes of image files (base64 in JSON) or pixels (n, H, W, 3) uint8; the "
        "answer, `stylized`, is a PNG or pixels. `style_side` (256): shorter side that a style is scaled to; `alpha` "
        "(1), down to 0, the content in its own style; `color`: `style`, or `luminance` or `coral`, the content's.\n",
        "Limits": _LIMITS.format(crop=params.get("data.crop", "?"), weights=weights, seeded=seeded),
        "Licences": _LICENCES,
        "Configuration": _table(("field", "value"), [f"| {k} | {v} |" for k, v in settings.items()]),
    }
    parts = [f"# {title}\n"]
    for heading, text in sections.items():
        if text:
            parts.append(f"## {heading}\n\n{text}" if heading else text)
    return "\n".join(parts)


def as_description(card: str, most: int) -> str:
    """A card for a field of limited length, where pictures cannot be shown: without the end, which is the long table of
    the configuration.
    """
    card = re.sub(r"!\[.*?\]\((.*?)\)", r"See `\1` of the model's files.", card)
    if len(card) <= most:
        return card
    rest = "\n\n…the whole card is MODEL_CARD.md of the model's files."
    return card[: most - len(rest)].rpartition("\n")[0] + rest


def _table(header: tuple[str, ...], rows: list[str]) -> str:
    if not rows:
        return ""
    return "\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *rows]) + "\n"
