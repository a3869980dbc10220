"""Everything the decoder needs of a style, predicted once: a safetensors file that only its own model accepts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save

from adaconv.errors import UsageError
from adaconv.model.network import StyleCode

FORMAT = 1


@dataclass(frozen=True)
class StylePack:
    """`code`: tensors with a batch of one. `source_sha256`: of the style's file. `options`: how it was read."""

    code: StyleCode
    model_digest: str
    source: str
    source_sha256: str
    options: Mapping[str, int]

    @property
    def digest(self) -> str:
        """What the pack is made of, as 64 hex digits: the same style, read the same way by the same model."""
        made_of = [FORMAT, self.model_digest, self.source_sha256, dict(self.options)]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        described = {
            "format": FORMAT,
            "model_digest": self.model_digest,
            "source": self.source,
            "source_sha256": self.source_sha256,
            "options": dict(self.options),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.code.items()}
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
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{name} is not a style pack: {error}") from error
        if described["format"] != FORMAT:
            raise UsageError(f"{name}: expected style pack format {FORMAT}, found {described['format']}")
        if described["model_digest"] != model_digest:
            raise UsageError(
                f"{name} was made by model {described['model_digest'][:12]}, this one is {model_digest[:12]}; "
                "make the pack again from its image"
            )
        return cls(code, model_digest, described["source"], described["source_sha256"], described["options"])
