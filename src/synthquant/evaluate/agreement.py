"""Layer by layer, and output by output: how much quantization error there is beside the signal.

The signal-to-quantization-noise ratio of a tensor `x` and its quantized version `y` is
`SQNR = 10 log10(sum(x^2) / sum((x - y)^2))` in dB, the sums running over all elements and samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.errors import ModelError
from synthquant.core.modules import eval_mode, hooked
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.evaluate.outputs import OutputSqnr, Ratio, compare_outputs
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import Samples, none_readable, samples_for, spread
from synthquant.models.signature import Inputs, named_outputs
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel


@dataclass(frozen=True)
class SqnrRow:
    """Ratios of one layer [dB]; none where nothing is quantized, no error was made, or values are not finite."""

    name: str
    """Module name of the layer."""
    weights: float | None
    """Decoded weight against float weight."""
    activations: float | None
    """Quantized input against input, in the float network."""
    alone: float | None
    """The layer's output when it is the only quantized one, against its float output."""
    cumulative: float | None
    """The layer's output in the quantized network (all layers up to and including it), against its float output."""

    def row(self) -> dict[str, Any]:
        """Return the JSON row of the SQNR table in `run.json`."""
        return asdict(self)


@dataclass
class _LayerSums:
    """What is measured at one layer, and the float outputs of the batch at hand."""

    activations: Ratio = field(default_factory=Ratio)
    alone: Ratio = field(default_factory=Ratio)
    cumulative: Ratio = field(default_factory=Ratio)
    pending: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def measure_sqnr(
    quant_model: QuantModel,
    samples: ImageSet | Samples,
    *,
    float_model: FloatModel | None = None,
    count: int = 64,
    batch_size: int = 8,
    progress: Progress = QUIET,
) -> list[SqnrRow]:
    """Measure all four ratios of every quantized layer, in execution order, with two passes over the samples.

    Args:
        quant_model: calibrated; left as it was.
        samples: images, of which labels are not needed, or what else the network takes.
        float_model: the float network with its weights, needed for a `quant_model` that was loaded from a checkpoint
            (which holds codes only).
        count: how many to use, evenly spaced over the set.
        batch_size: samples per pass; the float outputs of all layers for one batch are held in memory.
        progress: draws a bar.

    Raises:
        DataError: no sample could be read.
        ModelError: `quant_model` was loaded from a checkpoint and `float_model` is missing.
    """
    reference = _reference(quant_model, float_model)
    sums = {name: _LayerSums() for name in quant_model.layers}
    with eval_mode(quant_model), eval_mode(reference), progress.bar("layer SQNR", min(count, len(samples))) as bar:
        for inputs in _inputs(quant_model, samples, count, batch_size):
            with reference.mode(weights=False, activations=False), _float_hooks(reference, quant_model, sums):
                inputs.clone().call(reference)
            with quant_model.mode(weights=True, activations=True), _quant_hooks(quant_model, sums):
                inputs.call(quant_model)
            bar.advance(len(inputs))
    return [
        SqnrRow(
            name,
            _weight_ratio(reference.layers[name], layer),
            sums[name].activations.decibels(),
            sums[name].alone.decibels(),
            sums[name].cumulative.decibels(),
        )
        for name, layer in quant_model.layers.items()
    ]


@torch.no_grad()
def measure_output_sqnr(
    quant_model: QuantModel,
    samples: ImageSet | Samples,
    *,
    float_model: FloatModel | None = None,
    count: int = 64,
    batch_size: int = 8,
) -> OutputSqnr:
    """Measure the outputs of the quantized network against those of the float network, whatever they are.

    Arguments and errors are those of `measure_sqnr`.
    """
    both = outputs_of_both(quant_model, samples, float_model, count, batch_size)
    return compare_outputs(((wanted, found) for _, wanted, found in both), quant_model.float_model.task)


def outputs_of_both(
    quant_model: QuantModel, samples: ImageSet | Samples, float_model: FloatModel | None, count: int, batch_size: int
) -> Iterator[tuple[int, Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """How many samples a batch has, and the outputs of the float and of the quantized network for it, by name.

    Arguments and errors are those of `measure_sqnr`.
    """
    reference = _reference(quant_model, float_model)
    with eval_mode(quant_model), eval_mode(reference):
        for inputs in _inputs(quant_model, samples, count, batch_size):
            with torch.no_grad():
                with reference.mode(weights=False, activations=False):
                    outputs = named_outputs(inputs.clone().call(reference))
                    wanted = {name: value.clone() for name, value in outputs.items()}
                with quant_model.mode(weights=True, activations=True):
                    found = named_outputs(inputs.call(quant_model))
            yield len(inputs), wanted, found


def _inputs(quant_model: QuantModel, source: ImageSet | Samples, count: int, batch_size: int) -> Iterator[Inputs]:
    """Up to `count` samples, evenly spaced, on the network's device; raises `DataError` if none can be read."""
    samples, found = samples_for(quant_model.float_model, source), False
    for inputs in samples.batches(batch_size, spread(len(samples), count)):
        found = True
        yield inputs.to(quant_model.device)
    if not found:
        raise none_readable(source, min(count, len(samples)), "to measure with")


def _reference(quant_model: QuantModel, float_model: FloatModel | None) -> QuantModel:
    """A network of the same structure that has its float weights: `quant_model` itself, or a new one."""
    if not quant_model.loaded:
        return quant_model
    if float_model is None:
        raise ModelError(
            f"{quant_model.float_model.name}: loaded from a checkpoint, which holds no float weights;"
            " give the float model too"
        )
    return QuantModel.build(float_model, quant_model.scheme, quant_model.equalization, fold=quant_model.fold)


def _weight_ratio(reference: QuantLayer, layer: QuantLayer) -> float | None:
    if layer.weight_quantizer is None:
        return None
    ratio = Ratio()
    ratio.add(reference.float_weight, layer.weight_quantizer())
    return ratio.decibels()


@contextmanager
def _float_hooks(reference: QuantModel, quant_model: QuantModel, sums: dict[str, _LayerSums]) -> Iterator[None]:
    """During a float pass: measure each layer by itself, and keep its output for the quantized pass."""

    def watch(name: str) -> Callable[..., None]:
        layer, entry, own = quant_model.layers[name], _entry_quantizer(quant_model, name), sums[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0]
            with _switched_on(layer, entry):
                quantizer = entry or layer.input_quantizer
                if quantizer is not None:
                    own.activations.add(x, quantizer(x))
                # not a call: the hooks of this very layer would run again
                own.alone.add(output, layer.forward(x if entry is None else entry(x), *args[1:]))
            # the next operation may work in place
            own.pending.append(output.clone())

        return hook

    with hooked([(reference.layers[name], watch(name)) for name in sums]):
        yield


@contextmanager
def _quant_hooks(quant_model: QuantModel, sums: dict[str, _LayerSums]) -> Iterator[None]:
    """During a quantized pass: compare each layer's output with the float one."""

    def watch(own: _LayerSums) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            own.cumulative.add(own.pending.pop(0), output)

        return hook

    with hooked([(layer, watch(sums[name])) for name, layer in quant_model.layers.items()]):
        yield


def _entry_quantizer(quant_model: QuantModel, layer: str) -> ActivationQuantizer | None:
    """The quantizer at the entry of the block around `layer`, if that is where the layer's input is quantized."""
    name = quant_model.reads.get(layer)
    return (
        None if name is None or quant_model.layers[layer].input_quantizer is not None else quant_model.quantizers[name]
    )


@contextmanager
def _switched_on(layer: QuantLayer, entry: ActivationQuantizer | None) -> Iterator[None]:
    """Quantize in this layer alone for a while."""
    quantizers = [quantizer for quantizer in (entry, layer.input_quantizer) if quantizer is not None]
    former = [quantizer.enabled for quantizer in quantizers]
    weights_enabled = layer.weights_enabled
    try:
        layer.weights_enabled = True
        for quantizer in quantizers:
            quantizer.enabled = True
        yield
    finally:
        layer.weights_enabled = weights_enabled
        for quantizer, enabled in zip(quantizers, former, strict=True):
            quantizer.enabled = enabled
