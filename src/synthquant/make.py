"""Images, choices and quantized networks: what the commands and the stages of a run share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from synthquant.core.advice import about_rounding
from synthquant.core.errors import DataError, InputError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.record import RunRecord
from synthquant.core.rng import Rng
from synthquant.core.settings import parse_settings
from synthquant.core.working_folder import require_space, size_of, working_folder
from synthquant.data.image_set import ImageSet
from synthquant.data.store import JOURNAL_NAME
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.trajectory import Trajectory
from synthquant.distributed.ray_workers import RayWorkers
from synthquant.export.checkpoint import load_checkpoint
from synthquant.export.quant_config import read_config
from synthquant.methods import FineTuned, MemoryBudget, is_checking, is_generating
from synthquant.models.class_labels import classes_of, in_classes_of
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import Samples
from synthquant.nn.coverage import summarize
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.bias_correction import correct_biases
from synthquant.quantize.difference_ranges import modulation_report
from synthquant.quantize.equalize import equalized
from synthquant.quantize.output_correction import correct_output
from synthquant.quantize.output_scales import spare_outputs
from synthquant.quantize.reparameterize import require_layer_norms
from synthquant.recipe import FineTuneSection, QuantizeSection, SelectSection, SourceSection, SynthesizeSection
from synthquant.select.write import write_selection
from synthquant.synthesize.batches import image_form, open_writer
from synthquant.synthesize.self_sampling import SelfSampling
from synthquant.targets import exporter_for, network_scheme, require_exportable


def synthesize(
    model: FloatModel,
    section: SynthesizeSection,
    seed: int,
    folder: Path | None,
    progress: Progress = QUIET,
    *,
    ray: RayWorkers | None = None,
) -> ImageSet | Trajectory:
    """Make the images of `section` in `folder`, part by part; called again, make the parts that are missing.

    Without a folder they are made in memory. With `ray` the workers of a cluster make them (`text_to_image` and
    `self_sampling` only). They are the same ones.

    Raises:
        DataError: `folder` holds images of another method, setting, seed or network.
        UnsupportedModelError: the method does not work for this network; `folder` is not left behind.
        OutputError: `folder` cannot be written.
    """
    method = section.build()
    rng = Rng(seed).child("images")
    if folder is None:
        return method.synthesize(model, section.count, rng, progress=progress)
    with working_folder(folder, (JOURNAL_NAME,)):
        require_space(folder, {"images": image_bytes(section, model) - size_of(folder)})
        if isinstance(method, SelfSampling):
            trajectories = method.open_writer(folder, progress)
            if ray is not None:
                return ray.record(method, model, section.count, rng, trajectories, progress)
            return method.synthesize(model, section.count, rng, writer=trajectories, progress=progress)
        writer = open_writer(folder, section.method, method, section.count, seed, model, progress)
        if ray is not None:
            return ray.synthesize(method, model, section.count, rng, writer, progress)
        return method.synthesize(model, section.count, rng, writer=writer, progress=progress)


def fitted(model: FloatModel, images: ImageSet | Trajectory | None) -> FloatModel:
    """Return the network with the arguments that a trajectory has, in its size; as it is for images.

    Raises `DataError` for a trajectory of another pipeline, or if the network is no denoiser.
    """
    if not isinstance(images, Trajectory):
        return model
    if not isinstance(model, Denoiser):
        raise DataError(f"{images.name} is a trajectory of {images.manifest.source}, and {model.name} is no denoiser")
    return model.taking(images)


def given_images(section: SourceSection, model: FloatModel, seed: int, progress: Progress) -> ImageSet | Trajectory:
    """Draw `count` images without repetition, or put all of them in a random order.

    Folders are sorted by class, and methods that look at a few images only take the first ones. Images that a
    method made have no such order: they stay as they are, so that `synthesize` and `quantize` do what `run` does.
    Of a trajectory the first `count` rows are taken, which are of all its steps.
    """
    count, source = section.count, section.source
    opened = section.open()
    if count is not None and count > len(opened):
        raise InputError(f"images.count is {count} but {source} holds {len(opened)}; lower it or leave it out")
    if isinstance(opened, Trajectory):
        return opened if count is None else opened.subset(range(count))
    return drawn(opened, model, seed, progress, source, count)


def undrawn_images(section: SourceSection, model: FloatModel, seed: int, progress: Progress) -> ImageSet:
    """Return those that `given_images` leaves, in a random order; of a trajectory, or without a `count`, none."""
    opened, source = section.open(), section.source
    if isinstance(opened, Trajectory) or section.count is None:
        return ImageSet.from_tensors(torch.zeros(0, 1, 1, 1, dtype=torch.uint8))
    order = torch.randperm(len(opened), generator=Rng(seed).generator("draw images"))
    return in_classes_of(opened, classes_of(model), source, progress).subset(order[section.count :])


def drawn(
    images: ImageSet, model: FloatModel, seed: int, progress: Progress, source: str, count: int | None = None
) -> ImageSet:
    """Draw `count` of the images (none: all) as `given_images` does, with labels that are classes of the network."""
    images = in_classes_of(images, classes_of(model), source, progress)
    if count is None and images.manifest.method is not None:
        return images
    order = torch.randperm(len(images), generator=Rng(seed).generator("draw images"))
    return images.subset(order[:count])


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
    images: ImageSet | Samples | None,
    seed: int,
    progress: Progress = QUIET,
    *,
    workdir: Path | None = None,
    memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
) -> tuple[QuantModel, QuantReport]:
    """Do what `section` says: equalise, apply the method, correct biases; say what stays in floating point.

    Or take the network of the run that it names, with what that run reported. Without `images` the method makes its
    own. With a `workdir` finished units are kept there, and the same call goes on after them.

    Raises:
        SchemeError: the scheme quantizes nothing, a pattern matches nothing, or it is not one for its target.
        DataError: no image can be read, or `workdir` holds units of another run.
        UnsupportedModelError: equalised, the network computes something else.
        InputError: there are no images and something needs them, or `section.run` is no finished run of this network.
    """
    if section.run is not None:
        return _taken(model, section, Path(section.run))
    if images is None and section.needs_images:
        raise InputError(f"there are no images to quantize with, which {section.needs_images[0]} needs")
    quant_model = build(model, section)
    spare_outputs(quant_model, images, progress)
    quant_model = equalized(quant_model, section.equalize, images, progress)
    if in_float := summarize(quant_model.coverage()).in_float:
        progress.warn(in_float)
    step, rng = section.build(), Rng(seed).child("quantize")
    if images is not None:
        report = step.apply(quant_model, images, rng, progress=progress, workdir=workdir, memory=memory)
    else:
        assert is_generating(step)
        report = step.apply(quant_model, None, rng, progress=progress, workdir=workdir, memory=memory)
    if advice := about_rounding(report.units, section.settings.get("iterations")):
        progress.warn(str(advice))
    if section.bias_correction and images is not None:
        report = report.model_copy(update={"bias_correction": correct_biases(quant_model, images)})
    if section.output_correction and images is not None:
        report = report.model_copy(update={"output_correction": correct_output(quant_model, images)})
    if quant_model.modulation is not None:
        report = report.model_copy(update={"modulation": modulation_report(quant_model, images, progress)})
    return quant_model, report


def finetune(
    quant_model: QuantModel,
    section: FineTuneSection,
    images: ImageSet | None,
    seed: int,
    progress: Progress = QUIET,
    *,
    workdir: Path | None = None,
) -> FineTuned:
    """Train a copy of `quant_model` as `section` says; raises as `FineTuning.train`."""
    rng = Rng(seed).child("finetune")
    return section.build().train(quant_model, images, rng, progress=progress, workdir=workdir)


def sent(quant_model: QuantModel) -> dict[str, Any]:
    """What another process, which has the float network, makes the same quantized network of."""
    return {
        "scheme": quant_model.scheme,
        "equalization": quant_model.equalization,
        "fold": quant_model.fold,
        "state": {name: tensor.cpu() for name, tensor in quant_model.state().items()},
    }


def received(model: FloatModel, parts: Mapping[str, Any]) -> QuantModel:
    """The network that was `sent`."""
    quant_model = QuantModel.build(model, parts["scheme"], parts["equalization"], fold=parts["fold"])
    quant_model.load_state(parts["state"])
    return quant_model


def require_run(model: FloatModel, section: QuantizeSection) -> RunRecord:
    """Return the record of the run that `section` names; raises `InputError` if its network cannot be taken."""
    folder = Path(str(section.run))
    record = RunRecord.load(folder / "run.json")
    if "checkpoint" not in record.stages or record.stages["checkpoint"].status != "done":
        raise InputError(f"{folder} has no quantized network yet: finish that run first")
    config = read_config(folder / "model")
    if config.float_model.fingerprint != model.fingerprint:
        raise InputError(f"{folder} is a run of {config.float_model.name} with other weights than those given")
    if QuantizeSection.parse({"run": str(folder)}, str(folder)).scheme != section.scheme:
        raise InputError(
            f"{folder} was quantized to {config.scheme.name}, not as quantize.scheme says; leave method and scheme out"
        )
    return record


def _taken(model: FloatModel, section: QuantizeSection, folder: Path) -> tuple[QuantModel, QuantReport]:
    metrics = require_run(model, section).stages["quantize"].metrics
    found = {name: metrics[name] for name in QuantReport.model_fields if name in metrics}
    return load_checkpoint(folder / "model", float_model=model), parse_settings(QuantReport, found, str(folder))


def build(model: FloatModel, section: QuantizeSection) -> QuantModel:
    """The network that is to be quantized; raises `SchemeError` if it is meant for a target that cannot express it."""
    scheme, fold = section.scheme, section.fold_batch_norms
    if section.target is None:
        return QuantModel.build(model, scheme, fold=fold)
    scheme = network_scheme(section.target, model, scheme, fold=fold)
    quant_model = QuantModel.build(model, scheme, fold=fold)
    exporter_for(section.target).check(quant_model)
    return quant_model


def require_quantizable(model: FloatModel, section: QuantizeSection, progress: Progress = QUIET) -> None:
    """Raise what `quantize` would, as far as it is known of the network before there are images.

    Raises:
        SchemeError: the network is meant for a target that cannot express its scheme.
        UnsupportedModelError: it is not one for the method, for how it is to be equalised, or for its target.
        MissingExtraError: its target needs a package that is not there.
    """
    step, behind_norms = section.build(), section.equalize == "layer_norms"
    if section.target is None and not behind_norms and not is_checking(step):
        return
    quant_model = build(model, section)
    if behind_norms:
        require_layer_norms(quant_model)
    if is_checking(step):
        step.check(quant_model)
    if section.target is not None:
        require_exportable(quant_model, section.target, progress)


def image_bytes(section: SynthesizeSection, model: FloatModel) -> int:
    """Bytes of the images; 0 for images of a size of their own, which only the generator knows."""
    form = image_form(section.build())
    if not form.sized_by_network or form.dtype != "float16":
        return 0
    height, width = model.preprocess.input_size
    return section.count * model.preprocess.channels * height * width * torch.float16.itemsize
