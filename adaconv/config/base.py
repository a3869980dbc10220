"""What every configuration model shares."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Config(BaseModel):
    """A frozen set of fields; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_other_kinds(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, and true would be 1; `no` for a section would be its defaults."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            if not isinstance(value, Mapping | Config):
                raise ValueError(f"expected settings below it, found {value!r}")
            return value
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(one, bool) for one in values) and bool not in (kind, *get_args(kind)):
            raise ValueError("expected no truth value; YAML reads yes, no, on and off as such: put words in quotes")
        return value


_TOKENS = r"([a-z-]+_?)?token|jwt|(x-amz-|x-goog-)?(signature|credential)|sig|api_?key|password"  # of a query
_KEPT = "which would be printed and kept with runs"


def refuse_password(uri: str | None) -> str | None:
    """The tracking URI as it is, unless it carries a password or token.

    Raises:
        ValueError: it does; the message leaves the URI out.
    """
    where = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a database's by an MLflow server in front of it"
    _refuse(rf"[^/]+://([^/@]*:[^/@]+@|.*[?&]({_TOKENS})=)", uri, f"a password or token, {_KEPT}; give it in {where}")
    return uri


def refuse_secret(url: str) -> str:
    """The URL of a file as it is, unless it carries a user, a token or a signature.

    Raises:
        ValueError: it does; the message leaves the URL out.
    """
    why = f"a token or signature, {_KEPT}; fetch the file, and name that"
    _refuse(rf"[^/]*https?://([^/@]+@|.*[?&]({_TOKENS})=)", url, why)
    return url


def _refuse(secret: str, uri: str | None, why: str) -> None:
    if uri and re.match(secret, uri, re.IGNORECASE):
        raise ValueError(f"the URI carries {why}")


TrackingUri = Annotated[str | None, AfterValidator(refuse_password)]


class ModelTrackingConfig(Config):
    uri: TrackingUri = None
    """MLflow tracking server or database that models:/ and runs:/ are looked up in; None: that of the run whose
    checkpoint --model is, else MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""


Weights = Annotated[str, Field(min_length=1), AfterValidator(refuse_secret)]


def _without_home(path: str) -> str:
    """The path with its ~ in full, which shells leave after a = and in files: half of what takes paths knows none.

    Raises:
        ValueError: it begins with a home that is not there.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError(f"expected a path, found {path}, and no home folder for its ~; give the folder's own")
    return whole


def _require_path(path: str) -> str:
    """The path as it is, unless it is what a shell leaves of a variable that is not set.

    Raises:
        ValueError: it is empty, which would be read as the current folder.
    """
    if not path:
        raise ValueError("expected a path, found an empty one; for the current folder give .")
    return path


PathOrWord = Annotated[str, AfterValidator(_without_home)]  # a registered model, `auto`, or a path
Location = Annotated[str, AfterValidator(_require_path), AfterValidator(_without_home)]
Name = Annotated[str, Field(min_length=1)]  # an empty one would name all images that have none


def _require_folder_name(name: str | None) -> str | None:
    """The name as it is, if it is one of a folder in another.

    Raises:
        ValueError: it is empty, leads elsewhere, or would break a line of the log.
    """
    if name is not None and (name in ("", ".", "..") or "/" in name or not name.isprintable()):
        raise ValueError(f"expected a name for a folder, without / and not . or .., found {name!r}")
    return name


FolderName = Annotated[str | None, AfterValidator(_require_folder_name)]


def _require_model_name(name: str) -> str:
    """The name as it is, if MLflow takes it and models:/NAME@ALIAS can be read.

    Raises:
        ValueError: it is empty, or has a character that parts such a name.
    """
    if not name.strip() or re.search("[/:@]", name):
        raise ValueError(f"expected a name of a registered model, without /, : and @, found {name!r}")
    return name


ModelName = Annotated[str, AfterValidator(_require_model_name)]


def _require_local(path: str) -> str:
    if "://" in path:
        raise ValueError(f"expected a folder on a disk, found {path}")
    return path


LocalFolder = Annotated[Location, AfterValidator(_require_local)]


def _require_alias(alias: str | None) -> str | None:
    """The alias as it is, if MLflow takes it.

    Raises:
        ValueError: it is empty, reserved, or has other characters.
    """
    if alias is not None and (not re.fullmatch(r"[\w-]+", alias, re.ASCII) or re.fullmatch(r"latest|[vV]\d+", alias)):
        raise ValueError(f"expected letters, digits, - and _, and neither latest nor v3 and the like; found {alias!r}")
    return alias


Alias = Annotated[str | None, AfterValidator(_require_alias)]


# A path; one or a word such as `auto`; the address of MLflow, which may be a path too.
PathKind = Literal["path", "word", "server"]
_KINDS: tuple[tuple[Callable[..., Any], PathKind], ...] = (
    (_require_path, "path"),
    (_without_home, "word"),
    (refuse_secret, "word"),
    (refuse_password, "server"),
)


def paths_of(config: Config, section: str = "") -> Iterator[tuple[str, PathKind, Any]]:
    """The fields that take paths and were not left as they are: name with its sections' before, kind, value."""
    hints = get_type_hints(type(config), include_extras=True)
    for name, field in type(config).model_fields.items():
        value, functions = getattr(config, name), _validators_of(hints[name])
        if isinstance(value, Config):
            yield from paths_of(value, f"{section}{name}.")
            continue
        kind = next((kind for function, kind in _KINDS if function in functions), None)
        if kind == "server" or (kind and value != field.get_default()):
            yield section + name, kind, value


def _validators_of(hint: Any) -> set[Any]:
    own = {getattr(one, "func", None) for one in getattr(hint, "__metadata__", ())}
    return own.union(*map(_validators_of, get_args(hint)))
