"""ERQ: quantized weights from ridge regressions, without back-propagation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.weight_quantizers import WeightQuantizer
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.moments import InputMoments, gather
from synthquant.quantize.unit_files import UnitFiles, finite

# Added to the ridge, as a share of the mean square of a column, so that the factorisation exists without one.
_SMALLEST_RIDGE = 1e-10


@QUANTIZERS.register("erq")
class Erq(Settings):
    """ERQ: error reduction for post-training quantization (arXiv:2407.06794), for networks of any kind.

    Layer after layer, in the order in which they run, and without gradients: the weight and the bias are corrected for
    what quantizing the input does to the output (`regress`), then the weight is rounded half of the remaining columns
    at a time, and the columns that are left make up for each half (`round_by_halves`). What a layer reads is taken from
    the float network and quantized as the layer does, as the authors do: a layer answers for its own errors, not for
    those of earlier layers, and one pass over the images serves many layers. Ranges of activations are those of
    the float network. Nothing is drawn at random.

    The authors apply it after RepQ-ViT's reparameterisation (`equalize: layer_norms`) and leave a transformer's first
    layer out. Their code takes the last column for the bias in layers that have none, too.
    """

    ridge: float = Field(default=0.2, ge=0)
    """Weight of the squared correction for each row that a layer reads; the authors' is 0.16 to 0.3."""
    max_flips: int = Field(default=100, ge=0)
    """Roundings of an output row that are turned over at most, for each half of the columns."""
    observer: str = "genie"
    """How ranges are searched: `minmax`, `running`, `brecq`, `genie`, `qdrop` or `percentile`."""
    calibration_images: int = Field(default=32, ge=1)
    """Images from which activation ranges are set and weights regressed."""

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
        """Set ranges, then regress and round; finished layers are kept in `workdir`."""
        calibration = CalibrationSet(quant_model, images)
        calibrate_weights(quant_model, self.observer)
        calibrate_activations(quant_model, calibration, self.calibration_images, self.observer, quantized_weights=False)
        names = [name for name, layer in quant_model.layers.items() if layer.weight_quantizer is not None]
        made_from = partial(self._made_from, quant_model, calibration)
        files = UnitFiles(workdir, "erq", made_from, offsets=True, progress=progress)
        reports: list[UnitReport] = []
        moments: dict[str, InputMoments] = {}
        with progress.bar("regress", len(names)) as bar:
            for index, name in enumerate(names):
                layer = quant_model.layers[name]
                report = files.load(index, ([layer], []))
                if report is None:
                    if name not in moments:
                        moments = gather(quant_model, calibration, self.calibration_images, names[index:])
                    report = self._fit(name, layer, moments.pop(name), progress)
                    files.save(index, ([layer], []), report)
                reports.append(report)
                bar.advance(1)
        return QuantReport(method="erq", units=tuple(reports))

    def _fit(self, name: str, layer: QuantLayer, moments: InputMoments, progress: Progress) -> UnitReport:
        quantizer, started = layer.weight_quantizer, time.perf_counter()
        assert quantizer is not None
        if not moments.linear:
            progress.warn(f"{name} does more than multiply by its weight and is rounded to nearest")
            return UnitReport(name=name, layers=(name,))
        before = moments.output_error(_decoded(quantizer, moments))
        weight = moments.weight + regress(moments, self.ridge)
        own = weight[:, :, :-1] if moments.has_bias else weight
        quantizer.calibrate(quantizer.layout.weight(own.reshape(quantizer.layout.channels, -1)), self.observer)
        codes, weight = round_by_halves(weight, Grid.of(quantizer, own.shape), moments, self.ridge, self.max_flips)
        quantizer.set_codes(quantizer.grouped(quantizer.layout.weight(codes.reshape(quantizer.layout.channels, -1))))
        if moments.has_bias:
            layer.set_bias(weight[:, :, -1].reshape(-1).to(layer.bias))
        after = moments.output_error(weight)
        seconds = time.perf_counter() - started
        return UnitReport(name=name, layers=(name,), loss_start=finite(before), loss_end=finite(after), seconds=seconds)

    def _made_from(self, model: QuantModel, calibration: CalibrationSet) -> tuple[object, ...]:
        equalization = None if model.equalization is None else model.equalization.fingerprint
        return (model.float_model.fingerprint, model.scheme, calibration.fingerprint, equalization, self)


def regress(moments: InputMoments, ridge: float) -> Tensor:
    """The correction of a weight for its quantized input (arXiv:2407.06794, section 3.2), float64 `[G, C / G, K]`.

    It is the `dW` that minimises `sum |W x - (W + dW) a|^2 + ridge * rows * |dW|^2`: the solution of `dW (sum a a^T +
    ridge * rows) = sum W (x - a) a^T`.
    """
    return _solve(moments.gram, moments.cross, ridge * moments.rows)


@dataclass(frozen=True)
class Grid:
    """The grid of each weight, bias left out.

    Attributes:
        scale: float64 `[G, C / G, K]`.
        zero_point: float64, as `scale`.
        quant_max: the largest code.
    """

    scale: Tensor
    zero_point: Tensor
    quant_max: int

    @classmethod
    def of(cls, quantizer: WeightQuantizer, shape: torch.Size) -> Grid:
        """That of a quantizer's weight, seen in this shape."""
        like = torch.ones_like(quantizer.grouped(quantizer.codes), dtype=torch.float64)
        scale, zero_point = ((like * part).reshape(shape) for part in (quantizer.scale, quantizer.zero_point))
        return cls(scale, zero_point, quantizer.args.quant_max)

    def columns(self, start: int, stop: int) -> Grid:
        """The grid of some columns."""
        return Grid(self.scale[:, :, start:stop], self.zero_point[:, :, start:stop], self.quant_max)

    def decode(self, codes: Tensor) -> Tensor:
        """What codes of the grid's shape stand for."""
        return (codes - self.zero_point) * self.scale


def round_by_halves(
    weight: Tensor, grid: Grid, moments: InputMoments, ridge: float, max_flips: int
) -> tuple[Tensor, Tensor]:
    """Round a weight half of the remaining columns at a time (arXiv:2407.06794, section 3.3).

    With `d` the rounding error of one half `s` and `r` the columns behind it, a bias among them, these take the
    correction that minimises `sum |d a_s + dW_r a_r|^2 + ridge * rows * |dW_r|^2`.

    Args:
        weight: float64 `[G, C / G, K]`.
        grid: of its columns, without that of the bias.
        moments: of what the layer reads.
        ridge: weight of the squared correction for each row.
        max_flips: roundings turned over in each output row and half, at most.

    Returns:
        The codes, float64 `[G, C / G, K]` without the bias, and the weight that they and the bias amount to.
    """
    weight, gram, codes = weight.clone(), moments.gram, torch.empty_like(grid.scale)
    for start, stop in _halves(codes.shape[2]):
        part, own = grid.columns(start, stop), gram[:, start:stop, start:stop]
        codes[:, :, start:stop] = round_with_flips(weight[:, :, start:stop], part, own, max_flips)
        rounded = part.decode(codes[:, :, start:stop])
        error = rounded - weight[:, :, start:stop]
        weight[:, :, start:stop] = rounded
        if stop < weight.shape[2]:
            seen_behind = error @ gram[:, start:stop, stop:]
            weight[:, :, stop:] -= _solve(gram[:, stop:, stop:], seen_behind, ridge * moments.rows)
    return codes, weight


def round_with_flips(weight: Tensor, grid: Grid, gram: Tensor, max_flips: int) -> Tensor:
    """Round to nearest, then turn over the rounding that lowers `d gram d^T` most, as long as there is one.

    `d` is the rounding error of an output row; a weight may go to either of its two neighbours on the grid. The authors
    pick flips by the gradient of that error; here each flip's whole change of it decides, for all output rows at once.

    Args:
        weight: float64 `[G, C / G, n]`.
        grid: of these columns.
        gram: sum of `a a^T` of these columns, `[G, n, n]`.
        max_flips: for each output row.

    Returns:
        Codes, float64, of the weight's shape.
    """
    ratio = weight / grid.scale + grid.zero_point
    codes = ratio.round().clamp(0, grid.quant_max)
    other = torch.where(codes > ratio, codes - 1, codes + 1)
    step = torch.where((other >= 0) & (other <= grid.quant_max), other - codes, 0)  # 0: no such neighbour
    slope = (grid.decode(codes) - weight) @ gram
    square = gram.diagonal(dim1=1, dim2=2)[:, None]
    for _ in range(max_flips):
        moved = step * grid.scale
        change, column = (moved * (2 * slope + moved * square)).min(2, keepdim=True)
        flipped = change < 0
        if not bool(flipped.any()):
            break
        taken = torch.where(flipped, step.gather(2, column), 0)
        codes.scatter_add_(2, column, taken)
        step.scatter_add_(2, column, -2 * taken)
        of_column = gram.gather(1, column.expand(-1, -1, gram.shape[2]))
        slope += taken * grid.scale.gather(2, column) * of_column
    return codes


def _halves(columns: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < columns:
        stop = start + (columns - start + 1) // 2
        yield start, stop
        start = stop


def _decoded(quantizer: WeightQuantizer, moments: InputMoments) -> Tensor:
    """The weight as its codes stand for it, with the float bias, float64 `[G, C / G, K]`."""
    weight = moments.weight.clone()
    rows = quantizer.layout.rows(quantizer()).double().reshape(*weight.shape[:2], -1)
    weight[:, :, : rows.shape[2]] = rows
    return weight


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """`X` with `X (gram + ridge) = right`, for symmetric `gram`, float64 `[G, K, K]`; not by an inverse."""
    size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    added = ridge + _SMALLEST_RIDGE * size + torch.finfo(gram.dtype).tiny
    factor = torch.linalg.cholesky(gram + added * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(right.mT, factor).mT
