"""The stages of every run, and their order."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from synthquant.core.errors import DataError, ModelError, RecipeError, did_you_mean
from synthquant.core.run_folder import RunFolder
from synthquant.core.run_metrics import CheckpointMetrics, ImagesMetrics, SelectMetrics
from synthquant.core.working_folder import size_of
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.data.quality import say_what_was_read, warn_of_suspicious
from synthquant.diffusion.trajectory import Trajectory, is_trajectory
from synthquant.evaluate.agreement import measure_output_sqnr, measure_sqnr
from synthquant.evaluate.data import Data
from synthquant.evaluate.diversity import measure_diversity
from synthquant.evaluate.section import EvaluateSection
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.make import (
    finetune,
    fitted,
    given_images,
    image_bytes,
    quantize,
    require_quantizable,
    require_run,
    select,
    sent,
    synthesize,
)
from synthquant.measure import float_beside_quantized, outputs_and_costs
from synthquant.models.class_labels import classes_of
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import samples_for
from synthquant.nn.coverage import summarize
from synthquant.recipe import FineTuneSection, Recipe, SourceSection, SynthesizeSection
from synthquant.resume import checkpoint_hash, require_recorded
from synthquant.select.sequence import require_supported
from synthquant.select.write import selection_metrics
from synthquant.stages import Run, Stage

_GIVEN = "the images to quantize with"


def stages_of(recipe: Recipe) -> list[Stage]:
    """Return the stages that a recipe asks for, in their order; the report, which reads the record, is not one.

    Raises `RecipeError` if a stage that the recipe adds follows one that there is not.
    """
    stages: list[Stage] = [ModelStage()]
    if isinstance(recipe.images, SynthesizeSection):
        stages.append(ImagesStage(recipe.images))
    elif recipe.images is not None:
        stages.append(GivenImagesStage(recipe.images))
    if recipe.select is not None:
        stages.append(SelectStage())
    tuning = [] if recipe.finetune is None else [FineTuneStage(recipe.finetune)]
    stages += [QuantizeStage(), *tuning, CheckpointStage(), EvaluateStage()]
    pending = list(recipe.added.values())
    while pending:
        names = [one.name for one in stages]
        # one that follows another of them comes once that is there
        stage = next((one for one in pending if one.after in names), pending[0])
        pending.remove(stage)
        for named in (stage.after, stage.kept_by or stage.after):
            if named not in names:
                raise RecipeError(
                    f"the stage {stage.name!r} belongs to {named!r}, which this run does not have;"
                    f"{did_you_mean(named, names)} its stages: {', '.join(names)}"
                )
        stages.insert(names.index(stage.after) + 1, stage)
    return stages


class ModelStage(Stage):
    """Which network this is."""

    name = "model"

    def do(self, run: Run) -> dict[str, Any]:
        """Record it."""
        model = run.model
        return {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "num_classes": model.num_classes,
            "class_names": None if model.class_names is None else list(model.class_names),
            "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
            "preprocess": model.takes.model_dump(mode="json") if isinstance(model.takes, Preprocess) else None,
        }

    def take_up(self, run: Run) -> None:
        """Require that it still is the same one."""
        if run.folder.record.stages["model"].metrics["fingerprint"] != run.model.fingerprint:
            raise ModelError(f"{run.folder.path} was made with other weights of {run.model.name}; choose another --out")


class ImagesStage(Stage):
    """Images made from the network."""

    name = "images"

    def __init__(self, section: SynthesizeSection) -> None:
        self._section = section

    def files(self, folder: RunFolder) -> Path:
        """The image set."""
        return folder.images

    def require_files(self, folder: RunFolder) -> None:
        """Raise `InputError` if images are not as they were made."""
        images = _made_in(folder.images)
        images.verify()
        require_recorded(images.fingerprint, folder.record.metrics("images", ImagesMetrics).fingerprint)

    def space(self, run: Run) -> dict[str, int]:
        """Bytes of the images that are missing."""
        if self.is_done(run.folder):
            return {}
        return {"images": max(0, image_bytes(self._section, run.model) - size_of(run.folder.images))}

    def do(self, run: Run) -> dict[str, Any]:
        """Make them."""
        folder, progress = run.folder, run.progress
        before = folder.record.metrics("images", ImagesMetrics).fingerprint
        run.images = images = synthesize(run.model, self._section, run.recipe.seed, folder.images, progress)
        run.model = fitted(run.model, images)
        if before not in (None, images.fingerprint):
            progress.warn(f"{folder.images} came out otherwise than before; what was made from the images before stays")
        return {
            "method": self._section.method,
            "count": len(images),
            "fingerprint": images.fingerprint,
            "diversity": _diversity(run.model, images),
        }

    def take_up(self, run: Run) -> None:
        """Read them."""
        run.images = _made_in(run.folder.images)
        run.model = fitted(run.model, run.images)


class GivenImagesStage(Stage):
    """Images that exist."""

    name = "images"

    def __init__(self, section: SourceSection) -> None:
        self._section = section

    def do(self, run: Run) -> dict[str, Any]:
        """Choose from them and say what they are."""
        self.take_up(run)
        assert run.images is not None
        source, images = self._section.source, run.images
        found = warn_of_suspicious(images, run.progress, source) if isinstance(images, ImageSet) else {}
        diversity = _diversity(run.model, images)
        return {"method": "given", "source": source, "count": len(images), "diversity": diversity, **found}

    def take_up(self, run: Run) -> None:
        """Choose the same."""
        run.images = given_images(self._section, run.model, run.recipe.seed, run.progress)
        run.model = fitted(run.model, run.images)


class SelectStage(Stage):
    """A choice among the images."""

    name = "select"

    def files(self, folder: RunFolder) -> Path:
        """The image set of those that were chosen."""
        return folder.selected

    def require_files(self, folder: RunFolder) -> None:
        """Raise `InputError` if the choice is not as it was written."""
        images = ImageSet.open(folder.selected)
        images.verify()
        selection_metrics(folder.selected)
        require_recorded(images.fingerprint, folder.record.metrics("select", SelectMetrics).fingerprint)

    def check(self, run: Run) -> None:
        """Raise `UnsupportedModelError` if a filter does not work for the network, or that gives no logits."""
        assert run.recipe.select is not None
        run.model.require_logits()
        require_supported(run.recipe.select.build(), run.model)

    def do(self, run: Run) -> dict[str, Any]:
        """Choose."""
        recipe, pool, folder = run.recipe, run.images, run.folder.selected
        assert recipe.select is not None and isinstance(pool, ImageSet)  # else it was refused before any work
        run.images = kept = select(pool, run.model, recipe.select, recipe.seed, folder, run.progress, real=run.real)
        counts = {"pool": len(pool), "rejected": len(pool) - len(kept), "count": len(kept)}
        return {**counts, "fingerprint": kept.fingerprint, **selection_metrics(folder)}

    def take_up(self, run: Run) -> None:
        """Read the choice."""
        run.images = ImageSet.open(run.folder.selected)


class QuantizeStage(Stage):
    """The quantized network, which is in memory alone until the next stage."""

    name = "quantize"
    kept_by = "checkpoint"

    def check(self, run: Run) -> None:
        """Raise what `require_quantizable` does, and `InputError` if a run is named that does not have the network."""
        if run.recipe.quantize.run is not None and not self.is_done(run.folder):
            require_run(run.model, run.recipe.quantize)
        elif run.recipe.quantize.run is None and not self.is_done(run.folder):
            require_quantizable(run.model, run.recipe.quantize, run.progress)

    def space(self, run: Run) -> dict[str, int]:
        """Bytes of the units: codes take a byte each while the network is quantized."""
        return {} if self.is_done(run.folder) else {"units": max(0, _codes(run) - size_of(run.folder.work))}

    def do(self, run: Run) -> dict[str, Any]:
        """Quantize; units that were learned before a kill are read from the working folder."""
        recipe, images, progress = run.recipe, run.images, run.progress
        run.quant_model, report = quantize(
            run.model,
            recipe.quantize,
            images,
            recipe.seed,
            progress,
            workdir=run.folder.work,
            memory=recipe.memory,
        )
        coverage = run.quant_model.coverage()
        metrics: dict[str, Any] = report.model_dump(mode="json")
        given = recipe.images.source if isinstance(recipe.images, SourceSection) else _GIVEN
        metrics |= say_what_was_read(images, progress, given) if isinstance(images, ImageSet) else {}
        return metrics | {
            "scheme": run.quant_model.scheme.describe(),
            "coverage": [asdict(row) for row in coverage],
            "coverage_summary": asdict(summarize(coverage)),
        }


class FineTuneStage(Stage):
    """The quantized network, trained; the best one is handed on, that of the last step stays beside it."""

    name = "finetune"
    kept_by = "checkpoint"

    def __init__(self, section: FineTuneSection) -> None:
        self._section = section

    def check(self, run: Run) -> None:
        """Raise `UnsupportedModelError` if the network cannot be trained so."""
        self._section.build().check(run.model)

    def space(self, run: Run) -> dict[str, int]:
        """Bytes of the state of training: what is learned, what the optimiser knows of it, the best and the last."""
        if self.is_done(run.folder):
            return {}
        return {"training": max(0, 4 * torch.float32.itemsize * _codes(run) - size_of(self._work(run))) + _codes(run)}

    def do(self, run: Run) -> dict[str, Any]:
        """Train; a training that was killed goes on."""
        quant_model, images, seed = run.quant_model, run.images, run.recipe.seed
        assert quant_model is not None and not isinstance(images, Trajectory)  # a denoiser was refused before any work
        with run.followers.called(lambda: sent(quant_model)):
            tuned = finetune(quant_model, self._section, images, seed, run.progress, workdir=self._work(run))
        run.quant_model = tuned.best
        save_checkpoint(tuned.last, run.folder.last)
        return tuned.report.model_dump(mode="json")

    def _work(self, run: Run) -> Path:
        return run.folder.work / self.name


class CheckpointStage(Stage):
    """The files of the quantized network."""

    name = "checkpoint"

    def files(self, folder: RunFolder) -> Path:
        """The folder of the checkpoint."""
        return folder.checkpoint

    def require_files(self, folder: RunFolder) -> None:
        """Raise `InputError` if the checkpoint is not as it was written."""
        recorded = folder.record.metrics("checkpoint", CheckpointMetrics).weights_sha256
        require_recorded(checkpoint_hash(folder), recorded)

    def space(self, run: Run) -> dict[str, int]:
        """Bytes of the codes, at most one each."""
        return {} if self.is_done(run.folder) else {"checkpoint": _codes(run)}

    def do(self, run: Run) -> dict[str, Any]:
        """Write them."""
        assert run.quant_model is not None
        folder = run.folder
        before = folder.record.metrics("checkpoint", CheckpointMetrics).weights_sha256
        save_checkpoint(run.quant_model, folder.checkpoint)
        found = checkpoint_hash(folder)
        if before != found and folder.is_done("evaluate"):
            run.progress.warn(f"{folder.checkpoint} came out otherwise than before; it is measured again")
            folder.reopen("evaluate", "report")
        return {"weights_sha256": found}

    def take_up(self, run: Run) -> None:
        """Load the network."""
        run.quant_model = load_checkpoint(run.folder.checkpoint, float_model=run.model)


class EvaluateStage(Stage):
    """Float beside quantized, on labelled images, or on those that were used to quantize."""

    name = "evaluate"

    def __init__(self) -> None:
        self._data: Data | None = None

    def check(self, run: Run) -> None:
        """Open the images to measure on; raises `DataError` if labels are missing or no classes of the network.

        Raises `InputError` if the metric cannot be used: it is tried on a few of them.
        """
        section = run.recipe.evaluate
        if section is None:
            return
        data = Data.of(section)
        if run.model.task not in ("classify", "denoise"):
            samples_for(run.model, data.pictures)  # refuses a network that takes no images
        else:
            run.model.require_logits()
            data = data.in_classes_of(classes_of(run.model), run.progress)
            if data.metric is None or data.pictures.labels is not None:
                data.require_labels(run.model, run.progress)
        if not self.is_done(run.folder):
            data.rehearse(run.model)
        self._data, run.real = data, data.pictures

    def do(self, run: Run) -> dict[str, Any]:
        """Measure."""
        section, progress = run.recipe.evaluate, run.progress
        images = run.images if run.real is None else run.real
        if images is None or run.quant_model is None:
            raise DataError("there are no images to measure on; name some as evaluate.data")
        data = self._data or Data(images, _GIVEN)
        found: dict[str, Any]
        if run.model.task == "classify" and isinstance(images, ImageSet):
            labelled = section is not None
            rows, result = float_beside_quantized(run.model, run.quant_model, data, progress, labelled=labelled)
            found = {"count": result.count, "accuracy": rows}
        else:
            outputs = measure_output_sqnr(run.quant_model, images, float_model=run.model)
            for warning in outputs.warnings:
                progress.warn(warning)
            rows = outputs_and_costs(run.quant_model, outputs)
            for row, network in zip(rows, (run.model.module, run.quant_model), strict=True):
                row |= data.measured(network, run.model, progress) if self._data else {}
            found = {"count": len(images), "accuracy": rows, "output_sqnr": asdict(outputs)}
        sqnr = measure_sqnr(run.quant_model, images, float_model=run.model, progress=progress)
        read = say_what_was_read(images, progress, _source(section)) if isinstance(images, ImageSet) else {}
        return read | {
            "data": section.data if section else None,
            **found,
            "sqnr": [row.row() for row in sqnr],
        }


def _made_in(folder: Path) -> ImageSet | Trajectory:
    """What a synthesis method made; raises `DataError` if it is not there or not finished."""
    return Trajectory.open(folder) if is_trajectory(folder) else ImageSet.open(folder)


def _diversity(model: FloatModel, images: ImageSet | Trajectory) -> dict[str, Any] | None:
    return measure_diversity(model, images).row() if isinstance(images, ImageSet) else None


def _source(section: EvaluateSection | None) -> str:
    return section.data if section else _GIVEN


def _codes(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.model.module.parameters())
