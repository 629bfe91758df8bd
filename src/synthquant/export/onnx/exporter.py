"""ONNX files as an exporter of the registry; what needs onnx and its runtimes is imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from synthquant.core.errors import MissingExtraError, ModelError, UnknownNameError
from synthquant.core.files import write_bytes
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.core.version import package_version
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.export.checkpoint import checkpoint_hash
from synthquant.export.deploy import require_takes
from synthquant.export.onnx.metadata import OnnxMetadata, seal
from synthquant.export.presets import find_preset
from synthquant.export.quant_config import float_model_entry
from synthquant.methods import EXPORTERS
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel
from synthquant.runtimes import ExportedNetwork, SpeedTest

_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@EXPORTERS.register("onnx")
class Onnx(Settings):
    """ONNX file with integer weights, for ONNX Runtime, TensorRT and OpenVINO."""

    suffix: ClassVar[str] = ".onnx"
    runtimes: ClassVar[tuple[str, ...]] = ("onnxruntime", "openvino")

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
        from synthquant.export.onnx import graph
        from synthquant.export.onnx.build import build_graph

        path, takes = Path(path), quant_model.float_model.takes
        model, notes = build_graph(quant_model, find_preset(self.preset))
        metadata = OnnxMetadata(
            synthquant_version=package_version(),
            preset=self.preset,
            scheme=quant_model.scheme,
            scheme_summary=quant_model.scheme.describe(),
            quantized_layers=sum(layer.weight_quantizer is not None for layer in quant_model.layers.values()),
            preprocess=takes if isinstance(takes, Preprocess) else None,
            float_model=float_model_entry(quant_model.float_model),
            checkpoint_sha256=checkpoint_hash(quant_model),
            notes=notes,
            origin=dict(origin or {}),
        )
        graph.finish(
            model, producer="synthquant", version=metadata.synthquant_version, metadata=metadata.to_properties()
        )
        write_bytes(path, seal(graph.to_bytes(model)))
        return path

    def check(self, quant_model: QuantModel) -> None:
        """Raise `SchemeError` unless the preset can express the scheme, whatever ranges turn out to be; names the part.

        The network need not be calibrated, and no package is needed.
        """
        require_takes(quant_model, find_preset(self.preset))

    def rehearse(self, quant_model: QuantModel) -> None:
        """Build the graph of a network of some ranges and drop it; raises as `export`, before anything was made."""
        require_onnx()
        from synthquant.export.onnx.build import build_graph

        build_graph(quant_model, find_preset(self.preset))

    def verify(
        self, quant_model: QuantModel, path: Path | str, images: ImageSet | Samples, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        """Load the file in ONNX Runtime and compare it with the quantized network on `images`.

        Raises:
            VerificationError: the file is not valid, or differs by more than the settings allow; says by how much.
        """
        require_onnx()
        from synthquant.export.onnx.verify import verify_onnx

        return verify_onnx(
            quant_model,
            Path(path),
            images,
            count=self.images,
            min_agreement=self.min_agreement,
            max_mean_error=self.max_mean_error,
            progress=progress,
        )

    @classmethod
    def open(cls, path: Path, runtime: str | None = None, *, threads: int | None = None) -> ExportedNetwork:
        """Load a file in ONNX Runtime or, where it is installed, OpenVINO, on the CPU.

        Raises:
            ModelError: there is no such file, it is not one of ours as it was written, or the runtime cannot load it.
            UnknownNameError: there is no such runtime.
            MissingExtraError: the runtime is not installed.
        """
        runtime = runtime or cls.runtimes[0]
        if runtime not in cls.runtimes:
            raise UnknownNameError("runtime", runtime, cls.runtimes)
        require_onnx()
        from synthquant.export.onnx.runtime import open_network, read_metadata

        found = read_metadata(path)
        entry = found.float_model
        if found.preprocess is None:
            raise ModelError(f"{path} holds {entry.name}, which takes no images; run it in the runtime itself")
        function, outputs = open_network(path, runtime, threads)
        return ExportedNetwork(
            function=function,
            outputs=outputs,
            task=entry.task,
            preprocess=found.preprocess,
            scheme=found.scheme,
            name=entry.name,
            source=entry.source,
            fingerprint=entry.fingerprint,
            num_classes=entry.num_classes,
            class_names=entry.class_names,
        )

    @classmethod
    def benchmark(
        cls,
        path: Path,
        test: SpeedTest,
        *,
        model: str | None = None,
        trust_code: bool = False,
        progress: Progress = QUIET,
    ) -> dict[str, Any]:
        """Measure a file in ONNX Runtime beside the float export of the same architecture, see `speed.measure_speed`.

        Raises:
            ModelError: the file is not one of ours, its architecture cannot be built again, or it names code.
            MissingExtraError: a package is not installed.
        """
        require_onnx()
        from synthquant.export.onnx.speed import measure_speed

        return measure_speed(path, test, model=model, trust_code=trust_code, progress=progress)


def require_onnx() -> None:
    """Raise `MissingExtraError` unless all packages of the extra `onnx` are installed."""
    for package in _PACKAGES:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "onnx", "ONNX files") from error
