"""What every configuration model shares."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


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


def _refuse_empty(path: str) -> str:
    """The path as it is, unless a variable of the shell that is not set has left nothing of it.

    Raises:
        ValueError: it is empty, which would be read as the current folder.
    """
    if not path:
        raise ValueError("expected a path, found an empty one; for the current folder give .")
    return path


Location = Annotated[str, AfterValidator(_refuse_empty)]
