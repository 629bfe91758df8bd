"""PTQ4ViT: ranges searched by how much the network's answer depends on what they change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import QuantReport, UnitReport
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS, MemoryBudget
from synthquant.models.samples import Samples
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.functional import quantize
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.weight_quantizers import WeightQuantizer
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.readers import Reader, find_readers, record
from synthquant.quantize.unit_files import UnitFiles


@QUANTIZERS.register("ptq4vit")
class Ptq4Vit(Settings):
    """PTQ4ViT's Hessian-guided search of ranges (arXiv:2111.12293, section 3.3), for networks of any kind.

    Every layer, and every product of attention, with what it reads in the float network, is given the ranges with the
    smallest error of its output, weighed by the gradient there: those of the weights and those of what it reads in
    turn. One pass over the images serves all of them. The gradient is that of the cross-entropy of labels drawn from
    the network's own softmax.

    A range is a share of the whole one: grids lie as the scheme says, the authors' are symmetric. A scheme gives what a
    softmax and a GELU put out their quantizer: `attention.softmax.kind` and an override of the layer behind the GELU
    with the kind `twin_uniform`. What the scheme names an observer for keeps that range, and so does, with `deploy:
    full`, what no layer reads.
    """

    candidates: int = Field(default=100, ge=1)
    """Ranges that are tried for a weight or an activation, evenly spaced."""
    smallest_share: float = Field(default=0.01, gt=0)
    """The first of them, as a share of the whole range."""
    largest_share: float = Field(default=1.2, gt=0)
    """The last of them."""
    rounds: int = Field(default=3, ge=1)
    """How often weights and what they are multiplied by are searched in turn; it ends where nothing changes."""
    calibration_images: int = Field(default=32, ge=1)
    """Images of the search; all that layers read and put out for them is in memory."""

    def apply(
        self,
        quant_model: QuantModel,
        images: ImageSet | Samples,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
    ) -> QuantReport:
        """Set whole ranges, then search; what is finished is kept in `workdir`, a layer or a product at a time."""
        calibration, count = CalibrationSet(quant_model, images), self.calibration_images
        calibrate_weights(quant_model, "minmax")
        calibrate_activations(quant_model, calibration, count, "minmax", quantized_weights=False)
        groups = _that_share_quantizers(find_readers(quant_model))
        made_from = partial(self._made_from, quant_model, calibration, rng)
        files = UnitFiles(workdir, "ptq4vit", made_from, progress=progress)
        reports: list[UnitReport] = []
        recorded = False
        with progress.bar("search", len(groups)) as bar:
            for index, group in enumerate(groups):
                parts = [reader.layer for reader in group if reader.layer is not None], _searched(group)
                report = files.load(index, parts)
                if report is None:
                    if not recorded:
                        left = [reader for later in groups[index:] for reader in later]
                        record(quant_model, calibration, count, rng.generator("answers"), left)
                        recorded = True
                    report = self._fit(quant_model, group)
                    files.save(index, parts, report)
                for reader in group:
                    reader.calls.clear()
                reports.append(report)
                bar.advance(1)
        return QuantReport(method="ptq4vit", units=tuple(reports))

    def _fit(self, model: QuantModel, readers: Sequence[Reader]) -> UnitReport:
        started = time.perf_counter()
        with model.mode(weights=True, activations=False), torch.no_grad():
            self._search(readers)
        layers = tuple(reader.name for reader in readers if reader.layer is not None)
        return UnitReport(name=readers[0].name, layers=layers, seconds=time.perf_counter() - started)

    def _made_from(self, model: QuantModel, calibration: CalibrationSet, rng: Rng) -> tuple[object, ...]:
        equalization = None if model.equalization is None else model.equalization.fingerprint
        return (model.float_model.fingerprint, model.scheme, calibration.fingerprint, equalization, self, rng)

    def _search(self, readers: Sequence[Reader]) -> None:
        """Search what one layer or product has, or several that share a quantizer."""
        shares = torch.linspace(self.smallest_share, self.largest_share, self.candidates).tolist()
        steps: list[Callable[[], bool]] = []
        readers = [reader for reader in readers if reader.calls]
        for reader in readers:
            if (quantizer := _searched_weight(reader)) is not None:
                steps.append(partial(search_weight, reader, quantizer, quantizer.scale.clone(), shares))
        steps += [partial(search_activation, quantizer, readers, shares) for quantizer in _searched(readers)]
        due = [True] * len(steps)  # a search comes to what it came to before unless another one changed something
        for _ in range(self.rounds):
            for index, step in enumerate(steps):
                if due[index] and step():
                    due = [True] * len(steps)
                due[index] = False


def search_weight(reader: Reader, quantizer: WeightQuantizer, whole: Tensor, shares: Sequence[float]) -> bool:
    """Give each output channel of a layer the range with the smallest error, and round to nearest.

    All channels try a share of their ranges together, since none changes what another puts out. A channel keeps the
    range that it has unless another one is better.

    Args:
        reader: the layer.
        quantizer: of its weight.
        whole: scales that cover all of it.
        shares: of them, to be tried.

    Returns:
        Whether any range changed.
    """
    assert reader.layer is not None
    weight = quantizer.grouped(reader.layer.float_weight.float())
    present = best = quantizer.scale.clone()
    least: Tensor | None = None
    for scale in (present, *(whole * share for share in shares)):
        quantizer.set_codes(quantize(weight, scale, quantizer.zero_point, quantizer.args.quant_max), scale)
        error = reader.errors_of_channels()[:, None, None]
        error = error if len(scale) > 1 else error.sum(0, keepdim=True)
        best = scale if least is None else torch.where(error < least, scale, best)
        least = error if least is None else torch.minimum(error, least)
    quantizer.set_codes(quantize(weight, best, quantizer.zero_point, quantizer.args.quant_max), best)
    return not torch.equal(best, present)


def search_activation(quantizer: ActivationQuantizer, readers: Sequence[Reader], shares: Sequence[float]) -> bool:
    """Give a quantizer the grid with the smallest error of all that reads through it, or leave the one that it has.

    Returns:
        Whether the grid changed.
    """
    own = [reader for reader in readers if any(one is quantizer for one in reader.quantizers.values())]
    read = [x for reader in own for x in reader.read_through(quantizer)]
    low, high = min(float(x.amin()) for x in read), max(float(x.amax()) for x in read)
    present = {name: tensor.clone() for name, tensor in quantizer.grid().items()}
    grids = [present, *quantizer.candidates(low, high, shares)]
    errors = torch.stack([reader.errors_of(quantizer, grids) for reader in own]).sum(0).tolist()
    best = min(range(len(grids)), key=errors.__getitem__)
    quantizer.load_grid(grids[best])
    return best > 0


def _searched_weight(reader: Reader) -> WeightQuantizer | None:
    quantizer = None if reader.layer is None else reader.layer.weight_quantizer
    return None if quantizer is None or quantizer.args.observer is not None else quantizer


def _searched(readers: Sequence[Reader]) -> list[ActivationQuantizer]:
    found = {id(one): one for reader in readers for one in reader.quantizers.values()}
    return [one for one in found.values() if not one.fixed and one.args.observer is None]


def _that_share_quantizers(readers: Sequence[Reader]) -> list[list[Reader]]:
    """Readers in groups, in the order of their first, so that what one group is given changes nothing for another."""
    groups: list[list[Reader]] = []
    for reader in readers:
        own = {id(one) for one in reader.quantizers.values() if not one.fixed}
        joined = [group for group in groups if own & {id(one) for other in group for one in other.quantizers.values()}]
        if not joined:
            groups.append([reader])
            continue
        for group in joined[1:]:
            joined[0].extend(group)
            groups.remove(group)
        joined[0].append(reader)
    return groups
