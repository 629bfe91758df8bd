"""Finished units on disk, so that a killed reconstruction goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from synthquant.core.errors import DataError
from synthquant.core.files import sha256_bytes, write_bytes
from synthquant.methods import UnitReport
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.layers import QuantLayer

Parts = tuple[Sequence[QuantLayer], Sequence[ActivationQuantizer]]


@dataclass(frozen=True)
class Snapshot:
    """What learning may change in a unit: codes and scales of its layers, grids of its activation quantizers."""

    tensors: dict[str, torch.Tensor]

    @torch.no_grad()
    def restore(self, layers: Sequence[QuantLayer], quantizers: Sequence[ActivationQuantizer]) -> None:
        """Put everything back."""
        for index, layer in enumerate(layers):
            if layer.weight_quantizer is not None:
                layer.weight_quantizer.codes.copy_(self.tensors[f"layer.{index}.codes"])
                layer.weight_quantizer.scale.copy_(self.tensors[f"layer.{index}.scale"])
        for index, quantizer in enumerate(quantizers):
            scale, zero_point = self.tensors[f"quantizer.{index}.scale"], self.tensors[f"quantizer.{index}.zero_point"]
            quantizer.set_grid(scale.to(quantizer.scale.device), zero_point.to(quantizer.scale.device))


def snapshot(layers: Sequence[QuantLayer], quantizers: Sequence[ActivationQuantizer]) -> Snapshot:
    """Copy a unit's state."""
    tensors = {}
    for index, layer in enumerate(layers):
        if layer.weight_quantizer is not None:
            tensors[f"layer.{index}.codes"] = layer.weight_quantizer.codes.clone()
            tensors[f"layer.{index}.scale"] = layer.weight_quantizer.scale.clone()
    for index, quantizer in enumerate(quantizers):
        tensors[f"quantizer.{index}.scale"] = quantizer.scale.detach().clone()
        tensors[f"quantizer.{index}.zero_point"] = quantizer.zero_point.clone()
    return Snapshot(tensors)


def finite(value: float) -> float | None:
    """A loss as reports keep it: none if it is not finite."""
    return value if math.isfinite(value) else None


class UnitFiles:
    """One safetensors file for each finished unit of a phase, its report in the metadata."""

    def __init__(self, workdir: Path | None, phase: str, made_from: Callable[[], Iterable[object]]) -> None:
        """Keep files in `workdir / phase`; without a folder nothing is kept.

        Args:
            workdir: where the phases keep their files.
            phase: name of the phase.
            made_from: everything that decides what a unit becomes; called if there is a folder.
        """
        self._folder = None if workdir is None else workdir / phase
        self._key = "" if workdir is None else sha256_bytes(repr(tuple(made_from())).encode())

    def load(self, index: int, parts: Parts) -> UnitReport | None:
        """Restore a unit if its file is there; returns its report.

        Raises:
            DataError: it was made from another network, other images, settings or seed.
        """
        path = self._path(index)
        if path is None or not path.exists():
            return None
        with safe_open(path, "pt") as file:
            report, key = file.metadata()["report"], file.metadata()["made_from"]
            if key != self._key:
                raise DataError(
                    f"{path.parent} holds units of another run (another network, other images, settings or seed);"
                    " give an empty folder, or remove this one"
                )
            Snapshot({name: file.get_tensor(name) for name in file.keys()}).restore(*parts)  # noqa: SIM118
        return UnitReport.model_validate_json(report)

    def save(self, index: int, parts: Parts, report: UnitReport) -> None:
        """Keep a finished unit, atomically."""
        path = self._path(index)
        if path is not None:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in snapshot(*parts).tensors.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"report": report.model_dump_json(), "made_from": self._key}
            write_bytes(path, save(tensors, metadata=metadata))

    def _path(self, index: int) -> Path | None:
        return None if self._folder is None else self._folder / f"unit-{index:04d}.safetensors"
