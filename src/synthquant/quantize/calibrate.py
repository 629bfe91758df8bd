"""Ranges: where the grids of weights and activations lie before anything is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from synthquant.core.errors import DataError
from synthquant.core.files import sha256_bytes
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.quant_model import QuantModel

_MOST_AT_ONCE = 64


class CalibrationImages:
    """The images a network is quantized with, as the network sees them.

    Synthesis may leave the range of pixels; no picture does. Values beyond black and white are cut off, for the float
    network too: the grid of the image ends there, and what it cuts off would be learned as an error of the quantized
    network, to be made up for by wrong roundings.

    Attributes:
        at_once: how many go through the network together without gradients.
    """

    def __init__(self, model: QuantModel, images: ImageSet) -> None:
        """Take a set in pixel space.

        Raises:
            DataError: the set is empty.
        """
        if len(images) == 0:
            raise DataError("0 images to quantize with; synthesize some or give a folder that holds some")
        self.at_once = model.float_model.images_at_once(_MOST_AT_ONCE)
        self._images = images
        self._preprocess = model.float_model.preprocess
        self._device = model.device

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the images or their preprocessing change."""
        return sha256_bytes(f"{self._images.fingerprint} {self._preprocess.model_dump_json()}".encode())

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        return len(self._images)

    def batches(self, limit: int | None = None, size: int | None = None) -> Iterator[torch.Tensor]:
        """Normalised images `[B, 3, H, W]` on the model's device, the first `limit` of them, in batches of `size`.

        Raises:
            DataError: not one image can be read, or one has values that are not finite.
        """
        chosen = range(len(self) if limit is None else min(limit, len(self)))
        found = False
        for batch in input_batches(self._images, self._preprocess, size or self.at_once, chosen):
            found = True
            if not torch.isfinite(batch.inputs).all():
                raise DataError("an image to quantize with has values that are not finite; make the images anew")
            yield self._preprocess.cut_off(batch.inputs.to(self._device))
        if not found:
            raise DataError(f"none of the {len(chosen)} images to quantize with can be read")


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
    model: QuantModel, images: CalibrationImages, count: int, observer: str, *, quantized_weights: bool
) -> None:
    """Set the range of every activation quantizer from what it sees, with no activation quantized.

    Args:
        model: the network.
        images: the calibration images.
        count: how many of them to look at; they are gone through twice.
        observer: how ranges are searched where the scheme does not say.
        quantized_weights: watch the network with quantized weights instead of float ones.

    Raises:
        ModelError: a quantizer saw nothing; names it.
    """
    with model.mode(weights=quantized_weights, activations=False), torch.no_grad():
        observe(model.quantizers.values(), lambda: _run(model, images.batches(count)), observer)
    model.require_calibrated()


def observe(quantizers: Iterable[ActivationQuantizer], run: Callable[[], None], observer: str) -> None:
    """Calibrate quantizers on what they see while `run` is called, twice: for ranges, then for what lies in them.

    A quantizer that sees nothing, or whose grid is fixed, keeps the state it had.
    """
    watched = [quantizer for quantizer in quantizers if not quantizer.fixed]
    with _observing(watched):
        for quantizer in watched:
            quantizer.watching_range = True
        run()
        for quantizer in watched:
            quantizer.watching_range = False
        run()
        for quantizer in watched:
            if quantizer.watcher is not None and not quantizer.watcher.empty:
                quantizer.calibrate(observer)


@contextmanager
def _observing(quantizers: list[ActivationQuantizer]) -> Iterator[None]:
    try:
        for quantizer in quantizers:
            quantizer.watcher = quantizer.new_watcher()
        yield
    finally:
        for quantizer in quantizers:
            quantizer.watcher = None
            quantizer.watching_range = False


def _run(model: QuantModel, batches: Iterator[torch.Tensor]) -> None:
    for batch in batches:
        model(batch)
