"""What the methods that learn roundings have in common: settings, and the one way to apply them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from synthquant.core import formatting
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import QuantReport, UnitReport
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS, MemoryBudget
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.learn import Phase
from synthquant.quantize.reconstruct import Reconstruction

_PUBLISHED_LR, _PUBLISHED_ITERATIONS, _LARGEST_LR = 1e-3, 20_000, 0.03


class LearnedRounding(Settings, ABC):
    """Settings of AdaRound's soft rounding (arXiv:2004.10568), which BRECQ, QDrop and Genie-M share."""

    renamed: ClassVar[Mapping[str, str]] = {"keep": "quantize_probability"}

    granularity: Literal["block", "layer", "network"] = "block"
    """What is fitted at a time: a block of the network, one layer, or the whole network."""
    iterations: int = Field(default=20000, ge=0)
    """Optimisation steps for each unit."""
    batch_size: int = Field(default=32, ge=1)
    """Images in a step."""
    rounding_lr: float | None = Field(default=None, gt=0)
    """Adam learning rate of the rounding logits, constant; none: 1e-3 at 20,000 iterations, as in the papers, and for
    fewer as much more as lets a logit travel as far, at most 0.03."""
    rounding_weight: float = Field(default=0.01, ge=0)
    """Factor of the regulariser that pushes roundings to 0 or 1, relative to an error summed over channels."""
    warm_up: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps before the regulariser sets in."""
    beta_start: float = Field(default=20.0, gt=1)
    """Exponent of the regulariser when it sets in: high, so that only nearly decided roundings are pushed."""
    beta_end: float = Field(default=2.0, gt=1)
    """Exponent of the regulariser at the last step."""
    unclipped_codes: bool = False
    """Keep codes that learning put beyond the grid, in 16 bits, for fine-tuning that moves scales; nothing is computed
    otherwise."""
    observer: str = "genie"
    """How ranges are searched where the scheme does not say: `minmax`, `running`, `brecq`, `genie`, `qdrop` or
    `percentile`."""
    calibration_images: int = Field(default=64, ge=1)
    """Images from which activation ranges are set."""

    @property
    def effective_rounding_lr(self) -> float:
        """The learning rate of the rounding logits that is used.

        Logits start within 2.4 of 0 and Adam moves them by about the learning rate a step: at 1e-3, a few hundred steps
        cannot turn a rounding over, and almost all are undecided at the end.
        """
        if self.rounding_lr is not None:
            return self.rounding_lr
        return min(
            _PUBLISHED_LR * _PUBLISHED_ITERATIONS / min(max(self.iterations, 1), _PUBLISHED_ITERATIONS), _LARGEST_LR
        )

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The passes over the units, in order; the method's equations are what they say."""

    def rounding_phase(self) -> Phase:
        """AdaRound's pass, in which roundings are learned; methods replace what they do otherwise."""
        return Phase(
            name="weights",
            iterations=self.iterations,
            batch_size=self.batch_size,
            inputs="student",
            activations=False,
            rounding_lr=self.effective_rounding_lr,
            rounding_weight=self.rounding_weight,
            warm_up=self.warm_up,
            beta=(self.beta_start, self.beta_end),
            weight_scale_lr=0.0,
            weight_lr=0.0,
            activation_scale_lr=0.0,
            quantize_probability=1.0,
            lsq_gradient_scale=False,
            error="outputs",
            fisher_rank=0,
            norm=2.0,
            sampling="permutation",
            fisher=None,
            calibrate_images=None,
            observer=self.observer,
            unclipped_codes=self.unclipped_codes,
            skip_first_layer=False,
        )

    @staticmethod
    def activation_phase(after: Phase, iterations: int, lr: float, norm: float) -> Phase:
        """BRECQ's second pass: activation step sizes from clean inputs, roundings done; the rest as `after`."""
        return replace(
            after,
            name="activations",
            iterations=iterations,
            inputs="teacher",
            activations=True,
            rounding_lr=0.0,
            rounding_weight=0.0,
            activation_scale_lr=lr,
            norm=norm,
        )

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
        """Set ranges, then go through the phases.

        Weights that were learned with activations in floating point change these: their ranges are set anew.
        """
        method, calibration = QUANTIZERS.name_of(type(self)), CalibrationSet(quant_model, images)
        calibrate_weights(quant_model, self.observer)
        self.set_ranges(quant_model, calibration, quantized_weights=False)
        engine = Reconstruction(quant_model, calibration, self.granularity, memory, workdir)
        units: list[UnitReport] = []
        for phase in self.phases():
            if phase.rounding_lr or phase.weight_lr or quant_model.quantizers:
                units += engine.run(phase, rng.child(phase.name), progress)
            if quant_model.quantizers and not phase.activations:
                self.set_ranges(quant_model, calibration, quantized_weights=True)
        progress.say(f"{method}: peak cache {_describe(engine.store.peak)}")
        return QuantReport(method=method, units=tuple(units))

    def set_ranges(self, quant_model: QuantModel, calibration: CalibrationSet, *, quantized_weights: bool) -> None:
        """Set the ranges of activations, in the network with float or quantized weights."""
        count = self.calibration_images
        calibrate_activations(quant_model, calibration, count, self.observer, quantized_weights=quantized_weights)


def _describe(peak: dict[str, int]) -> str:
    return ", ".join(f"{place} {formatting.size(size)}" for place, size in peak.items() if size) or "empty"
