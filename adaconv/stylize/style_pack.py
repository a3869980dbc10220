"""Everything the decoder needs of a style, predicted once: a safetensors file that only its own model accepts."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from adaconv.errors import UsageError
from adaconv.model.network import StyleCode
from adaconv.stylize.blend import mix
from adaconv.stylize.outputs import MOST_PARTS
from adaconv.stylize.pictures import side_by_side

FORMAT = 3


@dataclass(frozen=True)
class StylePack:
    """A style, ready to be applied.

    `code`: tensors with a batch of one. `source`: what it is called. `source_sha256`: of the style's file; of
    a mixture those of all its parts, joined by +.
    `options`: how the style was read. `thumbnail`: a small JPEG of it, or nothing.
    """

    code: StyleCode
    model_digest: str
    source: str
    source_sha256: str
    options: Mapping[str, Any]
    thumbnail: bytes = b""

    @property
    def digest(self) -> str:
        """What the pack is made of, as 64 hex digits: the same style, read the same way by the same model."""
        made_of = [self.model_digest, self.source_sha256, dict(self.options)]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    @property
    def side(self) -> int:
        """Pixels of the shorter side at which the style was read; of a mixture, those of its first part."""
        options = self.options
        while "mixed" in options:  # a part may be a mixture itself
            options = options["mixed"][0]["options"]
        return int(options["side"])

    def require_model(self, digest: str, *, name: str = "") -> None:
        """Refuse to be used by another model.

        Raises:
            UsageError: names the pack and both models.
        """
        if self.model_digest != digest:
            raise UsageError(
                f"the style pack {name or self.source} was made by model {self.model_digest[:12]}, "
                f"this one is {digest[:12]}; make the pack again from its image"
            )

    def to_bytes(self) -> bytes:
        described = {
            "format": FORMAT,
            "model_digest": self.model_digest,
            "source": self.source,
            "source_sha256": self.source_sha256,
            "options": dict(self.options),
            "thumbnail": base64.b64encode(self.thumbnail).decode(),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.code.items()}
        described["code_sha256"] = _sha256_of(tensors)
        data: bytes = save(tensors, metadata={"style_pack": json.dumps(described, sort_keys=True)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str, model_digest: str) -> "StylePack":
        """Read a pack for a model.

        Args:
            data: of the file.
            name: of the file, for messages.
            model_digest: of the model that will use it.

        Raises:
            UsageError: it is no style pack, or one of another format or model.
        """
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            described = json.loads(header["__metadata__"]["style_pack"])
            code: StyleCode = load(data)
            if described["format"] != FORMAT:
                raise UsageError(
                    f"{name}: expected style pack format {FORMAT}, found {described['format']}; make the pack again"
                )
            if described["code_sha256"] != _sha256_of(code):
                raise UsageError(f"{name}: its bytes are not those that were written; make the pack again")
            pack = cls(
                code,
                described["model_digest"],
                described["source"],
                described["source_sha256"],
                described["options"],
                base64.b64decode(described["thumbnail"]),
            )
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{name} is not a style pack: {error}") from error
        pack.require_model(model_digest, name=name)
        return pack


def _sha256_of(tensors: StyleCode) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def mix_packs(packs: Sequence[StylePack], weights: Sequence[float] | None = None) -> StylePack:
    """One pack that does the weighted mean of what others do; equal weights unless told. Those of weight 0 are no part.

    Raises:
        UsageError: packs of different models, weights that do not fit, or more than MOST_PARTS styles.
    """
    if not packs:
        raise UsageError("expected at least one style pack to mix, found none")
    for pack in packs:
        pack.require_model(packs[0].model_digest)
    weights = [1.0] * len(packs) if weights is None else list(weights)
    code = mix([pack.code for pack in packs], weights)
    used = [(pack, weight / sum(weights)) for pack, weight in zip(packs, weights, strict=True) if weight]
    packs, shares = [pack for pack, _ in used], [share for _, share in used]
    digests = sorted({sha256 for pack in packs for sha256 in pack.source_sha256.split("+")})
    if len(digests) > MOST_PARTS:
        raise UsageError(f"expected a mixture of at most {MOST_PARTS} styles, found {len(digests)}")
    parts = [
        {"source_sha256": pack.source_sha256, "options": dict(pack.options), "share": share}
        for pack, share in zip(packs, shares, strict=True)
    ]
    return StylePack(
        code,
        packs[0].model_digest,
        source=" + ".join(f"{share:.2g} {pack.source}" for pack, share in zip(packs, shares, strict=True)),
        source_sha256="+".join(digests),
        options={"mixed": parts},
        thumbnail=side_by_side([pack.thumbnail for pack in packs], shares),
    )
