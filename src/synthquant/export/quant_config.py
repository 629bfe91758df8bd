"""What `quant_config.json` of a checkpoint says: the scheme, its layers and quantizers, and the network before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from synthquant.core.errors import InputError, ModelError
from synthquant.core.files import read_sealed_json
from synthquant.core.settings import Settings, parse_settings
from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import IN_MEMORY, FloatModel, RecordedSource, Task
from synthquant.models.user_file import names_code
from synthquant.nn.scheme import LayerScheme, QuantArgs, QuantScheme

CONFIG_NAME = "quant_config.json"
WEIGHTS_NAME = "model.safetensors"
_FORMAT = "synthquant-packed"
VERSION = 2
EQUALIZED = 3
UNCLIPPED = 4
UNFOLDED = 5
SELF_CONTAINED = 6
# Of the first version, which did not carry the hash of its own content.
_UNSEALED = {"format": _FORMAT, "format_version": 1}


class LayerEntry(LayerScheme):
    """How one quantized layer is stored."""

    name: str
    """Module name."""
    kind: str
    """Class of the layer."""
    shape: tuple[int, ...]
    """Shape of the weight."""
    input_quantizer: str | None = None
    """Name of the quantizer that the layer's input goes through; layers that read one tensor share it."""


class FloatModelEntry(Settings):
    """The network before quantization."""

    name: str
    """Short name."""
    source: RecordedSource
    """How to build the architecture again."""
    fingerprint: str
    """Hash of its weights."""
    task: Task = "classify"
    """What the network does."""
    num_classes: int | None = None
    """Number of logits."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, where known."""


class QuantConfig(Settings):
    """Content of `quant_config.json`."""

    format: str = _FORMAT
    """Always `synthquant-packed`."""
    format_version: int = VERSION
    """Version of the format; since 2 the file carries the hash of its own content; 3 is of equalised networks,
    4 of those with unclipped codes, 5 of those whose batch norms stay, 6 of those that keep the float network."""
    synthquant_version: str
    """Release that wrote the checkpoint."""
    scheme: QuantScheme
    """What was asked for."""
    scheme_summary: str
    """The scheme in one line, with its rule for the first and last layer."""
    layers: tuple[LayerEntry, ...]
    """Quantized layers in execution order: what they got."""
    quantizers: dict[str, QuantArgs]
    """Activation quantizers by name, each once."""
    float_model: FloatModelEntry
    """What was quantized."""
    preprocess: Preprocess | None
    """How images become input; none: the network takes something else."""
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of `model.safetensors`."""
    fold: bool = True
    """Batch norms are folded; left out where they are."""

    float_graph_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Hash of `float_graph.pt2`, the float network as a program of `torch.export`; left out where there is none."""

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.fold:
            fields.pop("fold", None)
        if self.float_graph_sha256 is None:
            fields.pop("float_graph_sha256", None)
        return fields

    def require_trust_in_graph(self, folder: Path) -> None:
        """Raise `ModelError` where the network is at hand as a program only, which is not read without trust."""
        source = self.float_model.source.source
        if self.float_graph_sha256 is not None and (names_code(source) or source.startswith(f"{IN_MEMORY}/")):
            raise ModelError(
                f"{folder} keeps its network as a program, and a file from elsewhere must not run code: if you know it,"
                " give --trust-code (in Python trust_code=True)"
            )


def float_model_entry(model: FloatModel) -> FloatModelEntry:
    """Return what files say about the network before quantization."""
    return FloatModelEntry(
        name=model.name,
        source=RecordedSource.of(model.source),
        fingerprint=model.fingerprint,
        task=model.task,
        num_classes=model.num_classes,
        class_names=model.class_names,
    )


def read_config(folder: Path) -> QuantConfig:
    """Read and check `quant_config.json`.

    Raises:
        ModelError: it is missing, damaged or of another format or version.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ModelError(f"{folder} is not a checkpoint: it has no {CONFIG_NAME}")
    try:
        content = read_sealed_json(path, unsealed=_UNSEALED)
        if content.get("format") != _FORMAT:
            raise ModelError(f"{path} does not describe a checkpoint of this package: its format is not {_FORMAT!r}")
        if content.get("format_version") not in (1, VERSION, EQUALIZED, UNCLIPPED, UNFOLDED, SELF_CONTAINED):
            raise ModelError(
                f"{path} has version {content.get('format_version')!r}, this release reads 1 to {SELF_CONTAINED}"
            )
        return parse_settings(QuantConfig, content, str(path))
    except ModelError:
        raise
    except InputError as error:
        raise ModelError(str(error)) from error
