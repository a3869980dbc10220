"""One model, ready to stylize: pictures in, pictures out.

stylizer = Stylizer.from_folder("runs/demo/checkpoints/step-00000300")
pack = stylizer.style_pack(Image.open("style.jpg"))
stylizer.stylize(Image.open("content.jpg"), pack).save("stylized.png")
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from adaconv.checkpoint import ModelInfo, load_network
from adaconv.errors import UsageError
from adaconv.images import to_tensor, to_uint8
from adaconv.model.network import StyleTransferNet
from adaconv.stylize.style_pack import StylePack

Precision = Literal["float32", "bfloat16"]


class Stylizer:
    """Deterministic for a kind of device: every picture goes through the network by itself, whatever runs beside it."""

    def __init__(
        self, network: StyleTransferNet, info: ModelInfo, *, device: str = "cpu", precision: Precision = "float32"
    ) -> None:
        self.info, self._precision = info, precision
        self._device = torch.device(device)
        # Channels innermost: on a CPU a picture of 256 px takes 0.94 of the time.
        self._network = network.to(self._device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    @classmethod
    def from_folder(cls, folder: Path | str, *, device: str = "cpu", precision: Precision = "float32") -> "Stylizer":
        """From a checkpoint's or registered model's local folder.

        Args:
            folder: with `model.safetensors` and `model.json`.
            device: `cpu` or `cuda`.
            precision: of convolutions when stylizing; `bfloat16` runs them under autocast. Style packs are float32.

        Raises:
            CheckpointError: it holds no whole model.
        """
        return cls(*load_network(folder), device=device, precision=precision)

    @torch.inference_mode()
    def style_pack(
        self, style: Image.Image, *, side: int = 256, source: str = "", source_sha256: str | None = None
    ) -> StylePack:
        """Predict what the decoder needs of a style.

        Args:
            style: RGB picture of any size.
            side: its shorter side is scaled to this many pixels first.
            source: kept as the pack's name.
            source_sha256: of the style's file; None takes it of the pixels.
        """
        digest = source_sha256 or hashlib.sha256(repr(style.size).encode() + style.tobytes()).hexdigest()
        scaled = style.resize(_scaled(style.size, side), Image.Resampling.LANCZOS)
        code = self._network.encode_style(to_tensor(scaled)[None].to(self._device))
        return StylePack(
            {name: tensor.cpu() for name, tensor in code.items()}, self.info.digest, source, digest, {"side": side}
        )

    def stylize(self, content: Image.Image, pack: StylePack) -> Image.Image:
        """An RGB picture of the content's size."""
        return next(iter(self.stylize_all(content, [pack])))

    @torch.inference_mode()
    def stylize_all(self, content: Image.Image, packs: Iterable[StylePack]) -> Iterator[Image.Image]:
        """One picture a pack; the content is encoded once.

        Raises:
            UsageError: a pack was made by another model.
        """
        features = None
        for pack in packs:
            if pack.model_digest != self.info.digest:
                raise UsageError(
                    f"the style pack {pack.source} was made by model {pack.model_digest[:12]}, "
                    f"this one is {self.info.digest[:12]}"
                )
            code = {name: tensor.to(self._device) for name, tensor in pack.code.items()}
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
                if features is None:
                    features = self._network.encode_content(to_tensor(content)[None].to(self._device))
                stylized = self._network.decode(features, code, height=content.height, width=content.width)
            yield Image.fromarray(to_uint8(stylized[0].float().cpu()))


def shrink(image: Image.Image, side: int | None) -> Image.Image:
    """Scaled down until the shorter side has `side` pixels; never enlarged."""
    if side is None or min(image.size) <= side:
        return image
    return image.resize(_scaled(image.size, side), Image.Resampling.LANCZOS)


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    short = min(size)
    return max(1, round(size[0] * side / short)), max(1, round(size[1] * side / short))
