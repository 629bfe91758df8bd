"""Finished units on disk, so that a killed reconstruction goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from synthquant.core.errors import DataError, InputError
from synthquant.core.files import sha256_bytes
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import UnitReport
from synthquant.core.tensor_file import TensorFile, digest_of, read_sealed_tensors, write_sealed_tensors
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.layers import QuantLayer

Parts = tuple[Sequence[QuantLayer], Sequence[ActivationQuantizer]]


@dataclass(frozen=True)
class Snapshot:
    """What a method may change in a unit: codes and scales of its layers, grids of its activation quantizers.

    Zero points and biases of the layers are among it for methods that change them.
    """

    tensors: dict[str, torch.Tensor]

    @torch.no_grad()
    def restore(self, layers: Sequence[QuantLayer], quantizers: Sequence[ActivationQuantizer]) -> None:
        """Put everything back."""
        for index, layer in enumerate(layers):
            if layer.weight_quantizer is not None:
                layer.weight_quantizer.load_codes(self.tensors[f"layer.{index}.codes"])
                layer.weight_quantizer.scale.copy_(self.tensors[f"layer.{index}.scale"])
                if (zero_point := self.tensors.get(f"layer.{index}.zero_point")) is not None:
                    layer.weight_quantizer.zero_point.copy_(zero_point)
            if (bias := self.tensors.get(f"layer.{index}.bias")) is not None:
                layer.set_bias(bias.to(layer.float_weight))
        for index, quantizer in enumerate(quantizers):
            quantizer.load_grid({name: self.tensors[f"quantizer.{index}.{name}"] for name in quantizer.grid()})


def snapshot(
    layers: Sequence[QuantLayer], quantizers: Sequence[ActivationQuantizer], *, offsets: bool = False
) -> Snapshot:
    """Copy a unit's state; with `offsets` zero points of weights and corrected biases too."""
    tensors = {}
    for index, layer in enumerate(layers):
        if layer.weight_quantizer is not None:
            tensors[f"layer.{index}.codes"] = layer.weight_quantizer.codes.clone()
            tensors[f"layer.{index}.scale"] = layer.weight_quantizer.scale.clone()
            if offsets:
                tensors[f"layer.{index}.zero_point"] = layer.weight_quantizer.zero_point.clone()
        if offsets and layer.float_bias is not None:
            tensors[f"layer.{index}.bias"] = layer.bias.detach().clone()
    for index, quantizer in enumerate(quantizers):
        tensors |= {f"quantizer.{index}.{name}": tensor.clone() for name, tensor in quantizer.grid().items()}
    return Snapshot(tensors)


def finite(value: float) -> float | None:
    """A loss as reports keep it: none if it is not finite."""
    return value if math.isfinite(value) else None


class UnitFiles:
    """One sealed safetensors file for each finished unit of a phase, its report in the metadata.

    A unit follows from those before it: each file says, by a hash, what the units before it became. One that is
    missing, damaged or of other units before it is learned again.
    """

    def __init__(
        self,
        workdir: Path | None,
        phase: str,
        made_from: Callable[[], Iterable[object]],
        *,
        after: str = "",
        offsets: bool = False,
        progress: Progress = QUIET,
    ) -> None:
        """Keep files in `workdir / phase`; without a folder nothing is kept.

        Args:
            workdir: where the phases keep their files.
            phase: name of the phase.
            made_from: everything that decides what the units become; called if there is a folder.
            after: `outcome` of the phase before.
            offsets: zero points of weights and biases are changed too.
            progress: told of files that cannot be used.
        """
        self._folder = None if workdir is None else workdir / phase
        self._key = "" if workdir is None else sha256_bytes(repr(tuple(made_from())).encode())
        self._progress = progress
        self._offsets = offsets
        self.outcome = after
        """Hash of what the units up to here became, those of earlier phases included."""

    def load_all(self, parts: Sequence[Parts]) -> list[UnitReport] | None:
        """Restore all units if they are there as they were learned, one after the other; else none of them.

        Raises `DataError` as `load` does.
        """
        outcome, there = self.outcome, []
        for index in range(len(parts)):
            try:
                found = self._read(index)
            except InputError:
                continue  # `load` tells
            self._require_same_run(found)
            if found is not None and found.texts["after"] == outcome:
                outcome = _follow(outcome, found.tensors)
                there.append(index)
        if len(there) < len(parts):
            return None
        return [report for index in there if (report := self.load(index, parts[index])) is not None]

    def load(self, index: int, parts: Parts) -> UnitReport | None:
        """Restore a unit if its file is there; those before it have been loaded or saved. Returns its report.

        Raises:
            DataError: it was made from another network, other images, settings or seed.
        """
        path = self._path(index)
        try:
            found = self._read(index)
        except InputError:
            self._progress.warn(f"{path} is not as it was written (its hash does not fit); it is learned again")
            return None
        self._require_same_run(found)
        if found is None:
            if path is not None and any(later > path for later in path.parent.glob("unit-*.safetensors")):
                self._progress.warn(f"{path} is missing, but units after it are there; it is learned again")
            return None
        if found.texts["after"] != self.outcome:
            self._progress.warn(f"{path} was learned after other units than those before it; it is learned again")
            return None
        Snapshot(dict(found.tensors)).restore(*parts)
        self.outcome = _follow(self.outcome, found.tensors)
        return UnitReport.model_validate_json(found.texts["report"])

    def save(self, index: int, parts: Parts, report: UnitReport) -> None:
        """Keep a finished unit, atomically; those before it have been loaded or saved."""
        path = self._path(index)
        if path is not None:
            tensors = snapshot(*parts, offsets=self._offsets).tensors
            texts = {"report": report.model_dump_json(), "made_from": self._key, "after": self.outcome}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed_tensors(path, tensors, texts)
            self.outcome = _follow(self.outcome, tensors)

    def _read(self, index: int) -> TensorFile | None:
        path = self._path(index)
        return None if path is None or not path.exists() else read_sealed_tensors(path)

    def _require_same_run(self, found: TensorFile | None) -> None:
        if found is not None and found.texts["made_from"] != self._key:
            raise DataError(
                f"{self._folder} holds units of another run (another network, other images, settings or seed);"
                " give an empty folder, or remove this one"
            )

    def _path(self, index: int) -> Path | None:
        return None if self._folder is None else self._folder / f"unit-{index:04d}.safetensors"


def _follow(outcome: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return sha256_bytes(f"{outcome} {digest_of(tensors)}".encode())
