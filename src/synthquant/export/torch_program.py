"""A quantized network as a `torch.export` program: integer weights, plain tensor arithmetic, no synthquant needed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from synthquant.core.files import write_bytes
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.export.compare import require_close, row, run_beside
from synthquant.export.deploy import Arithmetic, deploy, require_stateless
from synthquant.export.flat import FlatFunction, FlatNetwork, dynamic_shapes, flat_output
from synthquant.export.float_graph import TRACING_ERRORS, unfollowed
from synthquant.export.presets import find_preset
from synthquant.methods import EXPORTERS
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel


@EXPORTERS.register("torch")
class TorchProgram(Settings):
    """`torch.export` program (.pt2) with integer weights, which computes as the quantized network does."""

    suffix: ClassVar[str] = ".pt2"

    images: int = Field(default=128, ge=1)
    """Verification: how many images to use, evenly spaced over the set."""

    def export(self, quant_model: QuantModel, path: Path | str, *, origin: Mapping[str, str] | None = None) -> Path:
        """Write the program and return `path`; `origin` goes into the file beside it.

        Raises:
            ModelError: activation ranges are not calibrated.
            UnsupportedModelError: `torch.export` cannot follow the network; says why.
            OutputError: the file cannot be written.
        """
        path, buffer = Path(path), io.BytesIO()
        torch.export.save(export_program(quant_model), buffer, extra_files={"origin.txt": _text(origin or {})})
        write_bytes(path, buffer.getvalue())
        return path

    def check(self, quant_model: QuantModel) -> None:
        """Raise `SchemeError` if the network is modulated; every other scheme has a program."""
        require_stateless(quant_model)

    def rehearse(self, quant_model: QuantModel) -> None:
        """Build the program of a network of some ranges and drop it; raises as `export`, before anything was made."""
        export_program(quant_model)

    def verify(
        self, quant_model: QuantModel, path: Path | str, images: ImageSet | Samples, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        """Load the program and compare it with the quantized network; only float rounding may differ.

        Raises:
            VerificationError: it differs by more.
        """
        network = torch.export.load(path).module()
        networks: dict[str, FlatFunction] = {"loaded": lambda tensors: flat_output(network(*tensors))}
        beside = run_beside(quant_model, networks, images, self.images, progress)
        found = beside.differences("loaded")
        require_close(found, "the program", beside.count, min_agreement=0.99, max_mean_error=0.01)
        return {beside.noun: beside.count, "loaded": row(found)}


def export_program(quant_model: QuantModel) -> torch.export.ExportedProgram:
    """Return the deployed network as a program with a dynamic batch; raises as `TorchProgram.export`."""
    takes = quant_model.float_model.example(2).to(torch.device("cpu"))
    module = FlatNetwork(deploy(quant_model, find_preset("simulate"), Arithmetic()).module, takes)
    try:
        return torch.export.export(module, tuple(takes.tensors), dynamic_shapes=dynamic_shapes(takes))
    except TRACING_ERRORS as error:
        raise unfollowed(quant_model.float_model.name, error) from error


def _text(values: Mapping[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in sorted(values.items()))
