"""What an ONNX file of ours says about itself, under keys that start with `synthquant.`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from synthquant.core.errors import ModelError
from synthquant.core.files import sha256_bytes
from synthquant.core.settings import Settings, parse_settings
from synthquant.data.preprocess import Preprocess
from synthquant.export.quant_config import FloatModelEntry
from synthquant.nn.scheme import QuantScheme

_PREFIX = "synthquant."
_VERSION = "2"
_UNSEALED_VERSION = "1"
_HASH = f"{_PREFIX}sha256"
# One more entry of the model's metadata (field 14 of ModelProto: a key, field 1, and a value, field 2). A message that
# another is appended to is the two merged, so that the entry is read like all others, and the hash is one of all bytes
# before it.
_SEAL = b"\x72%c\x0a%c%b\x12\x40" % (len(_HASH) + 68, len(_HASH), _HASH.encode())


class OnnxMetadata(Settings):
    """Origin and use of an exported network."""

    format_version: int = int(_VERSION)
    """Version of these keys; since 2 a file carries the hash of its own content."""
    synthquant_version: str
    """Release that wrote the file."""
    preset: str
    """What the file was made for."""
    scheme: QuantScheme
    """How the network is quantized."""
    scheme_summary: str
    """The scheme in one line, with its rule for the first and last layer."""
    quantized_layers: int
    """Layers with integer weights."""
    preprocess: Preprocess | None
    """How images become input; none: the network takes something else."""
    float_model: FloatModelEntry
    """What was quantized."""
    checkpoint_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of the checkpoint's `model.safetensors` for the same network."""
    notes: tuple[str, ...] = ()
    """What differs from the scheme in storage."""
    origin: dict[str, str] = Field(default_factory=dict)
    """What else is known about the run, such as the hash of its recipe."""

    def to_properties(self) -> dict[str, str]:
        """Return the metadata as text by key; what is not text is JSON."""
        values = self.model_dump(mode="json")
        return {
            f"{_PREFIX}{key}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for key, value in values.items()
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], where: str) -> OnnxMetadata:
        """Read what `to_properties` wrote.

        Raises:
            ModelError: the file is not one of ours, or of another version, or lost the hash that `require_seal` reads.
        """
        own = {key.removeprefix(_PREFIX): value for key, value in properties.items() if key.startswith(_PREFIX)}
        if "format_version" not in own:
            raise ModelError(
                f"{where} was not exported by synthquant: it does not say how images are prepared; export it with"
                " synthquant export"
            )
        version, sealed = own["format_version"], own.pop(_HASH.removeprefix(_PREFIX), None) is not None
        if version not in (_UNSEALED_VERSION, _VERSION):
            raise ModelError(
                f"{where} has metadata of version {version}, this release reads {_UNSEALED_VERSION} to {_VERSION}"
            )
        if not sealed and version != _UNSEALED_VERSION:
            raise ModelError(
                f"{where} lacks the hash that synthquant export writes: it was changed since; export again"
            )
        values: dict[str, Any] = {}
        for key, text in own.items():
            field = cls.model_fields.get(key)
            try:
                values[key] = text if field is not None and field.annotation is str else json.loads(text)
            except ValueError as error:
                raise ModelError(f"{where}: its metadata {key!r} is not JSON") from error
        try:
            return parse_settings(cls, values, where)
        except ValueError as error:
            raise ModelError(str(error)) from error


def seal(content: bytes) -> bytes:
    """Return the bytes of an ONNX model with one more entry of metadata: the hash of all of them."""
    return content + _SEAL + sha256_bytes(content).encode()


def require_seal(content: bytes, properties: Mapping[str, str], where: str) -> None:
    """Raise `ModelError` if the metadata hold a hash that is not that of `content`, or not at its end."""
    body = content[: -len(_SEAL) - 64]
    if _HASH in properties and content != seal(body):
        raise ModelError(
            f"{where} was changed or damaged since it was written (its hash does not fit); export it again with"
            " synthquant export"
        )
