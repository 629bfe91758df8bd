"""Run ONNX files: ONNX Runtime and, where it is installed, OpenVINO, both as functions from tensors to tensors.

Imports onnx and onnxruntime, so it is only imported where `require_onnx` has been asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as states
from torch import Tensor

from synthquant.core.errors import MissingExtraError, ModelError
from synthquant.export.flat import FlatFunction
from synthquant.export.onnx.metadata import OnnxMetadata, require_seal

_ERRORS_ONLY = 3
# What onnxruntime raises for a file that it cannot use: its classes have no common base.
_RUNTIME_ERRORS = (
    *(states.EPFail, states.EngineError, states.Fail, states.InvalidArgument, states.InvalidGraph),
    *(states.InvalidProtobuf, states.NoModel, states.NoSuchFile, states.NotImplemented, states.RuntimeException),
)


def read_properties(path: Path) -> dict[str, str]:
    """Return the metadata of an ONNX file, whose hash must fit if it carries one.

    Raises:
        ModelError: there is no such file, it is not ONNX, or it is not as synthquant wrote it.
    """
    if not path.is_file():
        raise ModelError(f"no such file: {path}")
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except (DecodeError, OSError) as error:
        raise ModelError(f"{path} is not an ONNX file: {error}") from error
    properties = {entry.key: entry.value for entry in model.metadata_props}
    require_seal(content, properties, str(path))
    return properties


def read_metadata(path: Path) -> OnnxMetadata:
    """Return what a file of ours says about itself; raises `ModelError` if it is not one of ours, as it was written."""
    return OnnxMetadata.from_properties(read_properties(path), str(path))


def session(
    path: Path,
    *,
    optimized: bool = True,
    threads: int | None = None,
    write_optimized: Path | None = None,
    exact: bool = True,
) -> onnxruntime.InferenceSession:
    """Load a file into ONNX Runtime on the CPU.

    Args:
        path: the file.
        optimized: let the runtime put in integer kernels; otherwise operators run one by one as they are written.
        threads: threads of one operator; none: the runtime's choice.
        write_optimized: where the runtime writes the graph that it really runs.
        exact: keep activations of weight-only layers in float; otherwise these layers may round them to 8 bits, which
            is faster.

    Raises:
        ModelError: the runtime cannot load the file; says why.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    # Else the runtime rewrites int8 activations to uint8, and trips over its own work where a reshape follows.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0" if exact else "4")
    if threads is not None:
        options.intra_op_num_threads = threads
    if write_optimized is not None:
        options.optimized_model_filepath = str(write_optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _RUNTIME_ERRORS as error:
        raise ModelError(f"ONNX Runtime cannot load {path.name}: {error}") from error


def ort_function(loaded: onnxruntime.InferenceSession) -> FlatFunction:
    """Return a session as a function from the tensors that it takes, in order, to those that it gives.

    The function raises `ModelError` where the runtime cannot run the file on them, and says why.
    """
    names = [value.name for value in loaded.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        try:
            return [torch.from_numpy(array) for array in loaded.run(None, given)]
        except _RUNTIME_ERRORS as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in given.items())
            raise ModelError(f"ONNX Runtime cannot run the file on {shapes}: {error}") from error

    return run


def ort_network(loaded: onnxruntime.InferenceSession) -> Callable[[Tensor], Tensor]:
    """Return a session as a function from images `[B, C, H, W]` to logits `[B, classes]`; raises as `ort_function`."""
    function = ort_function(loaded)
    return lambda images: function([images])[0]


def open_network(path: Path, runtime: str, threads: int | None = None) -> tuple[FlatFunction, tuple[str, ...]]:
    """Load a file into one of `Onnx.runtimes`; returns what it computes, and the names of its outputs.

    Raises:
        ModelError: it cannot load the file.
        MissingExtraError: openvino is not installed.
    """
    if runtime == "openvino":
        return _openvino_function(path, threads)
    loaded = session(path, threads=threads)
    return ort_function(loaded), tuple(value.name for value in loaded.get_outputs())


def _openvino_function(path: Path, threads: int | None) -> tuple[FlatFunction, tuple[str, ...]]:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "--runtime openvino") from error
    # On CPUs with bfloat16 units OpenVINO would round what is left in float to 16 bits.
    settings: Mapping[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings = {**settings, "INFERENCE_NUM_THREADS": threads}
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot load {path.name}: {error}") from error

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        outputs = compiled([tensor.detach().cpu().numpy() for tensor in tensors])
        return [torch.from_numpy(array.copy()) for array in outputs.values()]

    return run, tuple(output.any_name for output in compiled.outputs)
