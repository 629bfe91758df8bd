"""The door to onnx, onnxscript and onnxruntime: write a quantized network as an ONNX file.

The file holds weights as integers and biases as 32-bit integers, never float weights that are quantized when it is
loaded. Quantized tensors pass through QuantizeLinear and DequantizeLinear, the form that runtimes turn into integer
kernels. Batch size is dynamic, weights are inside the file, and its metadata says how images are prepared
and what it was made from.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, field_validator

from synthquant.core.errors import MissingExtraError, UnsupportedModelError
from synthquant.core.files import write_bytes
from synthquant.core.progress import QUIET, Progress
from synthquant.core.record import package_version
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import checkpoint_hash, float_model_entry
from synthquant.export.compare import Network
from synthquant.export.deploy import OPSET, OneInput, Symbols, constant_batch, deploy, packed_layers, require_takes
from synthquant.export.onnx_metadata import OnnxMetadata, seal
from synthquant.export.presets import Preset, find_preset
from synthquant.methods import EXPORTERS
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel

if TYPE_CHECKING:
    import onnx_ir as ir

# How torch names an operator that it has no ONNX form for.
_OPERATOR = re.compile(r"op='([\w.]+)', overload='(\w+)'")
_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@EXPORTERS.register("onnx")
class Onnx(Settings):
    """ONNX file with integer weights, for ONNX Runtime, TensorRT and OpenVINO."""

    preset: str = "ort-cpu"
    """What the file is for: `ort-cpu`, `ort-cpu-w4`, `tensorrt`, `openvino` or `simulate`."""
    min_agreement: float = Field(default=0.99, ge=0, le=1)
    """Verification: share of images that must get the same top class as from the quantized network. One image may
    always differ, and ties do not count: two classes that the network itself hardly tells apart."""
    max_mean_error: float = Field(default=0.1, gt=0)
    """Verification: mean difference of the logits, as a share of their spread (standard deviation), that is allowed."""
    images: int = Field(default=128, ge=1)
    """Verification: how many images to use, evenly spaced over the set."""

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str) -> str:
        return find_preset(value).name

    def export(self, quant_model: QuantModel, path: Path | str, *, origin: Mapping[str, str] | None = None) -> Path:
        """Write the file and return `path`.

        Args:
            quant_model: calibrated; left as it was.
            path: the file, replaced if it is there.
            origin: what else is known about where the network comes from, for the file's metadata.

        Raises:
            MissingExtraError: onnx or onnxruntime is not installed.
            ModelError: activation ranges are not calibrated.
            SchemeError: the preset cannot express the scheme; says which part.
            UnsupportedModelError: an operation has no ONNX form; names the module.
            OutputError: the file cannot be written.
        """
        require_onnx()
        from synthquant.export import onnx_graph

        path = Path(path)
        model, notes = build_graph(quant_model, find_preset(self.preset))
        metadata = OnnxMetadata(
            synthquant_version=package_version(),
            preset=self.preset,
            scheme=quant_model.scheme,
            scheme_summary=quant_model.scheme.describe(),
            quantized_layers=sum(layer.weight_quantizer is not None for layer in quant_model.layers.values()),
            preprocess=quant_model.float_model.preprocess,
            float_model=float_model_entry(quant_model.float_model),
            checkpoint_sha256=checkpoint_hash(quant_model),
            notes=notes,
            origin=dict(origin or {}),
        )
        onnx_graph.finish(
            model, producer="synthquant", version=metadata.synthquant_version, metadata=metadata.to_properties()
        )
        write_bytes(path, seal(onnx_graph.to_bytes(model)))
        return path

    def check(self, quant_model: QuantModel) -> None:
        """Raise `SchemeError` if the preset cannot express the scheme, whatever ranges turn out to be; says which part.

        The network need not be calibrated, and no package is needed.
        """
        require_takes(quant_model, find_preset(self.preset))

    def verify(
        self, quant_model: QuantModel, path: Path | str, images: ImageSet, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        """Load the file in ONNX Runtime and compare it with the quantized network on `images`.

        Raises:
            VerificationError: the file is not valid, or differs by more than the settings allow; says by how much.
        """
        require_onnx()
        from synthquant.export.verify import verify_onnx

        return verify_onnx(
            quant_model,
            Path(path),
            images,
            count=self.images,
            min_agreement=self.min_agreement,
            max_mean_error=self.max_mean_error,
            progress=progress,
        )


def require_onnx() -> None:
    """Raise `MissingExtraError` unless all packages of the extra `onnx` are installed."""
    for package in _PACKAGES:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "onnx", "ONNX files") from error


def open_onnx(path: Path, runtime: str = "onnxruntime", threads: int | None = None) -> tuple[Network, OnnxMetadata]:
    """Load an exported network: returns a function from images to logits, and what the file says about itself.

    Raises:
        ModelError: there is no such file or runtime, or the file is not one of ours.
        MissingExtraError: the runtime is not installed.
    """
    require_onnx()
    from synthquant.export import onnx_runtime

    metadata = onnx_runtime.read_metadata(path)
    return onnx_runtime.open_network(path, runtime, threads), metadata


def build_graph(quant_model: QuantModel, preset: Preset) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the ONNX graph of a quantized network, and what is worth knowing about it, a line each."""
    from synthquant.export import onnx_bias, onnx_graph, onnx_moves

    packed = packed_layers(quant_model, preset)
    model = export_module(deploy(quant_model, preset, Symbols()).module, quant_model.float_model)
    onnx_graph.merge_duplicates(model)
    onnx_graph.name_nodes(model)
    if preset.runs_integers:
        onnx_graph.pool_by_name(model)
    if preset.moves_codes:
        onnx_moves.move_codes(model)
    coarser = onnx_bias.quantize_biases(model, preset)
    onnx_graph.pack_weights(model)
    notes = _notes(quant_model, packed)
    if coarser:
        notes.append(f"bias beyond 32 bits, weight made coarser in: {', '.join(coarser)}")
    return model, tuple(notes)


def export_module(module: torch.nn.Module, float_model: FloatModel) -> ir.Model:
    """Run torch's exporter on a module that takes the images of `float_model`, with a dynamic batch.

    Raises:
        UnsupportedModelError: an operation has no ONNX form; names it, and the module where it stands. Or the network
            works for one size of the batch only.
    """
    network, example = OneInput(module), float_model.example_input(2).cpu()
    shapes = ({0: torch.export.Dim("batch")},)
    with _quiet_exporter():
        try:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                dynamic_shapes=shapes,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = _innermost(error)
            where = _modules_with(_OPERATOR.search(reason), network, example, shapes)
            raise UnsupportedModelError(f"{float_model.name} cannot be written as ONNX: {where}{reason}") from error
    if program is None:
        raise UnsupportedModelError(f"{float_model.name} cannot be written as ONNX: the exporter returned no graph")
    shape = program.model.graph.inputs[0].shape
    if shape is None or isinstance(shape[0], int):
        raise constant_batch(float_model.name)
    return program.model


def _innermost(error: BaseException) -> str:
    """The first line of the innermost error of torch's exporter: the operation and the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}"


def _modules_with(
    operator: re.Match[str] | None, network: torch.nn.Module, example: torch.Tensor, shapes: tuple[dict[int, Any], ...]
) -> str:
    """Say in which modules an operator stands, as the start of a message; empty where it is not found."""
    if operator is None:
        return ""
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    missing = operator[1].rpartition(".")[2]
    # The exporter breaks operators down, more than torch does by itself: what it names as prims.bessel_j0 was called as
    # aten.special_bessel_j0, and what it names as aten._linalg_svd was aten.linalg_svdvals.
    for graph, ending in ((program.run_decompositions().graph, ()), (program.graph, (f"_{missing}",))):
        found: dict[str, None] = {}
        for node in graph.nodes:
            name = str(node.target).rpartition(".")[0].rpartition(".")[2]
            if node.op == "call_function" and (name == missing or name.endswith(ending)):
                *_, (path, _) = node.meta.get("nn_module_stack", {"": ("", None)}).values()
                found[repr(path.removeprefix("network").lstrip("."))] = None
        if found:
            return f"module {', '.join(found)}: "
    return ""


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from writing to the terminal about initialisers that several modules share."""
    logger = logging.getLogger("torch.onnx")
    former = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(former)


def _notes(quant_model: QuantModel, packed: frozenset[str]) -> list[str]:
    """Say where a file's numbers are wider than the scheme's."""
    notes = []
    narrow = {
        layer.weight_quantizer.num_bits
        for name, layer in quant_model.layers.items()
        if layer.weight_quantizer is not None and layer.weight_quantizer.num_bits < 8 and name not in packed
    }
    if narrow:
        notes.append(f"weights of {_listed(narrow)} bits are stored in 8-bit numbers: no smaller file")
    under = {one.num_bits for one in quant_model.quantizers.values() if one.affine and one.num_bits < 8}
    if under:
        notes.append(f"activations of {_listed(under)} bits are 8-bit numbers limited to their grid: no faster")
    others = {quantizer.args.kind for quantizer in quant_model.quantizers.values() if not quantizer.affine}
    if others:
        notes.append(f"activations of kind {', '.join(sorted(others))} are float arithmetic: no faster")
    return notes


def _listed(bits: set[int]) -> str:
    return ", ".join(str(value) for value in sorted(bits))
