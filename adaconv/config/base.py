"""What every configuration model shares."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A frozen set of fields; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def refuse_password(uri: str | None) -> str | None:
    """The tracking URI as it is, unless it carries a password.

    Raises:
        ValueError: it does; the message leaves the URI out.
    """
    if uri and re.match(r"[^/]+://([^/@]*:[^/@]+@|.*[?&]password=)", uri):
        raise ValueError(
            "the URI carries a password, which would be printed and kept with runs; give it in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a database's by an MLflow server in front of it"
        )
    return uri


TrackingUri = Annotated[str | None, AfterValidator(refuse_password)]


def _refuse_no_path(path: str) -> str:
    """The path as it is, unless it is what a shell leaves of a variable that is not set, or of an unknown user's ~.

    Raises:
        ValueError: it is empty, which would be read as the current folder, or begins with a home that is not there.
    """
    if not path:
        raise ValueError("expected a path, found an empty one; for the current folder give .")
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"expected a path, found {path}, and no home folder for its ~; give the folder's own"
        ) from None
    return path


Location = Annotated[str, AfterValidator(_refuse_no_path)]
Name = Annotated[str, Field(min_length=1)]  # an empty one would name all images that have none


def _refuse_no_disk(path: str) -> str:
    if "://" in path:
        raise ValueError(f"expected a folder on a disk, found {path}")
    return path


LocalFolder = Annotated[Location, AfterValidator(_refuse_no_disk)]


def _refuse_no_alias(alias: str | None) -> str | None:
    """The alias as it is, if MLflow takes it.

    Raises:
        ValueError: it is empty, reserved, or has other characters.
    """
    if alias is not None and (not re.fullmatch(r"[\w-]+", alias, re.ASCII) or re.fullmatch(r"latest|[vV]\d+", alias)):
        raise ValueError(f"expected letters, digits, - and _, and neither latest nor v3 and the like; found {alias!r}")
    return alias


Alias = Annotated[str | None, AfterValidator(_refuse_no_alias)]
