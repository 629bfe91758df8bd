"""The files of a run folder, as the report reads them: everything is optional, nothing wrong is skipped silently."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from synthquant.core.errors import InputError
from synthquant.core.files import read_sealed_json
from synthquant.core.quality_file import read_quality
from synthquant.core.record import RunRecord, StageRecord
from synthquant.core.run_metrics import (
    METRICS,
    BenchmarkMetrics,
    EvaluateMetrics,
    ExportMetrics,
    FineTuneMetrics,
    HeldOutMetrics,
    ImagesMetrics,
    QuantizeMetrics,
    Row,
)
from synthquant.diffusion.trajectory import is_trajectory
from synthquant.nn.coverage import CoverageSummary

_Value = TypeVar("_Value")


class _FloatNetwork(Row):
    class_names: tuple[str, ...] | None = None


class _Checkpoint(Row):
    """What the page needs of `quant_config.json`."""

    scheme_summary: str | None = None
    preprocess: dict[str, Any] | None = None
    float_model: _FloatNetwork = _FloatNetwork()


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
        evaluation = self.record.metrics("evaluate", EvaluateMetrics)
        quantization = self.record.metrics("quantize", QuantizeMetrics)
        self.diversity = self.record.metrics("images", ImagesMetrics).diversity
        self.accuracy = evaluation.accuracy or ()
        self.sqnr = evaluation.sqnr
        self.outputs = evaluation.output_sqnr
        self.set_aside = evaluation.set_aside
        self.units = quantization.units
        self.coverage = quantization.coverage
        self.finetune = self.record.metrics("finetune", FineTuneMetrics)
        self.file = self.record.metrics("export", ExportMetrics)
        self.held_out = self.record.metrics("held_out", HeldOutMetrics)
        self.speed = self.record.metrics("benchmark", BenchmarkMetrics)
        self.quality = read_quality(folder)
        summary = quantization.coverage_summary
        self.coverage_summary = summary and CoverageSummary(**summary.model_dump())
        config = folder / "model" / "quant_config.json"
        self.checkpoint = _Checkpoint()
        if config.is_file():
            self.checkpoint = _read(config, "", read_sealed_json(config, unsealed={"format_version": 1}), _Checkpoint)

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
        return [(name, self.record.stages[name]) for name in METRICS if name in self.record.stages and name != "report"]

    @property
    def images_folder(self) -> Path | None:
        """The image set of the run, if it has one."""
        folder = self.folder / "images"
        return folder if (folder / "manifest.json").is_file() else None

    @property
    def trajectory_folder(self) -> Path | None:
        """The trajectory of the run, if it made one."""
        folder = self.folder / "images"
        return folder if is_trajectory(folder) else None

    @property
    def selected_folder(self) -> Path | None:
        """The images chosen from the pool, if the run chose."""
        folder = self.folder / "selected"
        return folder if (folder / "selection.json").is_file() else None

    @property
    def scheme(self) -> str | None:
        """The scheme with its rule for the first and last layer."""
        return self.text("quantize", "scheme") or self.checkpoint.scheme_summary

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the network, if it knows them."""
        names = self.value("model", "class_names") or self.checkpoint.float_model.class_names or ()
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
            "images": self.images_folder or self.trajectory_folder or self.value("images", "source"),
            "recipe": self.recipe_text,
            "environment": self.record.environment,
        }
        return [name for name, value in parts.items() if not value]


def _read(path: Path, where: str, value: object, kind: type[_Value]) -> _Value:
    """What a JSON file says at one place, as what it should be."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        detail = error.errors()[0]
        raise InputError(
            f"{path}: {'.'.join(str(part) for part in (where, *detail['loc']) if part != '')}: {detail['msg']}"
        ) from error


def open_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Open run folders, each under the shortest end of its path that tells it from the others."""
    if not folders:
        raise InputError("no run folder given: a report needs at least one")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise InputError("a run folder is given twice: name each once")
    return [RunFiles(folder, label) for folder, label in zip(folders, _labels(resolved), strict=True)]


def settings_of(run: RunFiles) -> dict[str, str]:
    """Return the settings of the run's recipe by dotted name, as text."""
    return _flatten(run.record.recipe) | {"seed": str(run.record.seed)}


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value if isinstance(value, str) else json.dumps(value)}  # null and true, as a recipe says it


def _labels(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
