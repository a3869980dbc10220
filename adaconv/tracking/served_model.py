"""The registered model as MLflow loads it: from this code and safetensors, with nothing unpickled.

A row has a `content` and a `style`. Each is the bytes of an image file (in JSON: in base64), or pixels (H, W, 3) uint8;
a whole column may be an array (n, H, W, 3). The answer is of the kind that the content was: `stylized`, the bytes of a
PNG, or pixels of the content's size. Parameters are those of `Stylizer.stylize`. The styles that were read last are at
hand: a service draws many contents in few styles.
"""

import base64
import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from adaconv.errors import UsageError
from adaconv.images import ImageError, decode
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Stylizer

_PACKS_AT_HAND = 64  # 100 kB each for the paper's network


class ServedStylizer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    _skip_type_hint_validation = True  # or MLflow asks for hints, at the end of every training; see `predict`

    def load_context(self, context: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.stylizer = Stylizer.from_folder(Path(context.artifacts["model"]), device=device)
        self.packs: dict[tuple[Any, ...], StylePack] = {}
        self._lock = threading.Lock()

    # Hints would make MLflow check inputs by them instead of by the signature, and it knows none for pictures.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        given = dict(params or {})
        side = given.pop("style_side", 256)
        contents, styles = (_rows(model_input[name]) for name in ("content", "style"))
        if len(contents) != len(styles):
            raise UsageError(f"expected as many styles as contents, found {len(styles)} and {len(contents)}")
        stylized = [
            self.stylizer.stylize(picture(content, "content"), self._pack(picture(style, "style"), side), **given)
            for content, style in zip(contents, styles, strict=True)
        ]
        if contents and isinstance(contents[0], (bytes, bytearray, str)):
            return pd.DataFrame({"stylized": [_png(image) for image in stylized]})
        pixels: list[NDArray[np.uint8]] = [np.asarray(image) for image in stylized]
        return np.stack(pixels) if len({one.shape for one in pixels}) == 1 else pixels

    def _pack(self, style: Image.Image, side: int) -> StylePack:
        key = (hashlib.sha256(style.tobytes()).digest(), style.size, side)
        with self._lock:  # MLflow's server answers in threads
            pack = self.packs.pop(key, None)
        pack = pack or self.stylizer.style_pack(style, side=side)
        with self._lock:
            self.packs[key] = pack  # the last
            if len(self.packs) > _PACKS_AT_HAND:
                del self.packs[next(iter(self.packs))]
        return pack


def _rows(column: Any) -> list[Any]:
    """MLflow puts a list of texts, as JSON has it, into one row."""
    rows: list[Any] = []
    for value in column:
        rows += value if isinstance(value, list) and value and isinstance(value[0], (str, bytes)) else [value]
    return rows


def picture(value: Any, name: str) -> Image.Image:
    """An RGB picture of what a caller gave.

    Raises:
        UsageError: it is neither an image file nor pixels.
    """
    if isinstance(value, str):
        try:
            value = base64.b64decode(value)
        except ValueError as error:  # also of text that is no ASCII
            raise UsageError(f"{name}: expected an image file in base64, found other text: {error}") from None
    if isinstance(value, (bytes, bytearray)):
        try:
            return decode(bytes(value))
        except ImageError as error:
            raise UsageError(f"{name}: {error}") from None
    pixels = np.asarray(value)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.kind not in "ui":
        raise UsageError(
            f"{name}: expected the bytes of an image file, or pixels (H, W, 3) uint8, found {pixels.dtype} of shape "
            f"{pixels.shape}; a column of pixels is (n, H, W, 3)"
        )
    if pixels.size and (pixels.min() < 0 or pixels.max() > 255):
        raise UsageError(f"{name}: expected pixels from 0 to 255, found {pixels.min()} to {pixels.max()}")
    return Image.fromarray(pixels.astype(np.uint8))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


mlflow.models.set_model(ServedStylizer())
