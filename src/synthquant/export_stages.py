"""Stages that a recipe adds behind the measurements: a file for a runtime, and how fast that runs.

quantize: {method: genie_m, target: ort-cpu}
export: {}
benchmark: {threads: 4}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from synthquant.core.errors import InputError, RecipeError
from synthquant.core.files import sha256_file
from synthquant.core.run_folder import RunFolder
from synthquant.core.run_metrics import ExportMetrics
from synthquant.core.settings import Settings
from synthquant.export.write import export_run
from synthquant.make import build
from synthquant.methods import Exporter
from synthquant.resume import require_recorded
from synthquant.runtimes import SpeedTest, exporter_of
from synthquant.stages import STAGES, Run, Stage
from synthquant.targets import exporter_for, require_exportable


@STAGES.register("export")
class ExportStage(Settings, Stage):
    """The quantized network as a file or folder in the run, compared with the network before it is left there."""

    name: ClassVar[str] = "export"
    after: ClassVar[str] = "evaluate"

    target: str | None = None
    """A preset of `synthquant export --to onnx`, or another exporter; none: the target of `quantize`."""
    verify: bool = True
    """Run what was written and compare it with the quantized network."""
    data: str | None = None
    """Images to compare on; none: those that the run quantized with."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of the exporter; written beside `target` in a recipe."""

    @model_validator(mode="before")
    @classmethod
    def _with_settings(cls, values: Any) -> Any:
        """Take what is no field of the stage for one of the exporter."""
        if not isinstance(values, Mapping) or "settings" in values:
            return values
        own = {name: value for name, value in values.items() if name in cls.model_fields}
        return {**own, "settings": {name: value for name, value in values.items() if name not in own}}

    @model_serializer(mode="wrap")
    def _beside(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the exporter's fields beside the stage's."""
        fields: dict[str, Any] = handler(self)
        fields |= fields.pop("settings")
        return fields

    def exporter(self, target: str | None) -> Exporter:
        """Return the exporter for the stage's target or, if it has none, for that of `quantize`.

        Raises:
            RecipeError: neither has one, or the exporter has no such field.
            UnknownNameError: there is no such target.
        """
        target = self.target or target
        if target is None:
            raise RecipeError("export: name a target, such as ort-cpu, as quantize.target or export.target")
        return exporter_for(target, self.settings)

    def files(self, folder: RunFolder) -> Path:
        """The file; of exporters that write folders, `exported`."""
        suffix = self.exporter(folder.record.recipe["quantize"].get("target")).suffix
        return folder.path / (f"model{suffix}" if suffix else "exported")

    def require_files(self, folder: RunFolder) -> None:
        """Raise `InputError` if the file is gone or not as it was written; of folders only that they are there."""
        path, recorded = self.files(folder), folder.record.metrics("export", ExportMetrics).sha256
        if not path.exists():
            raise InputError("it is gone")
        if path.is_file():
            require_recorded(sha256_file(path), recorded)

    def check(self, run: Run) -> None:
        """Raise what `targets.require_exportable` does, for a target of the stage's own."""
        quantize = run.recipe.quantize
        self.exporter(quantize.target)
        if self.target not in (None, quantize.target) and quantize.run is None and not self.is_done(run.folder):
            require_exportable(build(run.model, quantize), str(self.target), run.progress)

    def do(self, run: Run) -> dict[str, Any]:
        """Write it; raises as `export_run`."""
        folder = run.folder
        found = export_run(
            folder.path,
            self.exporter(run.recipe.quantize.target),
            self.files(folder),
            data=self.data,
            verify=self.verify,
            model=run.recipe.model.source,
            progress=run.progress,
        )
        path = Path(found.pop("out"))
        folder.reopen("report", "benchmark")
        return {**found, "file": path.name, "sha256": sha256_file(path) if path.is_file() else None}


@STAGES.register("benchmark")
class BenchmarkStage(SpeedTest, Stage):
    """The file's speed beside that of the float network in the same runtime."""

    name: ClassVar[str] = "benchmark"
    after: ClassVar[str] = "export"

    def check(self, run: Run) -> None:
        """Raise `RecipeError` if no runtime executes what the run exports."""
        written = run.recipe.added["export"].files(run.folder)
        if exporter_of(written) is None:
            raise RecipeError(f"benchmark: no runtime here executes {written.name}; export to a preset such as ort-cpu")

    def do(self, run: Run) -> dict[str, Any]:
        """Measure."""
        path = run.recipe.added["export"].files(run.folder)
        exporter = exporter_of(path)
        assert exporter is not None  # else it was refused before any work
        test = SpeedTest(**self.model_dump())
        run.folder.reopen("report")
        return exporter.benchmark(path, test, model=run.recipe.model.source, progress=run.progress)
