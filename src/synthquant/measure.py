"""Networks on images: what the command `evaluate` and the stage of a run share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from synthquant.core.device import resolve_device
from synthquant.core.errors import DataError, MissingExtraError, ModelError
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.data.quality import say_what_was_read
from synthquant.evaluate.accuracy import Evaluation, compare_logits, evaluate_model, wilson_interval
from synthquant.evaluate.agreement import measure_output_sqnr
from synthquant.evaluate.cost import float_cost, quantized_cost
from synthquant.evaluate.data import Data
from synthquant.evaluate.metrics import Values, metrics_of
from synthquant.evaluate.outputs import OutputSqnr, compare_outputs
from synthquant.export.checkpoint import load_checkpoint
from synthquant.export.quant_config import CONFIG_NAME, read_config
from synthquant.models.class_labels import Classes, classes_of
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.models.samples import none_readable
from synthquant.models.signature import named_outputs
from synthquant.nn.coverage import summarize
from synthquant.nn.quant_model import QuantModel
from synthquant.runtimes import ExportedNetwork, RuntimeExporter


def evaluate(
    source: ModelSource | Path,
    data: Data,
    device: str = "auto",
    progress: Progress = QUIET,
    *,
    model: str | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Measure a network, or the quantized network in a run folder or checkpoint folder.

    Returns what `evaluate_float` or `evaluate_quantized` do. The agreement with the float network is there if that can
    be opened and still is the one that was quantized; otherwise a warning says why not. Code that a run names as its
    network only runs if `model` names it too, or with `trust_code`.

    Raises:
        ModelError: the network or checkpoint cannot be opened, or it names code.
        DataError, UnsupportedModelError: as `evaluate_float` and `evaluate_quantized`.
    """
    place = resolve_device(device)
    if isinstance(source, ModelSource):
        return evaluate_float(open_model(source, device=place, progress=progress), data, progress)
    folder = source if (source / CONFIG_NAME).is_file() else source / "model"
    config = read_config(folder)
    if config.float_graph_sha256 is not None and trust_code and model is None:
        quant_model = load_checkpoint(folder, device=place, trust_code=True)
        own = quant_model.float_model
        return evaluate_quantized(quant_model, None if own.recorded_fingerprint else own, data, progress)
    if model is None:
        config.require_trust_in_graph(folder)
    entry = config.float_model
    recorded = entry.source.confirmed(str(folder / CONFIG_NAME), model=model, trust_code=trust_code)
    float_model = _same_float_model(recorded, entry.fingerprint, place, progress)
    quant_model = load_checkpoint(folder, float_model=float_model, device=place, model=model, trust_code=trust_code)
    return evaluate_quantized(quant_model, float_model, data, progress)


def evaluate_float(model: FloatModel, data: Data, progress: Progress = QUIET) -> dict[str, Any]:
    """Measure a network on labelled images; returns the row of the accuracy table, with the numbers of `metrics`.

    Where there are no labels, or no logits, it is measured by metrics alone.

    Raises:
        UnsupportedModelError: it is no classifier, and there is no metric.
        DataError: the images cannot be used, or a label is not a class of the network.
        InputError: the metric fails.
    """
    if model.task != "classify" or (data.metric is not None and data.pictures.labels is None):
        if not data.metrics(model):
            model.require_logits()
        start = time.perf_counter()
        found = {"name": model.name, "count": len(data.images), **data.measured(model.module, model, progress)}
        return found | {"seconds": time.perf_counter() - start} | _read(data, progress)
    data = data.in_classes_of(classes_of(model), progress)
    _require_labels(data.pictures, data.name)
    result = _measure(model.module, model, data.pictures, data.batch_size, progress)
    _warn_of_guessing(result.top1, result, data.name, progress)
    values = data.measured_of(result.logits, model, progress, "evaluate float")
    return result.row(model.name) | values | _read(data, progress)


def evaluate_quantized(
    quant_model: QuantModel, float_model: FloatModel | None, data: Data, progress: Progress = QUIET
) -> dict[str, Any]:
    """Measure a quantized network; returns the row of the accuracy table with what quantization reaches of it.

    With `float_model`, the network that was quantized, agreement with it is in the row, and no labels are needed. Of a
    network that is no classifier the row has `sqnr` and `outputs` (fields of `OutputSqnr`) instead of accuracy. The
    numbers of a metric are `metrics`, those of the float network beside them `float_metrics`.

    Raises:
        ModelError: it is no classifier, and the float network is not there.
        DataError: the images cannot be used, or a label is not a class of the network.
        InputError: the metric fails.
    """
    model = quant_model.float_model
    if model.task != "classify":
        return _evaluate_outputs(quant_model, float_model, data, progress)
    data = data.in_classes_of(classes_of(model), progress)
    logits, before = None, dict[str, Values]()
    if float_model is not None:
        logits = _logits(float_model.module, float_model, data.pictures, data.batch_size, progress)
        before = _of_float(data.measured_of(logits, model, progress, "evaluate float"))
    else:
        _require_labels(data.pictures, data.name)
    result = _measure(quant_model, model, data.pictures, data.batch_size, progress, logits)
    _warn_of_guessing(result.reference_top1, result, data.name, progress)
    row = result.row(quant_model.scheme.name) | quantized_cost(quant_model).row()
    row |= data.measured_of(result.logits, model, progress, "evaluate quantized") | before
    row |= {"coverage": asdict(summarize(quant_model.coverage()))}
    return row | _read(data, progress)


def _evaluate_outputs(
    quant_model: QuantModel, float_model: FloatModel | None, data: Data, progress: Progress
) -> dict[str, Any]:
    """Measure a quantized network whose outputs are no logits against the float one."""
    before = {} if float_model is None else _of_float(data.measured(float_model.module, float_model, progress))
    values = data.measured(quant_model, quant_model.float_model, progress) | before
    outputs = measure_output_sqnr(quant_model, data.images, float_model=float_model, count=len(data.images))
    for warning in outputs.warnings:
        progress.warn(warning)
    row = outputs_and_costs(quant_model, outputs)[1] | {"count": len(data.images), "outputs": asdict(outputs)} | values
    return row | {"coverage": asdict(summarize(quant_model.coverage()))} | _read(data, progress)


def _of_float(measured: dict[str, Values]) -> dict[str, Values]:
    return {f"float_{name}": values for name, values in measured.items()}


def _read(data: Data, progress: Progress) -> dict[str, Any]:
    return say_what_was_read(data.images, progress, data.name) if isinstance(data.images, ImageSet) else {}


def evaluate_exported(
    exporter: type[RuntimeExporter],
    path: Path,
    data: Data,
    runtime: str | None = None,
    progress: Progress = QUIET,
    *,
    model: str | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Measure a file of `exporter` on the CPU; returns and compares as `evaluate` does.

    Without a `runtime` the exporter's usual one runs the file. Measuring it runs no code of the network's origin;
    without leave for it, only the agreement is missing.

    Of a network that is no classifier it returns what `evaluate_quantized` does of one, without the coverage; where the
    float network is not to be had, only what the metric says.

    Raises:
        ModelError: the file was not exported by this package, the runtime cannot load it, or it was not made from
            `model`; or it is of no classifier, and there is neither a float network nor a metric.
        UnknownNameError: there is no such runtime.
        MissingExtraError: the runtime is not installed.
        DataError: the images cannot be used, or a label is not a class of the network.
    """
    runtime = runtime or exporter.runtimes[0]
    opened = exporter.open(path, runtime)
    classifies, images = opened.task == "classify", data.pictures
    if classifies:
        data = data.in_classes_of(Classes(opened.name, opened.class_names, opened.num_classes), progress)
        images = data.pictures
    float_model = reference = None
    before = dict[str, Values]()
    try:
        recorded = opened.source.confirmed(str(path), model=model, trust_code=trust_code)
    except ModelError as error:
        if model is not None:
            raise
        progress.warn(f"no agreement with the float network: {error}")
    else:
        float_model = _same_float_model(recorded, opened.fingerprint, "cpu", progress)
    if not classifies:
        cost = {"runtime": runtime, "size_bytes": path.stat().st_size}
        return _outputs_of_file(opened, float_model, data, progress) | cost | _read(data, progress)
    if float_model is not None:
        reference = _logits(float_model.module, float_model, images, data.batch_size, progress)
        before = _of_float(data.measured_of(reference, float_model, progress, "evaluate float"))
    else:
        _require_labels(images, data.name)
    result = evaluate_model(
        opened.run,
        opened.preprocess,
        images,
        reference_logits=reference,
        batch_size=data.batch_size,
        progress=progress,
        title=f"evaluate in {runtime}",
    )
    _warn_of_guessing(result.reference_top1, result, data.name, progress)
    row = result.row(opened.scheme.name) | {"runtime": runtime, "size_bytes": path.stat().st_size}
    if data.metric is not None:
        title = f"evaluate in {runtime}"
        row["metrics"] = metrics_of(result.logits, images, [data.metric], data.targets, progress, title)
    return row | before | _read(data, progress)


class _File(nn.Module):
    """A file in a runtime as a module that gives what the float network does, or tensors by their names in the file."""

    def __init__(self, opened: ExportedNetwork, float_model: FloatModel | None) -> None:
        super().__init__()
        self._opened, self._like = opened, None
        if float_model is not None:
            with torch.no_grad():
                self._like = pytree.tree_flatten(float_model.example(1).call(float_model.module))

    def forward(self, images: Tensor) -> Any:
        """Run the file on normalised images."""
        found = self._opened.function([images])
        if self._like is None:
            return found[0] if len(found) == 1 else dict(zip(self._opened.outputs, found, strict=True))
        leaves, tree = self._like
        rest = iter(found)
        return pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)


def _outputs_of_file(
    opened: ExportedNetwork, float_model: FloatModel | None, data: Data, progress: Progress
) -> dict[str, Any]:
    """Measure a file of a network that is no classifier."""
    network = _File(opened, float_model)
    source = ModelSource.model_validate(opened.source.model_dump())
    stands = FloatModel(network, opened.preprocess, opened.name, source, opened.task)
    row: dict[str, Any] = {"name": opened.scheme.name, "count": len(data.images)}
    if float_model is None:
        if data.metric is None:
            raise ModelError(
                f"{opened.name} is no classifier, and there is no float network to compare its outputs with; give a"
                " metric"
            )
        return row | data.measured(network, stands, progress)

    @torch.no_grad()
    def both() -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        for batch in input_batches(data.pictures, opened.preprocess, data.batch_size):
            yield named_outputs(float_model.module(batch.inputs)), named_outputs(network(batch.inputs))

    outputs = compare_outputs(both(), opened.task)
    for warning in outputs.warnings:
        progress.warn(warning)
    row |= {"sqnr": outputs.total, "agreement": outputs.same_answers, "outputs": asdict(outputs)}
    before = _of_float(data.measured(float_model.module, float_model, progress))
    return row | data.measured(network, stands, progress) | before


def _require_labels(data: ImageSet, name: str) -> None:
    """Raise `DataError` if there is nothing to compare a network's classes with, before it runs on all images."""
    if data.labels is None:
        raise DataError(
            f"{name} has no labels, and there is no float network to agree with; give images in class folders or with a"
            " column of labels"
        )


def float_beside_quantized(
    model: FloatModel, quant_model: QuantModel, data: Data, progress: Progress, *, labelled: bool = True
) -> tuple[list[dict[str, Any]], Evaluation]:
    """Return the rows of the accuracy table and the quantized network's evaluation.

    Labels of images that were used to quantize say nothing about accuracy: these are not `labelled`, and agreement is
    all that is measured on them.
    """
    name, cost, images = quant_model.scheme.name, quantized_cost(quant_model).row(), data.pictures
    if labelled and images.labels is not None:
        before = _measure(model.module, model, images, data.batch_size, progress)
        _warn_of_guessing(before.top1, before, data.name, progress)
        reference, row = before.logits, before.row("float")
        result = _measure(quant_model, model, images, data.batch_size, progress, reference)
    else:
        reference, row = _logits(model.module, model, images, data.batch_size, progress), {"name": "float"}
        logits = _logits(quant_model, model, images, data.batch_size, progress)
        result = compare_logits(logits, None, reference)
    row |= float_cost(quant_model).row() | data.measured_of(reference, model, progress, "evaluate float")
    values = data.measured_of(result.logits, model, progress, "evaluate quantized")
    return [row, result.row(name) | cost | values], result


def outputs_and_costs(quant_model: QuantModel, outputs: OutputSqnr) -> list[dict[str, Any]]:
    """Return the rows of the accuracy table for a network that is no classifier: its outputs' SQNR [dB], and costs."""
    found = {"sqnr": outputs.total, "agreement": outputs.same_answers}
    return [
        {"name": "float"} | float_cost(quant_model).row(),
        {"name": quant_model.scheme.name} | found | quantized_cost(quant_model).row(),
    ]


def _measure(
    network: nn.Module,
    model: FloatModel,
    data: ImageSet,
    batch_size: int,
    progress: Progress,
    reference_logits: Tensor | None = None,
) -> Evaluation:
    return evaluate_model(
        network,
        model.preprocess,
        data,
        reference_logits=reference_logits,
        batch_size=model.samples_at_once(batch_size),
        device=model.device,
        progress=progress,
        title=_title(network, model),
    )


@torch.no_grad()
def _logits(network: nn.Module, model: FloatModel, images: ImageSet, batch_size: int, progress: Progress) -> Tensor:
    """Logits `[N, classes]` for images that need no labels."""
    parts = []
    with progress.bar(_title(network, model), len(images)) as bar:
        for batch in input_batches(images, model.preprocess, model.samples_at_once(batch_size)):
            parts.append(network(batch.inputs.to(model.device)).float().cpu())
            bar.advance(len(batch.inputs))
    if not parts:
        raise none_readable(images, len(images), "to measure on")
    return torch.cat(parts)


def _warn_of_guessing(top1: float | None, seen: Evaluation, source: str, progress: Progress) -> None:
    """Warn if a float network's `top1` on the images of `seen` is no better than chance can be (95% Wilson interval).

    Trained networks are better; then labels, preprocessing and weights do not belong together.
    """
    if top1 is None:
        return
    classes = seen.logits.shape[1]
    low, high = wilson_interval(round(top1 * seen.count), seen.count)
    if low <= 1 / classes:
        progress.warn(
            f"the float network's top-1 on {source} is {top1:.2%} (95% interval {low:.2%} to {high:.2%} of {seen.count}"
            f" images): no better than guessing among {classes} classes; check that labels, preprocessing and weights"
            " belong together"
        )


def _title(network: nn.Module, model: FloatModel) -> str:
    return "evaluate float" if network is model.module else "evaluate quantized"


def _same_float_model(source: ModelSource, fingerprint: str, device: str, progress: Progress) -> FloatModel | None:
    """Open the network that was quantized, or warn why it is not to be had."""
    try:
        model = open_model(source, device=device)
    except (ModelError, MissingExtraError) as error:
        progress.warn(f"no agreement with the float network: {error}")
        return None
    if model.fingerprint != fingerprint:
        progress.warn(f"no agreement with the float network: {source.source} now has other weights")
        return None
    return model
