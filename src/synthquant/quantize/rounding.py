"""What the methods that learn roundings have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.methods import MemoryBudget, QuantReport
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationImages, calibrate_activations, calibrate_weights
from synthquant.quantize.learn import Phase
from synthquant.quantize.reconstruct import Reconstruction

_PUBLISHED_LR, _PUBLISHED_ITERATIONS, _LARGEST_LR = 1e-3, 20_000, 0.03


class LearnedRounding(Settings):
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
    """How ranges are searched where the scheme does not say: `minmax`, `brecq`, `genie` or `qdrop`."""
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

    def rounding_phase(self) -> Phase:
        """AdaRound's pass over the units; methods replace what they do otherwise."""
        return Phase(
            name="weights",
            iterations=self.iterations,
            batch_size=self.batch_size,
            rounding_lr=self.effective_rounding_lr,
            rounding_weight=self.rounding_weight,
            warm_up=self.warm_up,
            beta=(self.beta_start, self.beta_end),
            unclipped_codes=self.unclipped_codes,
            inputs="student",
            activations=False,
            sampling="permutation",
        )


def prepare(
    model: QuantModel, images: ImageSet, settings: LearnedRounding, *, quantized_weights: bool
) -> CalibrationImages:
    """Calibrate weights and activations, and give the images as the network sees them."""
    calibration = CalibrationImages(model, images)
    calibrate_weights(model, settings.observer)
    calibrate_activations(
        model, calibration, settings.calibration_images, settings.observer, quantized_weights=quantized_weights
    )
    return calibration


def reconstruct(
    name: str,
    model: QuantModel,
    calibration: CalibrationImages,
    settings: LearnedRounding,
    phase: Phase,
    rng: Rng,
    progress: Progress,
    workdir: Path | None,
    memory: MemoryBudget,
) -> QuantReport:
    """Run one phase over all units."""
    engine = Reconstruction(model, calibration, settings.granularity, memory, workdir)
    units = engine.run(phase, rng.child(phase.name), progress)
    progress.say(f"{name}: peak cache {_describe(engine.store.peak)}")
    return QuantReport(method=name, units=tuple(units))


def _describe(peak: dict[str, int]) -> str:
    return ", ".join(f"{place} {size / 2**20:.0f} MiB" for place, size in peak.items() if size) or "empty"
