"""Checkpoints: a folder with `model.safetensors` (packed codes), `quant_config.json` (what they mean) and a model card.

Tensors in `model.safetensors`:

- `NAME.weight_packed`: codes of the weight of layer NAME, packed as `packing` says, uint8; or `NAME.weight_codes`,
  int16, where codes beyond the grid were kept: they are clipped to it when they are decoded
- `NAME.weight_scale` `[C, G, 1]` float32 and `NAME.weight_zero_point` `[C, G, 1]`
- `QUANTIZER.scale` `[1]` float32 and `QUANTIZER.zero_point` `[1]` of every activation quantizer that is affine, and of
  others the tensors that their grids consist of
- `NAME.reading.scale` and `NAME.reading.zero_point` `[1]` of the differences that layer NAME reads, where modulation
  has static ranges, and `modulation.timesteps` `[S]` float64, the sampler's steps that these are of
- everything else (biases, normalisation, layers left in float) under the names of the float network, batch norms folded
- in an equalised network, what was done to the float one: `NAME.equalize_rows`, `NAME.equalize_columns` and
  `NAME.equalize_shift` of layers, `NAME.equalize_bounds` and `NAME.equalize_bound_shift` of clips, float32

A weight is `(code - zero_point) * scale`. Zero points are whole numbers, kept as uint8 where they fit and as int32
elsewhere. The same network gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from synthquant.core.errors import ModelError, SchemeError, UnsupportedModelError, VerificationError
from synthquant.core.files import atomic_folder, sha256_bytes, write_bytes, write_sealed_json, write_text
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.core.version import package_version
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.export.compare import row, run_beside
from synthquant.export.flat import flat_output
from synthquant.export.float_graph import GRAPH_NAME, float_graph
from synthquant.export.model_card import CARD_NAME, checkpoint_card
from synthquant.export.packing import pack_codes, unpack_codes
from synthquant.export.quant_config import (
    CONFIG_NAME,
    EQUALIZED,
    SELF_CONTAINED,
    UNCLIPPED,
    UNFOLDED,
    VERSION,
    WEIGHTS_NAME,
    LayerEntry,
    QuantConfig,
    float_model_entry,
    read_config,
)
from synthquant.methods import EXPORTERS
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.models.samples import Samples
from synthquant.nn.equalization import Equalization
from synthquant.nn.quant_model import QuantModel


@EXPORTERS.register("checkpoint")
class Checkpoint(Settings):
    """Folder of packed integer codes (safetensors) with their description (JSON), for `load_checkpoint`."""

    suffix: ClassVar[str] = ""

    float_graph: bool = False
    """Keep the float network beside it, as a program of `torch.export` with its weights: whoever trusts the folder
    loads it without the code that made the network."""

    def export(self, quant_model: QuantModel, path: Path, *, origin: Mapping[str, str] | None = None) -> Path:
        """Write the checkpoint and return its folder; a checkpoint has no room for an `origin`."""
        return save_checkpoint(quant_model, path, float_graph=self.float_graph)

    def check(self, quant_model: QuantModel) -> None:
        """Every scheme has a checkpoint."""

    def verify(
        self, quant_model: QuantModel, path: Path, images: ImageSet | Samples, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        """Load the checkpoint and compare on at most 128 samples: every output must be the same.

        Raises:
            VerificationError: an output differs.
        """
        # What it names is where `quant_model` came from: that code has run, or the user has given its network.
        loaded = load_checkpoint(path, device=quant_model.device, trust_code=True)
        takes = loaded.float_model.example(1)

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            args, kwargs = takes.arguments([tensor.to(loaded.device) for tensor in tensors])
            return flat_output(loaded(*args, **kwargs))

        beside = run_beside(quant_model, {"loaded": run}, images, 128, progress)
        if not all(torch.equal(beside.outputs["loaded"][name], value) for name, value in beside.reference.items()):
            what = "logits" if quant_model.float_model.task == "classify" else "outputs"
            raise VerificationError(f"the checkpoint gives other {what} than the network it was made from")
        return {beside.noun: beside.count, "loaded": row(beside.differences("loaded"))}


def save_checkpoint(
    quant_model: QuantModel, folder: Path | str, *, card: bool = True, float_graph: bool = False
) -> Path:
    """Write `quant_model` to `folder`, which is there wholly or not at all; one that is already there is replaced.

    With it goes its model card, unless `card` says no, where the folder around it has one. With `float_graph` also the
    float network as a program of `torch.export`, from which it loads where its own code is not there; that it does, to
    the same outputs, is seen before the folder is there.

    Raises:
        ModelError: activation ranges, or static ranges of differences, are not calibrated yet; or the float weights are
            not there to be kept.
        UnsupportedModelError: `torch.export` cannot follow the network, or what it gives is not the same network.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    quant_model.require_calibrated()
    if quant_model.modulation is not None:
        quant_model.modulation.require_calibrated()
    weights = save_safetensors(_packed(quant_model))
    graph = _graph(quant_model.float_model) if float_graph else None
    config = _config(quant_model, sha256_bytes(weights), None if graph is None else sha256_bytes(graph))
    with atomic_folder(folder, replace=True) as temporary:
        write_bytes(temporary / WEIGHTS_NAME, weights)
        write_sealed_json(temporary / CONFIG_NAME, config.model_dump(mode="json"))
        if card:
            write_text(temporary / CARD_NAME, checkpoint_card(temporary))
        if graph is not None:
            write_bytes(temporary / GRAPH_NAME, graph)
            _require_same_from_graph(quant_model, temporary)
    return folder


def load_checkpoint(
    folder: Path | str,
    *,
    float_model: FloatModel | None = None,
    device: torch.device | str | None = None,
    model: str | None = None,
    trust_code: bool = False,
    architecture: FloatModel | None = None,
) -> QuantModel:
    """Read a checkpoint; the network gives bit for bit the logits of the one that was saved.

    Args:
        folder: where `save_checkpoint` wrote.
        float_model: the network that was quantized, if it is at hand; otherwise its architecture is built from its
            source, and `quant_model.float_model` then has a `recorded_fingerprint`: it is good for its preprocessing
            and names, not to compare with.
        device: where the network goes; by default where `float_model` is, or the CPU.
        model: the name of the network that was quantized, which lets code of its run, see `RecordedSource.confirmed`.
        trust_code: whether code that the checkpoint names as its source may run, or the network that it keeps as a
            program be read, which evaluates expressions; where it keeps one, that is the network then.
        architecture: the network with other weights, where its source need not be opened.

    Raises:
        ModelError: a file is missing, damaged or of another format; tensors are missing, unexpected or of a wrong
            shape; `float_model` or `model` is not the network that was quantized; or the checkpoint names code.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ModelError(f"{folder} is not a checkpoint: it has no {WEIGHTS_NAME}")
    data = path.read_bytes()
    if sha256_bytes(data) != config.weights_sha256:
        raise ModelError(f"{path} is damaged: its hash is not the one in {CONFIG_NAME}; write the checkpoint again")
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
    if float_model is None and architecture is not None:
        float_model = _standing_in(architecture, config)
    elif float_model is None and config.float_graph_sha256 is not None and trust_code and model is None:
        float_model = _of_graph(folder, config, config.float_graph_sha256)
    elif float_model is None:
        if model is None:
            config.require_trust_in_graph(folder)
        source = config.float_model.source.confirmed(str(folder / CONFIG_NAME), model=model, trust_code=trust_code)
        float_model = _standing_in(open_model(source, pretrained=False), config)
    elif float_model.fingerprint != config.float_model.fingerprint:
        name = config.float_model.name
        raise ModelError(f"the checkpoint was made from other weights of {name} than the float model given")
    placed = float_model if device is None else float_model.to(device)
    equalization, tensors = Equalization.split(tensors)
    quant_model = QuantModel.build(placed, config.scheme, equalization, fold=config.fold)
    _check_layers(config, _layer_entries(quant_model), folder)
    try:
        quant_model.load_state(_unpacked(config, tensors, path))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return quant_model


def checkpoint_hash(quant_model: QuantModel) -> str:
    """Return the SHA-256 that `model.safetensors` of this network has or would have."""
    return sha256_bytes(save_safetensors(_packed(quant_model)))


def _standing_in(built: FloatModel, config: QuantConfig) -> FloatModel:
    """The architecture in the place of the network that was quantized."""
    entry = config.float_model
    return replace(
        built,
        takes=config.preprocess or built.takes,
        name=entry.name,
        task=entry.task,
        num_classes=entry.num_classes,
        class_names=entry.class_names,
        recorded_fingerprint=entry.fingerprint,
    )


def _graph(model: FloatModel) -> bytes:
    if model.recorded_fingerprint:
        raise ModelError(f"the float weights of {model.name} are not there; load it with its network to keep that")
    return float_graph(model)


def _of_graph(folder: Path, config: QuantConfig, sha256: str) -> FloatModel:
    """The network that a checkpoint keeps, with its weights."""
    path = folder / GRAPH_NAME
    if not path.is_file():
        raise ModelError(f"{folder} is not complete: it has no {GRAPH_NAME}")
    content = path.read_bytes()
    if sha256_bytes(content) != sha256:
        raise ModelError(f"{path} is damaged: its hash is not the one in {CONFIG_NAME}; write the checkpoint again")
    from synthquant.export.graph_network import network_of_graph  # loads much of torch.export

    module, takes = network_of_graph(content)
    entry = config.float_model
    built = FloatModel(module, takes, entry.name, ModelSource.model_validate(entry.source.model_dump()))
    standing_in = _standing_in(built, config)
    real = replace(standing_in, recorded_fingerprint="")
    return real if real.fingerprint == entry.fingerprint else standing_in


@torch.no_grad()
def _require_same_from_graph(quant_model: QuantModel, folder: Path) -> None:
    """Raise `UnsupportedModelError` unless the checkpoint loads from its program, to the same outputs."""
    name = quant_model.float_model.name
    try:
        loaded = load_checkpoint(folder, trust_code=True, device=quant_model.device)
    except (ModelError, UnsupportedModelError, SchemeError) as error:
        reason = str(error).replace(f"{folder}/", "")
        raise UnsupportedModelError(
            f"the graph of {name} cannot stand in for its code: {reason}; leave float_graph out"
        ) from error
    example = quant_model.float_model.example(3)
    outputs = [flat_output(example.call(network)) for network in (quant_model, loaded)]
    if len(outputs[0]) != len(outputs[1]) or not all(map(torch.equal, *outputs)):
        raise UnsupportedModelError(f"the graph of {name} gives other outputs than its code; leave float_graph out")


def _config(quant_model: QuantModel, weights_sha256: str, float_graph_sha256: str | None) -> QuantConfig:
    model = quant_model.float_model
    return QuantConfig(
        format_version=_version(quant_model) if float_graph_sha256 is None else SELF_CONTAINED,
        synthquant_version=package_version(),
        scheme=quant_model.scheme,
        scheme_summary=quant_model.scheme.describe(),
        layers=tuple(_layer_entries(quant_model)),
        quantizers={name: quantizer.args for name, quantizer in quant_model.quantizers.items()},
        float_model=float_model_entry(model),
        preprocess=model.takes if isinstance(model.takes, Preprocess) else None,
        weights_sha256=weights_sha256,
        fold=quant_model.fold,
        float_graph_sha256=float_graph_sha256,
    )


def _version(quant_model: QuantModel) -> int:
    """The lowest version that has room for all of the network."""
    if not quant_model.fold:
        return UNFOLDED
    quantizers = [layer.weight_quantizer for layer in quant_model.layers.values()]
    if any(quantizer is not None and quantizer.unclipped for quantizer in quantizers):
        return UNCLIPPED
    return VERSION if quant_model.equalization is None else EQUALIZED


def _layer_entries(quant_model: QuantModel) -> list[LayerEntry]:
    kinds = {row.name: row.kind for row in quant_model.coverage()}
    entries = []
    for name, layer in quant_model.layers.items():
        weights, quantizer = layer.weight_quantizer, quant_model.reads.get(name)
        entries.append(
            LayerEntry(
                name=name,
                kind=kinds[name],
                shape=tuple(layer.weight.shape) if weights is None else weights.layout.shape,
                weights=None if weights is None else weights.args,
                input_activations=None if quantizer is None else quant_model.quantizers[quantizer].args,
                input_quantizer=quantizer,
            )
        )
    return entries


def _check_layers(config: QuantConfig, built: list[LayerEntry], folder: Path) -> None:
    """Refuse a checkpoint whose layers are not those that this release makes of the network and the scheme."""
    recorded = {entry.name: entry for entry in config.layers}
    for entry in built:
        if (found := recorded.pop(entry.name, None)) != entry:
            missing = "missing, an earlier release may have left it in float; quantize again"
            fault = f"not what {config.float_model.name} has" if found else missing
            raise ModelError(f"{folder / CONFIG_NAME}: layer {entry.name} is {fault}")
    if recorded:
        raise ModelError(f"{folder / CONFIG_NAME}: {config.float_model.name} has no layer {next(iter(recorded))}")


def _packed(quant_model: QuantModel) -> dict[str, Tensor]:
    """The state of the network with codes packed and zero points as integers, on the CPU."""
    bits = {
        f"{name}.weight_codes": layer.weight_quantizer.num_bits
        for name, layer in quant_model.layers.items()
        if layer.weight_quantizer is not None and not layer.weight_quantizer.unclipped
    }
    packed, whole = {}, quant_model.whole_numbers
    for name, value in quant_model.state().items():
        if name in bits:
            packed[_packed_name(name)] = pack_codes(value, bits[name])
        elif name in whole:
            packed[name] = _whole(value.cpu(), name)
        else:
            packed[name] = value.cpu().contiguous().clone()  # safetensors takes no tensors that share memory
    if quant_model.equalization is not None:
        packed |= quant_model.equalization.tensors()
    return packed


def _unpacked(config: QuantConfig, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The inverse of `_packed`; what is missing stays missing."""
    state = dict(tensors)
    for entry in config.layers:
        codes_name = f"{entry.name}.weight_codes"
        packed = state.pop(_packed_name(codes_name), None)
        if entry.weights is None or packed is None:
            continue
        try:
            state[codes_name] = unpack_codes(packed, entry.weights.num_bits, entry.shape)
        except ValueError as error:
            raise ModelError(f"{path}: {_packed_name(codes_name)}: {error}") from error
    return state


def _packed_name(codes_name: str) -> str:
    return codes_name.removesuffix("weight_codes") + "weight_packed"


def _whole(value: Tensor, name: str) -> Tensor:
    """Zero points and the like as uint8 if they fit, else int32."""
    if not torch.equal(value, value.round()):
        raise ModelError(f"{name} is not a whole number; calibrate again before saving")
    small = bool(((value >= 0) & (value <= 255)).all())
    return value.to(torch.uint8 if small else torch.int32)
