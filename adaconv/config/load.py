"""Files and flags to one validated configuration: defaults in code < files in the order given < flags.

The pydantic model is the only place that judges values. tyro reads the flags and writes `--help` through a dataclass of
the same shape, made here, so that every problem of files and flags is reported by the model, at once.
"""

import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from adaconv.config.base import Config
from adaconv.errors import ConfigError

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Loaded(Generic[C]):
    config: C
    dry_run: bool


def load_config(model: type[C], argv: Sequence[str], *, prog: str, description: str) -> Loaded[C]:
    """Read `--config FILE` (repeatable, later files win) and the flags of every field into one `model`.

    Raises:
        ConfigError: unknown flags or keys with the nearest known one, values that do not fit, missing fields:
            all of them in one message, each with its path and the value that was found. Or bytes that are no text.
        SystemExit: `--help` (0), or a flag whose value cannot be read at all (2), as argparse does.
    """
    _require_text(argv)
    argv = _with_values(model, argv)
    asks_for_help = "-h" in argv or "--help" in argv
    if not asks_for_help:
        _refuse_unknown_flags(model, argv)
    values = _read_files(model, _files_named(argv))
    if not asks_for_help:
        _refuse_missing(model, argv, values)
    twin = _twin(model, top=True)
    flags = tyro.cli(
        twin,
        prog=prog,
        description=description,
        default=_twin_of_values(model, twin, values),
        args=argv,
    )
    given = dataclasses.asdict(flags)
    dry_run = given.pop("dry_run")
    given.pop("config")
    return Loaded(validate(model, given, where=" and ".join([*_files_named(argv), "command line"])), dry_run)


def validate(model: type[C], values: Mapping[str, Any], *, where: str) -> C:
    """Build `model` from nested values, or raise one ConfigError that names every problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(model, error.errors(include_url=False), where)) from None


def to_yaml(config: Config) -> str:
    """The resolved configuration, accepted again as a `--config` file."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _OnceEach(yaml.SafeLoader):
    """YAML forbids a key that is there twice; PyYAML takes the last one and loses the others without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key '{key.value}' a second time", key.start_mark)
            seen.add(key.value)
        return node


def _as_written(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """YAML 1.1 reads 10:20, a range of batches, as 620, and 010 as 8: the field makes of them what it means by them."""
    if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
        return node.value
    return loader.construct_yaml_int(node) if node.tag.endswith(":int") else loader.construct_yaml_float(node)


for _number in ("int", "float"):
    _OnceEach.add_constructor(f"tag:yaml.org,2002:{_number}", _as_written)


def _read_files(model: type[Config], files: Sequence[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in files:
        try:
            values = yaml.load(Path(name).read_text(encoding="utf-8"), _OnceEach) or {}
        except FileNotFoundError:
            raise ConfigError(f"--config {name}: no such file") from None
        except IsADirectoryError:
            raise ConfigError(f"--config {name}: expected a YAML file, found a folder") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"--config {name}: expected YAML, found: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"--config {name}: expected keys and values, found {type(values).__name__}")
        # What is missing here may come from another file or a flag; what two fields must agree on is judged at the end.
        try:
            model.model_validate(values)
        except ValidationError as error:
            mine = [one for one in error.errors(include_url=False) if _is_settled(model, one)]
            if mine:
                raise ConfigError(_explain(model, mine, name)) from None
        _merge(merged, values)
    return merged


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _files_named(argv: Sequence[str]) -> list[str]:
    files = []
    for position, argument in enumerate(argv):
        if argument == "--config":
            if position + 1 == len(argv):
                raise ConfigError("--config: expected a file after it")
            files.append(argv[position + 1])
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
    return files


def _sections(model: type[Config]) -> Iterator[tuple[str, type[Config]]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Config):
            yield name, info.annotation


def flag_names(model: type[Config]) -> list[str]:
    """Every flag of a configuration as it is typed, without the dashes: `train.global-batch-size`."""
    return [name for name, _ in _flags(model)]


def _flags(model: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    sections = dict(_sections(model))
    for name, info in model.model_fields.items():
        dashed = prefix + name.replace("_", "-")
        if name in sections:
            yield from _flags(sections[name], dashed + ".")
        else:
            yield dashed, info


def _with_values(model: type[Config], argv: Sequence[str]) -> list[str]:
    """A flag of yes or no that stands alone means yes: `--train.compile` is `--train.compile true`."""
    switches = {f"--{name}" for name, info in _flags(model) if info.annotation is bool}
    given: list[str] = []
    for argument, after in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        given.append(argument)
        if argument.replace("_", "-") in switches and after.startswith("-"):
            given.append("true")
    return given


def _require_text(argv: Sequence[str]) -> None:
    """A path may be any bytes, but what it is written to, JSON and messages between processes, takes UTF-8."""
    flag = ""
    for argument in argv:
        value = argument
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
        if value != value.encode(errors="ignore").decode():
            raise ConfigError(
                f"{flag}: expected a name in UTF-8, found the bytes {os.fsencode(value)!r}; rename it, or give a link "
                "to it that has such a name"
            )


def _refuse_unknown_flags(model: type[Config], argv: Sequence[str]) -> None:
    known = [*flag_names(model), "config", "dry-run", "help"]
    given = [a[2:].partition("=")[0].replace("_", "-") for a in argv if a.startswith("--") and len(a) > 2]
    unknown = [f"unknown flag --{name}{_nearest(name, known, '--')}" for name in given if name not in known]
    if unknown:
        raise ConfigError("\n".join([*unknown[:-1], f"{unknown[-1]}; --help lists every flag"]))


def _refuse_missing(model: type[Config], argv: Sequence[str], values: Mapping[str, Any]) -> None:
    """Here rather than by tyro, which would print a page. Sections have defaults, so only top fields are required."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in argv}
    required = [name for name, info in model.model_fields.items() if info.is_required() and name not in values]
    missing = [flag for name in required if (flag := f"--{name.replace('_', '-')}") not in given]
    if missing:
        raise ConfigError(f"required: {', '.join(missing)}; give them as flags or in a --config file")


def _nearest(name: str, known: Sequence[str], dashes: str = "") -> str:
    """The known name that was probably meant, also where only the section was left out."""
    ends = {k: k.rpartition(".")[2] for k in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = close or [k for k in known if ends[k] == name.rpartition(".")[2]][:1]
    close = close or difflib.get_close_matches(name, ends.values(), n=1, cutoff=0.7)
    close = [next(k for k in known if k == c or ends[k] == c) for c in close]
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _twin(model: type[Config], *, top: bool = False) -> Any:
    """A dataclass of the same fields, for tyro: its types and help texts, none of the checks."""
    sections = dict(_sections(model))
    fields: list[Any] = []
    for name, info in model.model_fields.items():
        kind = _twin(sections[name]) if name in sections else info.annotation
        if kind is bool:
            kind = Literal["true", "false"]  # `--train.compile true`, as in a file; the model makes it a bool
        fields.append((name, Annotated[kind, tyro.conf.arg(help=info.description or "")]))
    if top:
        files = tyro.conf.arg(metavar="FILE", help="YAML file of these fields; repeatable, later files win.")
        plan = tyro.conf.arg(help="Print the resolved configuration and the plan; write nothing.")
        fields += [
            ("config", Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], files], dataclasses.field(default=())),
            ("dry_run", Annotated[tyro.conf.FlagCreatePairsOff[bool], plan], dataclasses.field(default=False)),
        ]
    return dataclasses.make_dataclass(model.__name__, fields, kw_only=True)


def _twin_of_values(model: type[Config], twin: Any, values: Mapping[str, Any]) -> Any:
    """An instance of the twin with the files' values over the defaults; what neither has is left for the flags."""
    sections = dict(_sections(model))
    twins = {field.name: get_args(field.type)[0] for field in dataclasses.fields(twin) if field.name in sections}
    filled: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if name in sections:
            filled[name] = _twin_of_values(sections[name], twins[name], values.get(name, {}))
        elif name in values:
            filled[name] = TypeAdapter[Any](info.annotation or Any).validate_python(values[name])
        else:
            default = info.get_default(call_default_factory=True)
            filled[name] = tyro.MISSING if default is PydanticUndefined else default
        if isinstance(filled[name], bool):
            filled[name] = str(filled[name]).lower()
    return twin(**filled)


def _is_settled(model: type[Config], error: ErrorDetails) -> bool:
    """Whether neither another file nor a flag can mend an error of a file."""
    if error["type"] == "missing":
        return isinstance(error["loc"][-1], int)  # of a list, that is too short
    return error["type"] != "value_error" or _is_leaf(model, error) or not isinstance(error["input"], Mapping)


def _is_leaf(model: type[Config], error: ErrorDetails) -> bool:
    """Whether an error is one field's own, not one that several fields of a section must settle together."""
    section: type[Config] | None = model
    for part in error["loc"]:
        section = dict(_sections(section)).get(str(part)) if section else None
    return section is None


def _explain(model: type[Config], errors: Sequence[ErrorDetails], where: str) -> str:
    lines = []
    for error in errors:
        path = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            known = [*dict(_sections(model)), *(name.replace("-", "_") for name in flag_names(model))]
            *sections, key = path.split(".")
            nested = "".join(f"{section}: {{" for section in sections) + f"{key}: …" + "}" * len(sections)
            hint = f"; write {nested}, or a line of its own for each" if path in known else _nearest(path, known)
            lines.append(f"{where}: unknown key '{path}'{hint}")
        elif not path or error["type"] == "value_error":
            message = error["msg"].removeprefix("Value error, ")
            of_it = path and (_is_leaf(model, error) or not isinstance(error["input"], Mapping))
            lines.append(f"{where}: {path + ': ' if of_it else ''}{message}")
        else:
            lines.append(f"{where}: {path}: {error['msg'][:1].lower() + error['msg'][1:]}, found {error['input']!r}")
    return "\n".join(lines)
