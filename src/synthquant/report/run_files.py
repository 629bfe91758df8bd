"""The files of a run folder, as the report reads them: everything is optional, nothing wrong is skipped silently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from synthquant.core.errors import InputError
from synthquant.core.files import read_sealed_json
from synthquant.core.record import RunRecord, StageRecord
from synthquant.nn.coverage import CoverageSummary

_Row = TypeVar("_Row", bound="Row")
_Value = TypeVar("_Value")
_STAGES = ("model", "images", "select", "quantize", "checkpoint", "evaluate")


class Row(BaseModel):
    """A row of a table in `run.json`; keys that the report does not know are for other readers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class AccuracyRow(Row):
    """One network on the evaluation images; shares are 0..1."""

    name: str
    count: int | None = None
    top1: float | None = None
    top5: float | None = None
    interval: tuple[float, float] | None = None
    agreement: float | None = None
    kl: float | None = None
    recovery: float | None = None
    size_bytes: float | None = None
    bit_operations: float | None = None
    seconds: float | None = None


class UnitRow(Row):
    """One reconstruction unit with its sampled loss curve."""

    name: str
    loss_start: float | None = None
    loss_end: float | None = None
    undecided: float | None = None
    diverged: bool = False
    seconds: float | None = None
    steps: tuple[int, ...] = ()
    losses: tuple[float | None, ...] = ()


class SqnrRow(Row):
    """Signal-to-quantization-noise ratios of one layer [dB]."""

    name: str
    weights: float | None = None
    activations: float | None = None
    alone: float | None = None
    cumulative: float | None = None


class CoverageRow(Row):
    """What became of one layer, or of a weight or a matrix product outside of layers."""

    name: str
    kind: str = ""
    weight_bits: int | None = None
    input_bits: int | None = None
    parameters: int | None = None
    macs: int | None = None
    reason: str | None = None


class SetAside(Row):
    """An image that was not used."""

    name: str
    reason: str


class RunFiles:
    """A run folder opened for reading.

    Raises:
        InputError: there is no readable `run.json`, or one of its tables has a wrong value.
    """

    def __init__(self, folder: Path, label: str) -> None:
        if not (folder / "run.json").is_file():
            raise InputError(
                f"{folder} is not a run folder: it has no run.json; give a folder that `synthquant run` made"
            )
        self.folder = folder
        self.label = label
        self.record = RunRecord.load(folder / "run.json")
        self.accuracy = self._rows("evaluate", "accuracy", AccuracyRow)
        self.sqnr = self._rows("evaluate", "sqnr", SqnrRow)
        self.set_aside = self._rows("evaluate", "set_aside", SetAside)
        self.units = self._rows("quantize", "units", UnitRow)
        self.coverage = self._rows("quantize", "coverage", CoverageRow)
        self.coverage_summary = self._read("quantize", "coverage_summary", CoverageSummary)
        config = folder / "model" / "quant_config.json"
        self.quant_config: dict[str, Any] = {}
        if config.is_file():
            self.quant_config = read_sealed_json(config, unsealed={"format_version": 1})

    def value(self, stage: str, key: str) -> Any:
        """Return one metric of a stage, or none."""
        record = self.record.stages.get(stage)
        return None if record is None else record.metrics.get(key)

    def text(self, stage: str, key: str) -> str | None:
        """Return one metric of a stage as text, or none."""
        value = self.value(stage, key)
        return None if value is None else str(value)

    @property
    def stages(self) -> list[tuple[str, StageRecord]]:
        """Stages in the order they ran; not the report, which is being written."""
        known = {name: rank for rank, name in enumerate(_STAGES)}
        ordered = sorted(self.record.stages.items(), key=lambda item: known.get(item[0], len(known)))
        return [(name, stage) for name, stage in ordered if name != "report"]

    @property
    def images_folder(self) -> Path | None:
        """The image set of the run, if it has one."""
        folder = self.folder / "images"
        return folder if (folder / "manifest.json").is_file() else None

    @property
    def selected_folder(self) -> Path | None:
        """The images chosen from the pool, if the run chose."""
        folder = self.folder / "selected"
        return folder if (folder / "selection.json").is_file() else None

    @property
    def scheme(self) -> str | None:
        """The scheme with its rule for the first and last layer."""
        return self.text("quantize", "scheme") or self.quant_config.get("scheme_summary")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the network, if it knows them."""
        names = self.value("model", "class_names") or self.quant_config.get("float_model", {}).get("class_names") or ()
        return tuple(str(name) for name in names)

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML."""
        path = self.folder / "recipe.yaml"
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
        return yaml.safe_dump(self.record.recipe, sort_keys=False) if self.record.recipe else ""

    def missing(self) -> list[str]:
        """Name the parts of the page that this run has no data for."""
        parts = {
            "accuracy": self.accuracy,
            "per-layer SQNR": self.sqnr,
            "coverage": self.coverage,
            "loss curves": [unit for unit in self.units if unit.losses],
            "images": self.images_folder or self.value("images", "source"),
            "recipe": self.recipe_text,
            "environment": self.record.environment,
        }
        return [name for name, value in parts.items() if not value]

    def _rows(self, stage: str, key: str, kind: type[_Row]) -> list[_Row]:
        return self._read(stage, key, list[kind]) or []  # type: ignore[valid-type]  # the row class is a variable

    def _read(self, stage: str, key: str, kind: type[_Value]) -> _Value | None:
        """A metric of a stage as what it should be; none if the run has none."""
        value = self.value(stage, key)
        if value is None:
            return None
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(str(part) for part in ("stages", stage, "metrics", key, *detail["loc"]))
            raise InputError(f"{self.folder / 'run.json'}: {where}: {detail['msg']}") from error


def open_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Open run folders, each under the shortest end of its path that tells it from the others."""
    if not folders:
        raise InputError("no run folder given: a report needs at least one")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise InputError("a run folder is given twice: name each once")
    return [RunFiles(folder, label) for folder, label in zip(folders, _labels(resolved), strict=True)]


def differing_settings(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the recipe keys, dotted, whose values are not the same in all runs, with each run's value."""
    flat = [_flatten(run.record.recipe) | {"seed": str(run.record.seed)} for run in runs]
    keys = sorted({key for values in flat for key in values})
    rows = [(key, [values.get(key, "\u2013") for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: str(value)}


def _labels(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
