"""What a stylization job will make. It needs no cluster: mistakes are told before one is started."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from adaconv.config.stylize import OptionsConfig, StylizeConfig
from adaconv.errors import UsageError
from adaconv.stylize.inputs import Item, list_items, spread
from adaconv.stylize.pairing import Pair, pair_up

# Of a file of pairs; the precision is a job's.
_COLUMNS = tuple(name for name in OptionsConfig.model_fields if name != "precision")


@dataclass(frozen=True)
class Plan:
    """What a job makes. `styles` are by index; a pack is made for each style and side at which it is read."""

    contents: list[Item]
    styles: list[Item]
    pairs: list[Pair]

    def __str__(self) -> str:
        contents, styles = ({getattr(pair, name) for pair in self.pairs} for name in ("content", "style"))
        return f"{len(contents)} contents, {len(styles)} styles, {len(self.pairs)} outputs"


def plan_job(config: StylizeConfig) -> Plan:
    """List contents and styles and pair them up.

    Raises:
        UsageError: a source is not there or holds nothing; pairs that do not fit.
    """
    contents = spread(list_items(config.content, flag="--content"), config.limit_contents)
    styles = spread(list_items(config.style, flag="--style", packs=True), config.limit_styles)
    names = [[item.source for item in items] for items in (contents, styles)]
    check = partial(_check, config.options)
    return Plan(contents, styles, pair_up(config.pairs, *names, seed=config.seed, check=check))


def _check(base: OptionsConfig, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """One pair's options as values: as they would be on the command line, without those that all pairs have."""
    unknown = sorted(set(options) - set(_COLUMNS))
    if unknown:
        raise UsageError(f"unknown columns {', '.join(unknown)}; expected content, style, {', '.join(_COLUMNS)}")
    try:
        merged = OptionsConfig.model_validate({**base.model_dump(mode="json"), **options})
    except ValidationError as error:
        told = "; ".join(f"{e['loc'][0]}: {e['msg']}, found {e['input']!r}" for e in error.errors())
        raise UsageError(told) from None
    return {name: value for name in options if (value := getattr(merged, name)) != getattr(base, name)}
