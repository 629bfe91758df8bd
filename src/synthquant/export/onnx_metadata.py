"""What an ONNX file of ours says about itself, under keys that start with `synthquant.`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from synthquant.core.errors import ModelError
from synthquant.core.settings import Settings, parse_settings
from synthquant.data.preprocess import Preprocess
from synthquant.export.checkpoint import FloatModelEntry
from synthquant.nn.scheme import QuantScheme

_PREFIX = "synthquant."


class OnnxMetadata(Settings):
    """Origin and use of an exported network."""

    format_version: int = 1
    """Version of these keys."""
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
    preprocess: Preprocess
    """How images become input."""
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
            ModelError: the file is not one of ours, or of another version.
        """
        own = {key.removeprefix(_PREFIX): value for key, value in properties.items() if key.startswith(_PREFIX)}
        if "format_version" not in own:
            raise ModelError(
                f"{where} was not exported by synthquant: it does not say how images are prepared; export it with"
                " synthquant export"
            )
        if own["format_version"] != "1":
            raise ModelError(f"{where} has metadata of version {own['format_version']}, this release reads 1")
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
