"""From a quantized network to an ONNX graph: torch's exporter and the passes behind it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from synthquant.core.errors import UnsupportedModelError
from synthquant.export.deploy import OPSET, Symbols, deploy, packed_layers
from synthquant.export.flat import FlatNetwork, constant_batch, dynamic_shapes, input_names, output_names
from synthquant.export.presets import Preset
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel

if TYPE_CHECKING:
    import onnx_ir as ir

# How torch names an operator that it has no ONNX form for.
_OPERATOR = re.compile(r"op='([\w.]+)', overload='(\w+)'")


def build_graph(quant_model: QuantModel, preset: Preset) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the ONNX graph of a quantized network, and what is worth knowing about it, a line each."""
    from synthquant.export.onnx import bias, graph, moves

    packed = packed_layers(quant_model, preset)
    float_model = quant_model.float_model
    model = export_module(deploy(quant_model, preset, Symbols()).module, float_model)
    graph.merge_duplicates(model)
    graph.name_nodes(model)
    graph.name_ends(model, input_names(float_model), output_names(float_model))
    if quant_model.splits:
        moves.undo_joins(model)
    if preset.runs_integers:
        graph.pool_by_name(model)
    if preset.moves_codes:
        moves.move_codes(model)
    coarser = bias.quantize_biases(model, preset)
    graph.pack_weights(model)
    notes = _notes(quant_model, packed)
    if coarser:
        notes.append(f"bias beyond 32 bits, weight made coarser in: {', '.join(coarser)}")
    return model, tuple(notes)


def export_module(module: torch.nn.Module, float_model: FloatModel) -> ir.Model:
    """Run torch's exporter on a module that takes what `float_model` does, with a dynamic batch.

    Inputs of the graph are the tensors that vary with the samples, outputs all tensors that the module gives.

    Raises:
        UnsupportedModelError: an operation has no ONNX form; names it, and the module where it stands. Or the network
            works for one size of the batch only.
    """
    takes = float_model.example(2).to(torch.device("cpu"))
    network, example, shapes = FlatNetwork(module, takes), tuple(takes.tensors), dynamic_shapes(takes)
    with _quiet_exporter():
        try:
            program = torch.onnx.export(
                network,
                example,
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
    if any(value.shape is None or isinstance(value.shape[0], int) for value in program.model.graph.inputs):
        raise constant_batch(float_model.name)
    return program.model


def _innermost(error: BaseException) -> str:
    """The first line of the innermost error of torch's exporter: the operation and the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}"


def _modules_with(
    operator: re.Match[str] | None, network: torch.nn.Module, example: tuple[torch.Tensor, ...], shapes: Any
) -> str:
    """Say in which modules an operator stands, as the start of a message; empty where it is not found."""
    if operator is None:
        return ""
    program = torch.export.export(network, example, dynamic_shapes=shapes)
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
