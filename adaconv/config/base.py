"""What every configuration model shares."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen set of fields; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
