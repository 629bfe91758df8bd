"""Ranges: where the grids of weights and activations lie before anything is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from synthquant.core.errors import DataError
from synthquant.core.files import sha256_bytes
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.models.samples import Samples, none_readable, samples_for
from synthquant.models.signature import Inputs
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.observers import Watcher
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.sampler_steps import in_turns

_MOST_AT_ONCE = 64


class CalibrationSet:
    """The samples a network is quantized with, as the network sees them.

    Samples that name the step of a sampler that each was taken at (`steps`, whole numbers `[N]`, as trajectories have
    them) come in turns of these steps, so that the first of them are of all steps.

    Synthesis may leave the range of pixels; no picture does. Values beyond black and white are cut off, for the float
    network too: the grid of the image ends there, and what it cuts off would be learned as an error of the quantized
    network, to be made up for by wrong roundings.

    Attributes:
        at_once: how many go through the network together without gradients.
    """

    def __init__(self, model: QuantModel, source: ImageSet | Samples) -> None:
        """Take images in pixel space, or samples of what else the network takes.

        Raises:
            DataError: the set is empty, or no set of samples, or has steps for other samples than it has.
            UnsupportedModelError: they are images, and the network takes none.
        """
        self._source, self._noun = source, "image" if isinstance(source, ImageSet) else "sample"
        self._samples = samples_for(model.float_model, source)
        if len(self._samples) == 0:
            raise DataError(f"0 {self._noun}s to quantize with; synthesize some or give a folder that holds some")
        self._takes = model.float_model.takes
        self._device = model.device
        self._steps = _steps(source, len(self._samples))
        self._order = None if self._steps is None else in_turns(self._steps)
        self.at_once = model.float_model.samples_at_once(_MOST_AT_ONCE)

    @property
    def fingerprint(self) -> str:
        """Hash that changes when what the network is given changes."""
        if self._steps is None:
            return self._samples.fingerprint
        return sha256_bytes(f"{self._samples.fingerprint} {self._steps.tolist()}".encode())

    def steps_of(self, count: int) -> torch.Tensor | None:
        """The sampler step of each of the samples in the order of `batches`, int64 `[N]`; none if they name none.

        Args:
            count: how many could be read.

        Raises:
            DataError: those are not all, so that it is not known which step each is of.
        """
        if self._steps is None or self._order is None:
            return None
        if count != len(self):
            raise DataError(
                f"{len(self) - count} of {len(self)} samples of a sampler's steps cannot be read; make the set anew"
            )
        return self._steps[self._order]

    def __len__(self) -> int:
        """Number of samples, ones that cannot be read included."""
        return len(self._samples)

    def batches(self, limit: int | None = None, size: int | None = None) -> Iterator[Inputs]:
        """Inputs on the model's device, of the first `limit` samples, in batches of `size`.

        Raises:
            DataError: not one sample can be read, or one has values that are not finite or is no input of the network.
        """
        wanted = len(self) if limit is None else min(limit, len(self))
        chosen = range(wanted) if self._order is None else self._order[:wanted]
        found = False
        for batch in self._samples.batches(size or self.at_once, chosen):
            found = True
            if not batch.finite:
                some = "an image" if self._noun == "image" else "a sample"
                raise DataError(f"{some} to quantize with has values that are not finite; make the {self._noun}s anew")
            given = batch.to(self._device)
            if isinstance(self._takes, Preprocess):
                given = given.filled([self._takes.cut_off(tensor) for tensor in given.tensors])
            yield given
        if not found:
            raise none_readable(self._source, len(chosen), "to quantize with")

    def run(self, model: QuantModel, count: int) -> None:
        """Let the first `count` samples go through a network."""
        for batch in self.batches(count):
            batch.call(model)


def _steps(source: ImageSet | Samples, count: int) -> torch.Tensor | None:
    """The steps that a source names."""
    found = None if isinstance(source, ImageSet) else getattr(source, "steps", None)
    if found is None:
        return None
    steps = torch.as_tensor(found).cpu()
    if steps.shape != (count,) or steps.is_floating_point():
        raise DataError(f"steps of samples must be {count} whole numbers, one for each sample")
    return steps.long()


def calibrate_weights(model: QuantModel, observer: str) -> None:
    """Search the scales of all weights and round them to nearest.

    Args:
        model: the network, with its float weights.
        observer: how ranges are searched where the scheme does not say.
    """
    for layer in model.layers.values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.calibrate(layer.float_weight, observer)


def calibrate_activations(
    model: QuantModel, samples: CalibrationSet, count: int, observer: str, *, quantized_weights: bool
) -> None:
    """Set the range of every activation quantizer from what it sees, with no activation quantized.

    Args:
        model: the network.
        samples: the calibration set.
        count: how many of them to look at; they are gone through twice.
        observer: how ranges are searched where the scheme does not say.
        quantized_weights: watch the network with quantized weights instead of float ones.

    Raises:
        ModelError: a quantizer saw nothing; names it.
    """
    with model.mode(weights=quantized_weights, activations=False), torch.no_grad():
        observe(model.quantizers.values(), lambda: samples.run(model, count), observer)
    model.require_calibrated()


def observe(quantizers: Iterable[ActivationQuantizer], run: Callable[[], None], observer: str) -> None:
    """Calibrate quantizers on what they see while `run` is called, twice: for ranges, then for what lies in them.

    A quantizer that sees nothing, or whose grid is fixed, keeps the state it had.
    """
    watched = [(quantizer, quantizer.new_watcher()) for quantizer in quantizers if not quantizer.fixed]
    with shown(watched, run):
        for quantizer, watcher in watched:
            if not watcher.empty:
                quantizer.calibrate(observer)


@contextmanager
def shown(watched: Sequence[tuple[ActivationQuantizer, Watcher]], run: Callable[[], None]) -> Iterator[None]:
    """Let watchers see what quantizers are given while `run` is called, twice: for ranges, then for what lies in them.

    Nothing is quantized meanwhile. Several quantizers may have one watcher; inside they have it still.
    """
    try:
        for quantizer, watcher in watched:
            quantizer.watcher, quantizer.watching_range = watcher, True
        run()
        for quantizer, _ in watched:
            quantizer.watching_range = False
        run()
        yield
    finally:
        for quantizer, _ in watched:
            quantizer.watcher, quantizer.watching_range = None, False
