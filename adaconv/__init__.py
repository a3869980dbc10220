"""AdaConv style transfer: from raw images to finished jobs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaconv.stylize.stylizer import Stylizer

__version__ = "0.1.0"
__all__ = ["Stylizer", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Stylizer":  # when it is asked for: command lines answer before torch is imported
        from adaconv.stylize.stylizer import Stylizer

        return Stylizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
