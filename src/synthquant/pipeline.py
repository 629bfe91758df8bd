"""The whole flow: open the network, get images, choose from them, quantize, measure, write everything down.

A run is a folder. Each finished stage is marked in its `run.json`, and the same call on the same folder goes on after
the last finished part, unit or stage.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from synthquant.core.device import resolve_device
from synthquant.core.errors import DataError, InputError, ModelError
from synthquant.core.files import require_outside, sha256_file
from synthquant.core.progress import QUIET, Progress
from synthquant.core.record import RunRecord
from synthquant.core.rng import Rng
from synthquant.core.run_folder import RunFolder
from synthquant.core.run_metrics import CheckpointMetrics, ImagesMetrics
from synthquant.core.working_folder import require_space, size_of, working_folder
from synthquant.data.image_set import ImageSet
from synthquant.data.quality import say_what_was_read, warn_of_suspicious
from synthquant.data.store import JOURNAL_NAME
from synthquant.distributed.ray_workers import RayWorkers
from synthquant.evaluate.agreement import measure_sqnr
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.onnx import Onnx
from synthquant.measure import float_beside_quantized
from synthquant.methods import MemoryBudget, QuantReport
from synthquant.models.class_labels import classes_of, in_classes_of
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.nn.coverage import summarize
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.bias_correction import correct_biases
from synthquant.quantize.equalize import equalized
from synthquant.recipe import EvaluateSection, QuantizeSection, Recipe, SelectSection, SourceSection, SynthesizeSection
from synthquant.report.html import write_report
from synthquant.resume import RECIPE_NAME, checkpoint_hash, take_back_what_is_gone, write_recipe
from synthquant.select.sequence import require_supported
from synthquant.select.write import selection_metrics, write_selection
from synthquant.synthesize.batches import image_form, open_writer

STAGES = ("model", "images", "quantize", "checkpoint", "evaluate", "report")
"""The stages of every run in order, as `run.json` names them; `select` comes after `images` where a recipe has it."""

# Settings that say where a run is computed, not what it computes.
_PLACE = ("device", "memory.device_gib", "memory.host_gib")
# Files that hold nothing but what was asked for.
_WORTHLESS = (RECIPE_NAME, "run.json")


def run(recipe: Recipe, out: str | Path, progress: Progress = QUIET) -> RunRecord:
    """Do what `recipe` says and leave everything in the folder `out`; called again, do what is missing there.

    Raises:
        InputError: the recipe names something that does not exist or does not fit together, or `out` holds another
            run. If nothing of value was made until then, no folder is left behind.
        OutputError: `out` cannot be written, the disk is full, or another process works there. What is finished stays.
        MissingExtraError: a package is missing that the network or the images need.
    """
    device = resolve_device(recipe.device)
    given = recipe.images.source if isinstance(recipe.images, SourceSection) else None
    require_outside(Path(out), (given, recipe.evaluate.data if recipe.evaluate else None))
    with working_folder(Path(out), _WORTHLESS):
        folder = RunFolder(Path(out), recipe.resolved(), device=device, seed=recipe.seed, place=_PLACE)
        take_back_what_is_gone(folder, recipe, progress)
        stages = [*STAGES, *(["select"] if recipe.select else [])]
        if folder.is_done(*stages):
            progress.say(f"{out}: this run is finished; its results are read from there")
        elif not folder.is_done(*(name for name in stages if name != "report")):
            _do_stages(folder, recipe, device, progress)
        write_recipe(folder, recipe)
        if not folder.is_done("report"):
            with folder.stage("report") as metrics:
                write_report([folder.path], folder.report, progress)
                metrics["sha256"] = sha256_file(folder.report)
        shutil.rmtree(folder.work, ignore_errors=True)
        return folder.record


def _do_stages(folder: RunFolder, recipe: Recipe, device: str, progress: Progress) -> None:
    """Check all that can be known before any work, then do the stages that are not done."""
    model = open_model(recipe.model, device=device, progress=progress)
    real = None
    if recipe.evaluate is not None:
        real = in_classes_of(recipe.evaluate.open(), classes_of(model), recipe.evaluate.data, progress)
        _require_labels(real, recipe.evaluate.data, model, progress)
    if recipe.select is not None:
        require_supported(recipe.select.build(), model)
    if recipe.quantize.export_preset is not None and not folder.is_done("checkpoint"):
        _build(model, recipe.quantize)
    require_space(folder.path, _space(folder, recipe, model))
    write_recipe(folder, recipe)
    _note_model(folder, model)
    images = _get_images(folder, recipe.images, model, recipe.seed, progress)
    images = _select(folder, recipe, model, images, real, progress)
    quant_model = _quantize(folder, recipe, model, images, progress)
    _evaluate(folder, recipe.evaluate, model, quant_model, images if real is None else real, progress)


def synthesize(
    model: FloatModel,
    section: SynthesizeSection,
    seed: int,
    folder: Path,
    progress: Progress = QUIET,
    *,
    ray: RayWorkers | None = None,
) -> ImageSet:
    """Make the images of `section` in `folder`, part by part; called again, make the parts that are missing.

    With `ray` the workers of a cluster make them (`text_to_image` only); the images are the same.

    Raises:
        DataError: `folder` holds images of another method, setting, seed or network.
        UnsupportedModelError: the method does not work for this network; `folder` is not left behind.
        OutputError: `folder` cannot be written.
    """
    method = section.build()
    rng = Rng(seed).child("images")
    with working_folder(folder, (JOURNAL_NAME,)):
        require_space(folder, {"images": _image_bytes(section, model) - size_of(folder)})
        writer = open_writer(folder, section.method, method, section.count, seed, model, progress)
        if ray is not None:
            return ray.synthesize(method, model, section.count, rng, writer, progress)
        return method.synthesize(model, section.count, rng, writer=writer, progress=progress)


def select(
    images: ImageSet,
    model: FloatModel,
    section: SelectSection,
    seed: int,
    folder: Path,
    progress: Progress = QUIET,
    *,
    real: ImageSet | None = None,
    ray: RayWorkers | None = None,
) -> ImageSet:
    """Choose from `images` as `section` says and leave the choice in `folder`; called again, read it from there.

    Neither `real` images, which stand beside pool and choice in the report, nor the workers of `ray` change the choice.

    Raises:
        UnsupportedModelError: a filter does not work for this network.
        DataError: there are fewer images than are to stay, none can be used, or labels are missing.
        OutputError: `folder` cannot be written or holds something else. In all cases nothing is left behind.
    """
    return write_selection(
        folder,
        images,
        model,
        section.build(),
        Rng(seed).child("select"),
        real=real,
        batch_size=section.batch_size,
        table_gib=section.table_gib,
        progress=progress,
        workers=ray,
    )


def quantize(
    model: FloatModel,
    section: QuantizeSection,
    images: ImageSet,
    seed: int,
    progress: Progress = QUIET,
    *,
    workdir: Path | None = None,
    memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
) -> tuple[QuantModel, QuantReport]:
    """Do what `section` says: equalise, apply the method, correct biases; say what stays in floating point.

    With a `workdir` finished units are kept there, and the same call goes on after them.

    Raises:
        SchemeError: the scheme quantizes nothing, a pattern matches nothing, or it is not one for `export_preset`.
        DataError: no image can be read, or `workdir` holds units of another run.
        UnsupportedModelError: equalised, the network computes something else.
    """
    quant_model = equalized(_build(model, section), section.equalize, images, progress)
    if in_float := summarize(quant_model.coverage()).in_float:
        progress.warn(in_float)
    report = section.build().apply(
        quant_model, images, Rng(seed).child("quantize"), progress=progress, workdir=workdir, memory=memory
    )
    if section.bias_correction:
        report = report.model_copy(update={"bias_correction": correct_biases(quant_model, images)})
    return quant_model, report


def _build(model: FloatModel, section: QuantizeSection) -> QuantModel:
    """The network that is to be quantized; raises `SchemeError` if it is meant for a preset that cannot express it."""
    quant_model = QuantModel.build(model, section.scheme)
    if section.export_preset is not None:
        Onnx(preset=section.export_preset).check(quant_model)
    return quant_model


def _note_model(folder: RunFolder, model: FloatModel) -> None:
    """Record which network this is, or check that it still is the same one."""
    if folder.is_done("model"):
        if folder.record.stages["model"].metrics["fingerprint"] != model.fingerprint:
            raise ModelError(f"{folder.path} was made with other weights of {model.name}; choose another --out")
        return
    with folder.stage("model") as metrics:
        metrics |= {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "num_classes": model.num_classes,
            "class_names": None if model.class_names is None else list(model.class_names),
            "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
            "preprocess": model.preprocess.model_dump(mode="json"),
        }


def _get_images(
    folder: RunFolder, section: SynthesizeSection | SourceSection, model: FloatModel, seed: int, progress: Progress
) -> ImageSet:
    if isinstance(section, SourceSection):
        known = in_classes_of(section.open(), classes_of(model), section.source, progress)
        images = _draw(known, section, seed)
        if not folder.is_done("images"):
            with folder.stage("images") as metrics:
                metrics |= {"method": "given", "source": section.source, "count": len(images)}
                metrics |= warn_of_suspicious(images, progress, section.source)
        return images
    if folder.is_done("images"):
        return ImageSet.open(folder.images)
    before = folder.record.metrics("images", ImagesMetrics).fingerprint
    with folder.stage("images") as metrics:
        images = synthesize(model, section, seed, folder.images, progress)
        metrics |= {"method": section.method, "count": len(images), "fingerprint": images.fingerprint}
    if before not in (None, images.fingerprint):
        progress.warn(f"{folder.images} came out otherwise than before; what was made from the images before stays")
    return images


def _draw(images: ImageSet, section: SourceSection, seed: int) -> ImageSet:
    """Draw `section.count` images without repetition, or put all of them in a random order.

    Folders are sorted by class, and methods that look at a few images only take the first ones. Images that a method
    made have no such order: they stay as they are, so that `synthesize` and `quantize` do what `run` does.
    """
    if section.count is None and images.manifest.method is not None:
        return images
    if section.count is not None and section.count > len(images):
        raise InputError(
            f"images.count is {section.count} but {section.source} holds {len(images)}; lower it or leave it out"
        )
    order = torch.randperm(len(images), generator=Rng(seed).generator("draw images"))
    return images.subset(order[: section.count])


def _select(
    folder: RunFolder, recipe: Recipe, model: FloatModel, images: ImageSet, real: ImageSet | None, progress: Progress
) -> ImageSet:
    if recipe.select is None:
        return images
    if folder.is_done("select"):
        return ImageSet.open(folder.selected)
    with folder.stage("select") as metrics:
        kept = select(images, model, recipe.select, recipe.seed, folder.selected, progress, real=real)
        metrics |= {"pool": len(images), "rejected": len(images) - len(kept)}
        metrics |= {"count": len(kept), "fingerprint": kept.fingerprint, **selection_metrics(folder.selected)}
    return kept


def _quantize(folder: RunFolder, recipe: Recipe, model: FloatModel, images: ImageSet, progress: Progress) -> QuantModel:
    if folder.is_done("checkpoint"):
        return load_checkpoint(folder.checkpoint, float_model=model)
    # A run that was killed after this stage comes here again; the units are then read from the working folder.
    with folder.stage("quantize") as metrics:
        quant_model, report = quantize(
            model, recipe.quantize, images, recipe.seed, progress, workdir=folder.work, memory=recipe.memory
        )
        coverage = quant_model.coverage()
        metrics |= report.model_dump(mode="json")
        given = recipe.images.source if isinstance(recipe.images, SourceSection) else "the images to quantize with"
        metrics |= say_what_was_read(images, progress, given)
        metrics |= {
            "scheme": recipe.quantize.scheme.describe(),
            "coverage": [asdict(row) for row in coverage],
            "coverage_summary": asdict(summarize(coverage)),
        }
    before = folder.record.metrics("checkpoint", CheckpointMetrics).weights_sha256
    with folder.stage("checkpoint") as metrics:
        save_checkpoint(quant_model, folder.checkpoint)
        metrics["weights_sha256"] = checkpoint_hash(folder)
        changed = before != metrics["weights_sha256"]
    if changed and folder.is_done("evaluate"):
        progress.warn(f"{folder.checkpoint} came out otherwise than before; it is measured again")
        folder.reopen("evaluate", "report")
    return quant_model


def _evaluate(
    folder: RunFolder,
    section: EvaluateSection | None,
    model: FloatModel,
    quant_model: QuantModel,
    images: ImageSet,
    progress: Progress,
) -> None:
    """Measure float and quantized network on `images`: labelled ones, or those that were used to quantize."""
    if folder.is_done("evaluate"):
        return
    with folder.stage("evaluate") as metrics:
        rows, result = float_beside_quantized(section, model, quant_model, images, progress)
        metrics |= say_what_was_read(images, progress, section.data if section else "the images to quantize with")
        metrics |= {
            "data": section.data if section else None,
            "count": result.count,
            "accuracy": rows,
            "sqnr": [row.row() for row in measure_sqnr(quant_model, images, float_model=model, progress=progress)],
        }


def _space(folder: RunFolder, recipe: Recipe, model: FloatModel) -> dict[str, int]:
    """Bytes that a run will take on the disk beside what is there, by what for; at least, as far as can be known."""
    needed = {}
    if isinstance(recipe.images, SynthesizeSection) and not folder.is_done("images"):
        needed["images"] = max(0, _image_bytes(recipe.images, model) - size_of(folder.images))
    if not folder.is_done("checkpoint"):
        # Codes take a byte each while the network is quantized, and at most that in the checkpoint.
        codes = sum(parameter.numel() for parameter in model.module.parameters())
        needed |= {"units": max(0, codes - size_of(folder.work)), "checkpoint": codes}
    return needed


def _image_bytes(section: SynthesizeSection, model: FloatModel) -> int:
    """Bytes of the images; 0 for images of a size of their own, which only the generator knows."""
    form = image_form(section.build())
    if not form.sized_by_network or form.dtype != "float16":
        return 0
    height, width = model.preprocess.input_size
    return section.count * 3 * height * width * torch.float16.itemsize


def _require_labels(data: ImageSet, source: str, model: FloatModel, progress: Progress) -> None:
    """Raise `DataError` before any work is done if an image has no label, or one that is no class of the network.

    Without any labels agreement can be measured all the same; that is said.
    """
    if data.labels is None or not len(data):
        progress.warn(f"{source} has no labels: agreement with the float network is measured on it, accuracy is not")
        return
    if unlabelled := int((data.labels < 0).sum()):
        raise DataError(
            f"{source}: {unlabelled} of {len(data)} images have no label; label them all, or leave these out"
        )
    highest = int(data.labels.max())
    if model.num_classes is not None and highest >= model.num_classes:
        raise DataError(
            f"{source} has labels up to {highest} but {model.name} has {model.num_classes} classes "
            f"(0 to {model.num_classes - 1}); give data with the network's classes"
        )
