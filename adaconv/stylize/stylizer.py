"""One model, ready to stylize: pictures in, pictures out.

stylizer = Stylizer.from_model("models:/adaconv@champion")
pack = stylizer.style_pack(Image.open("style.jpg"))
stylizer.stylize(Image.open("content.jpg"), pack).save("stylized.png")
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adaconv.checkpoint import ModelInfo, fetched, is_mlflow_uri, load_network
from adaconv.errors import UsageError
from adaconv.images import as_seen, to_float, to_rgb, to_tensor, to_uint8, upright
from adaconv.model.kernels import EPS
from adaconv.model.network import AdaINTransfer, StyleCode, StyleTransferNet, pad_to_stride
from adaconv.stylize.blend import mix
from adaconv.stylize.colour import Color, ColorStatistics, coral, with_chroma_of
from adaconv.stylize.layers import Moments, Region
from adaconv.stylize.pictures import P, Picture, as_style, like, pixels_of, reduced, require_levels, thumbnail
from adaconv.stylize.raster import MemoryRaster, Raster, Window, tiles
from adaconv.stylize.style_pack import StylePack, mix_packs
from adaconv.stylize.tiling import Tiler, plan_tile

Precision = Literal["float32", "bfloat16"]
Tile = int | Literal["auto"] | None
Mask = Image.Image | NDArray[np.uint8] | NDArray[np.float32] | Tensor

_THUMBNAIL_SIDE = 192
_LEVEL = 1 / 512  # half of one of 8 bits
_RECOLOUR_SIDE = 1024  # windows of the second pass that CORAL takes


@dataclass(frozen=True)
class Blend:
    """How styles are applied.

    Args:
        packs: one, or several.
        alpha: from 0, the content in its own style, to 1; between them the kernels are faded, linearly.
        weights: of the packs in one mixture; None takes equal ones. Not with masks.
        masks: one a pack, (1, 1, H, W) in [0, 1] of the content's size; where they add up to less than 1, the content
            keeps its own style. None mixes the packs everywhere.
    """

    packs: tuple[StylePack, ...]
    alpha: float = 1.0
    weights: tuple[float, ...] | None = None
    masks: tuple[Tensor, ...] | None = None


class Stylizer:
    """Deterministic for a kind of device: every picture goes through the network by itself, whatever runs beside it."""

    def __init__(
        self,
        network: StyleTransferNet,
        info: ModelInfo,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        max_memory_gb: float = 4.0,
        scratch: Path | None = None,
    ) -> None:
        self.info, self.precision, self.max_memory_gb = info, precision, max_memory_gb
        self._scratch = scratch
        self._device = torch.device(device)
        # Channels innermost: on a CPU a picture of 256 px takes 0.94 of the time.
        self._network = network.to(self._device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        max_memory_gb: float = 4.0,
        scratch: Path | None = None,
    ) -> "Stylizer":
        """From a checkpoint's or registered model's local folder.

        Args:
            folder: with `model.safetensors` and `model.json`.
            device: `cpu` or `cuda`.
            precision: of convolutions when stylizing; `bfloat16` runs them under autocast. Style packs are float32.
            max_memory_gb: of this process (on `cuda`: of the GPU), in 10^9 bytes; pictures that would take more are
                made in tiles.
            scratch: folder for maps of such pictures; None is the system's for temporary files.

        Raises:
            CheckpointError: it holds no whole model.
        """
        network, info = load_network(folder)
        return cls(network, info, device=device, precision=precision, max_memory_gb=max_memory_gb, scratch=scratch)

    @classmethod
    def from_model(cls, uri: str | Path, *, tracking_uri: str | None = None, **how: Any) -> "Stylizer":
        """From a registered model or a checkpoint, by name.

        Args:
            uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or a checkpoint folder (local or s3://).
            tracking_uri: where models:/ and runs:/ are looked up; None: MLFLOW_TRACKING_URI, else mlflow.db in the
                current folder.
            how: see `from_folder`.

        Raises:
            TrackingError, CheckpointError, UsageError: there is no such model.
        """
        uri = str(uri)
        if not is_mlflow_uri(uri):
            with fetched(uri) as folder:
                return cls.from_folder(folder, **how)
        from adaconv.tracking.registry import resolved_model  # the one thing here that needs MLflow
        from adaconv.tracking.runs import default_uri

        with resolved_model(uri, tracking_uri=default_uri(tracking_uri, Path.cwd())) as (_, folder):
            return cls.from_folder(folder, **how)

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._device.type

    @torch.inference_mode()
    def style_pack(
        self,
        style: Picture | Sequence[Picture],
        *,
        side: int = 256,
        source: str = "",
        source_sha256: str | None = None,
    ) -> StylePack:
        """Predict what the decoder needs of a style.

        Args:
            style: picture of any size; of several, the pack is their even mixture.
            side: its shorter side is scaled to this many pixels first: the scale at which strokes are read. Of a strip
                more than 8 times as long as wide the middle is read.
            source: kept as the pack's name.
            source_sha256: of the style's file; None takes it of the pixels. Of several styles each has its own: make
                their packs first, and `mix_packs` of them.

        Raises:
            UsageError: styles of this side take more memory than `max_memory_gb`, or it is below 1; no such picture.
            MemoryError: this style does, which is longer than wide.
        """
        if side < 1:
            raise UsageError(f"side: expected 1 pixel or more, found {side}")
        if isinstance(style, list | tuple):
            if source_sha256 is not None:
                raise UsageError("source_sha256 is of one style, found several; make a pack of each, then mix_packs")
            packs = [self.style_pack(one, side=side, source=f"{source or 'style'} {i}") for i, one in enumerate(style)]
            return mix_packs(packs)
        if isinstance(style, Image.Image) and min(style.size):
            picture = as_seen(style)
        else:
            picture = Image.fromarray(to_uint8(_float(cast(Picture, style))[0]))
        digest = source_sha256 or hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
        self._require_room(*picture.size, side)
        (top, bottom, left, right), size = as_style(*picture.size, side)
        small = picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
        code = self._encode_style(to_tensor(small)[None])
        shown = thumbnail(picture, side=_THUMBNAIL_SIDE)
        return StylePack(code, self.info.digest, source, digest, {"side": side}, shown)

    def stylize(
        self,
        content: P,
        style: StylePack | Sequence[StylePack],
        *,
        alpha: float = 1.0,
        weights: Sequence[float] | None = None,
        mask: Mask | Sequence[Mask] | None = None,
        color: Color = "style",
        tile: Tile = "auto",
    ) -> P:
        """A stylized picture of the content's size and kind.

        Args:
            content: PIL; numpy (H, W, 3); tensor (3, H, W) or (1, 3, H, W): uint8, or floating in [0, 1]. PIL pictures
                are taken as they are seen (upright, sRGB, on white) and come back so, in RGB.
            style: a pack, or several to be mixed, or to be applied each under its mask.
            alpha: from 0, the content in its own style (read off a reduction of it, so that a pack of it gives nearly
                the same), to 1, the style.
            weights: of several packs in a mixture; None takes equal ones.
            mask: one a pack, of the content's size, white where the pack applies; PIL of any mode, where what is
                transparent is outside; arrays and tensors of uint8, or floating in [0, 1].
            color: `style`; `luminance` keeps the content's chroma, `coral` its mean and covariance of colours.
            tile: side of tiles in pixels; None takes the whole frame; `auto` tiles what would take more memory than
                `max_memory_gb`. The result is the same but for rounding.

        Raises:
            UsageError: a pack of another model, or arguments that do not fit.
        """
        pixels = pixels_of(content)
        packs = (style,) if isinstance(style, StylePack) else tuple(style)
        masks = None
        if mask is not None:
            given: list[Mask] = list(mask) if isinstance(mask, list | tuple) else [cast(Mask, mask)]
            masks = tuple(_mask(one, *pixels.shape[-2:]) for one in given)
        blend = Blend(packs, alpha, None if weights is None else tuple(weights), masks)
        out = torch.empty(pixels.shape)
        self.stylize_raster(MemoryRaster(pixels), blend, MemoryRaster(out).write, color=color, tile=tile)
        return like(content, out)

    def stylize_all(self, content: P, packs: Iterable[StylePack], *, batch_size: int = 1) -> Iterator[P]:
        """One picture a pack, whole frames; the content is encoded once, `batch_size` packs are decoded together.

        Raises:
            UsageError: a pack of another model, or batches of less than one.
        """
        _require_batch(batch_size)
        pixels = pixels_of(content)
        waiting: list[StylePack] = []
        encoded = self.encode(pixels)
        for pack in packs:
            waiting.append(pack)
            if len(waiting) == batch_size:
                yield from (like(content, one) for one in self.decode_batch(encoded, waiting))
                waiting = []
        if waiting:
            yield from (like(content, one) for one in self.decode_batch(encoded, waiting))

    def stylize_many(self, contents: Sequence[P], packs: Sequence[StylePack], *, batch_size: int = 8) -> list[P]:
        """Pairs of contents and packs, whole frames; contents of the same size go through the network together.

        Raises:
            UsageError: a pack of another model, as many packs as contents are not there, or batches of less than one.
        """
        _require_batch(batch_size)
        if len(contents) != len(packs):
            raise UsageError(f"expected as many packs as contents, found {len(contents)} contents, {len(packs)} packs")
        pixels = [_float(content) for content in contents]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, one in enumerate(pixels):
            by_size.setdefault(tuple(one.shape), []).append(index)
        made: dict[int, P] = {}
        for same in by_size.values():
            for start in range(0, len(same), batch_size):
                chosen = same[start : start + batch_size]
                encoded = self.encode(torch.cat([pixels[index] for index in chosen]))
                out = self.decode_batch(encoded, [packs[index] for index in chosen])
                made |= {index: like(contents[index], one) for index, one in zip(chosen, out, strict=True)}
        return [made[index] for index in range(len(contents))]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> "Encoded":
        """What all styles share of contents of one size: (B, 3, H, W), uint8 or floating in [0, 1]."""
        image = to_float(pixels).to(self._device)
        with self._autocast():
            features = self._network.encode_content(image)
        return Encoded(image, features)

    @torch.inference_mode()
    def decode_batch(self, encoded: "Encoded", packs: Sequence[StylePack]) -> list[Tensor]:
        """(1, 3, H, W) a pack, not clamped; of one content for all packs, or of one each."""
        for pack in packs:
            pack.require_model(self.info.digest)
        code = {name: torch.cat([pack.code[name] for pack in packs]).to(self._device) for name in _decoded(packs)}
        features = encoded.features.expand(len(packs), -1, -1, -1)
        height, width = encoded.image.shape[-2:]
        with self._autocast():
            out = self._network.decode(features, code, height=height, width=width)
        return list(out.float().split(1))

    def tile_of(self, height: int, width: int, tile: Tile = "auto") -> int | None:
        """Side of the tiles that a picture of this size is made in; None for the whole frame.

        Raises:
            UsageError: not even the smallest tile keeps within `max_memory_gb`.
        """
        if tile != "auto":
            return tile
        return plan_tile(height, width, network=self._network, max_memory_gb=self.max_memory_gb)

    @torch.inference_mode()
    def stylize_raster(
        self,
        content: Raster,
        blend: Blend,
        write: Callable[[Window, Tensor], None],
        *,
        color: Color = "style",
        tile: Tile = "auto",
        encoded: "Encoded | None" = None,
        canvas: Raster | None = None,
    ) -> None:
        """Stylize a picture that may be larger than memory.

        Args:
            content: (3, H, W), uint8 or floating in [0, 1].
            blend: which styles, and how.
            write: is handed each window of the picture with its (1, 3, h, w) float32, not clamped.
            color: see `stylize`.
            tile: see `stylize`.
            encoded: of the content, where it is there already; for whole frames.
            canvas: floating, of the content's size: where `coral` keeps the picture until its colours are known; None
                takes memory.
        """
        self._check(blend, content)
        if color not in get_args(Color):
            raise UsageError(f"color: expected {', '.join(get_args(Color))}, found {color}")
        side = self.tile_of(content.height, content.width, tile)
        if color == "luminance":
            write = partial(self._keep_chroma, content, write)
        if color == "coral":
            canvas = canvas or MemoryRaster(torch.empty(1, 3, content.height, content.width))
            have = ColorStatistics()

            def gather(window: Window, values: Tensor) -> None:
                have.add(values)
                canvas.write(window, values.cpu())

            self._apply(content, blend, gather, side, encoded)
            self._recolour(content, canvas, have, write)
            return
        self._apply(content, blend, write, side, encoded)

    def _apply(
        self,
        content: Raster,
        blend: Blend,
        write: Callable[[Window, Tensor], None],
        side: int | None,
        encoded: "Encoded | None",
    ) -> None:
        if side is None and blend.masks is None:
            whole = Window(0, content.height, 0, content.width)
            encoded = encoded or self.encode(content.read(whole))
            regions = self._regions(content, blend, lambda: self._network.transfer.predict(encoded.features))
            with self._autocast():
                out = self._network.decode(
                    encoded.features, regions[0].code, height=content.height, width=content.width
                )
            write(whole, out.float())
            return

        def regions_of(moments: Moments) -> list[Region]:
            return self._regions(content, blend, lambda: _statistics(moments))

        with self._autocast():
            tiler = Tiler(self._network, side=side, scratch=self._scratch)
            tiler.stylize(content, regions_of, lambda window, values: write(window, values.float()))

    def _regions(self, content: Raster, blend: Blend, statistics: Callable[[], StyleCode]) -> list[Region]:
        """What is applied where.

        Args:
            content: the picture.
            blend: which styles, and how.
            statistics: of the content's own relu4_1, which are AdaIN's code of it.
        """
        own: StyleCode | None = None
        covered = None if blend.masks is None else sum(blend.masks)
        assert not isinstance(covered, int)
        rest = covered is not None and bool((covered < 1 - _LEVEL).any())
        if blend.alpha < 1 or rest:
            if isinstance(self._network.transfer, AdaINTransfer):
                own = statistics()
            else:  # read at the scale of the style, as a style is
                self._require_room(content.width, content.height, blend.packs[0].side)
                with torch.autocast(self._device.type, enabled=False):
                    own = self._encode_style(reduced(content, blend.packs[0].side))
        codes = [pack.code for pack in blend.packs]
        if blend.masks is None:
            codes = [mix(codes, blend.weights or [1.0] * len(codes))]
        if own is not None and blend.alpha < 1:
            codes = [mix([own, code], [1 - blend.alpha, blend.alpha]) for code in codes]
        placed = [{name: tensor.to(self._device) for name, tensor in code.items()} for code in codes]
        if blend.masks is None:
            return [Region(placed[0])]
        assert covered is not None
        shares = [mask / covered.clamp_min(1) for mask in blend.masks]
        if rest:
            assert own is not None
            placed.append({name: tensor.to(self._device) for name, tensor in own.items()})
            shares.append(1 - covered.clamp_max(1))
        smallest = self._network.transfer.smallest_map
        return [
            Region(code, MemoryRaster(pad_to_stride(share, smallest_map=smallest).to(self._device)))
            for code, share in zip(placed, shares, strict=True)
        ]

    def _require_room(self, width: int, height: int, side: int) -> None:
        """A style is read in no tiles.

        Raises:
            UsageError, MemoryError: see `style_pack`.
        """
        if self.tile_of(side, side) is not None:
            raise UsageError(
                f"style_side: expected styles that max_memory_gb, {self.max_memory_gb:g}, has room for, found {side} px"
            )
        _, (wide, high) = as_style(width, height, side)
        if self.tile_of(high, wide) is not None:
            raise MemoryError(f"{width}x{height} would be read at {wide}x{high}, beyond {self.max_memory_gb:g} GB")

    def _encode_style(self, image: Tensor) -> StyleCode:
        code = self._network.encode_style(image.to(self._device))
        return {name: tensor.cpu() for name, tensor in code.items()}

    def _keep_chroma(
        self, content: Raster, write: Callable[[Window, Tensor], None], window: Window, values: Tensor
    ) -> None:
        write(window, with_chroma_of(_float(content.read(window)).to(values.device), values))

    def _recolour(
        self, content: Raster, canvas: Raster, have: ColorStatistics, write: Callable[[Window, Tensor], None]
    ) -> None:
        windows = tiles(content.height, content.width, _RECOLOUR_SIDE)
        want = ColorStatistics()
        for window in windows:
            want.add(_float(content.read(window)))
        for window in windows:
            write(window, coral(canvas.read(window), have=have, want=want))

    def _check(self, blend: Blend, content: Raster) -> None:
        if not blend.packs:
            raise UsageError("expected a style pack, found none")
        for pack in blend.packs:
            pack.require_model(self.info.digest)
        if not 0 <= blend.alpha <= 1:
            raise UsageError(f"alpha: expected 0 (the content's own style) to 1, found {blend.alpha}")
        if blend.masks is None:
            return
        if blend.weights is not None:
            raise UsageError(
                "expected weights or masks, found both; masks say themselves how much of each style applies"
            )
        if len(blend.masks) != len(blend.packs):
            raise UsageError(f"expected a mask for each of {len(blend.packs)} packs, found {len(blend.masks)}")
        for mask in blend.masks:
            if tuple(mask.shape[-2:]) != (content.height, content.width):
                raise UsageError(
                    f"expected masks of the content's {content.width}x{content.height}, "
                    f"found {mask.shape[-1]}x{mask.shape[-2]}"
                )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


@dataclass(frozen=True)
class Encoded:
    """Contents (B, 3, H, W) float32 in [0, 1] and their relu4_1."""

    image: Tensor
    features: Tensor


def _require_batch(size: int) -> None:
    if size < 1:
        raise UsageError(f"batch_size: expected 1 or more, found {size}")


def _float(picture: Picture) -> Tensor:
    return to_float(pixels_of(picture))


def _decoded(packs: Sequence[StylePack]) -> list[str]:
    """Names of the tensors that the decoder takes."""
    return [name for name in packs[0].code if name != "descriptor"]


def _statistics(moments: Moments) -> StyleCode:
    """AdaIN's code of a content from the statistics of its relu4_1."""
    variance = moments.squares / moments.count
    return {"mean": moments.mean.float()[None], "std": (variance + EPS).sqrt().float()[None]}


def _mask(mask: Mask, height: int, width: int) -> Tensor:
    """(1, 1, H, W) float32 in [0, 1]."""
    if isinstance(mask, Image.Image):
        picture = upright(mask)
        wide = picture.mode.startswith("I") or picture.mode == "F"  # which `convert` would clip
        if picture.has_transparency_data:  # what is transparent is outside, whatever colour it has
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
        mask = np.asarray((to_rgb(picture) if wide else picture).convert("L"))
    values = torch.as_tensor(np.array(mask) if isinstance(mask, np.ndarray) else mask)
    if values.dtype not in (torch.uint8, torch.bool) and not values.is_floating_point():
        raise UsageError(f"expected a mask of uint8, or floating in [0, 1], found {values.dtype}")
    values = require_levels(to_float(values)) if values.numel() else to_float(values)
    if values.ndim not in (2, 3, 4) or values.numel() != values.shape[-1] * values.shape[-2]:
        raise UsageError(f"expected a mask of {width}x{height} with one channel, found {tuple(values.shape)}")
    return values.reshape(1, 1, *values.shape[-2:]).clamp(0, 1)
