"""What can be plugged in: the protocol of every kind of method, and its registry.

A method is a `Settings` subclass, whose fields are its whole configuration, with one verb. The first line of its
docstring names the paper and its arXiv id. Adding one is a file and a decorator:

    @SYNTHESIZERS.register("my_method")
    class MyMethod(Settings):
        \"\"\"Title of the paper (arXiv:0000.00000).\"\"\"

        iterations: int = 100
        \"\"\"Optimisation steps per batch.\"\"\"

        def synthesize(self, model, count, rng, *, writer=None, progress=QUIET): ...

Recipe keys, `synthquant list` and `show`, `--set` and the contract tests follow from the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from synthquant.core.progress import QUIET, Progress
from synthquant.core.registry import Registry
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings

if TYPE_CHECKING:
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel
    from synthquant.nn.quant_model import QuantModel


class MemoryBudget(Settings):
    """How much memory the caches of reconstruction may take, and in which precision they are kept."""

    device_gib: float | None = Field(default=None, ge=0)
    """GiB of cache kept on an accelerator; none: half of what is free there. Not used on a CPU."""

    host_gib: float | None = Field(default=None, ge=0)
    """GiB of cache kept in main memory; none: half of what is free. What does not fit goes to files of the run."""

    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of cached unit inputs and outputs; half precision halves the cache."""


class UnitReport(Settings):
    """What became of one reconstruction unit."""

    name: str
    """Module name of the unit; empty for the whole network."""

    layers: tuple[str, ...] = ()
    """Names of the quantized layers in the unit."""

    loss_start: float | None = None
    """Reconstruction error before the first step: squared difference per sample, summed over channels."""

    loss_end: float | None = None
    """Reconstruction error after the last step, with hard rounding."""

    undecided: float | None = None
    """Share (0..1) of soft roundings that were neither 0 nor 1 when annealing ended; none for methods without them."""

    diverged: bool = False
    """Whether the unit ended worse than it started and was therefore put back to its start."""

    seconds: float = 0.0
    """Wall-clock time of the unit."""

    steps: tuple[int, ...] = ()
    """Iterations at which `losses` was sampled, at most about 200."""

    losses: tuple[float, ...] = ()
    """The loss at these iterations, for the report's curves."""


class QuantReport(Settings):
    """What a quantization step did, unit by unit."""

    method: str
    """Registered name of the method."""

    units: tuple[UnitReport, ...] = ()
    """The units in execution order; empty for methods that do not reconstruct."""

    @property
    def diverged(self) -> tuple[str, ...]:
        """Names of the units that were put back to their start."""
        return tuple(unit.name for unit in self.units if unit.diverged)


class Synthesizer(Protocol):
    """Makes images from a trained network alone."""

    def synthesize(
        self,
        model: FloatModel,
        count: int,
        rng: Rng,
        *,
        writer: ImageSetWriter | None = None,
        progress: Progress = QUIET,
    ) -> ImageSet:
        """Make exactly `count` images in pixel space; the last batch may be smaller.

        With a `writer`, each batch is one part on disk and parts that are already there are skipped. Batch `b` draws
        only from `rng.child(f"batch-{b}")`, so that a resumed run makes the same bytes.
        """
        ...


class Selector(Protocol):
    """Keeps the images that resemble what the network was trained on."""

    def select(self, images: ImageSet, model: FloatModel, rng: Rng, *, progress: Progress = QUIET) -> ImageSet:
        """Return a subset of `images`, with the scores kept as columns."""
        ...


class QuantStep(Protocol):
    """Sets the scales, zero points and roundings of a quantized model."""

    def apply(
        self,
        quant_model: QuantModel,
        images: ImageSet,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
    ) -> QuantReport:
        """Quantize `quant_model` in place with `images`.

        With a `workdir`, each finished unit is saved there and a killed run resumes after it.
        """
        ...


class Metric(Protocol):
    """Measures a quantized model beside its float model."""

    def measure(self, quant_model: QuantModel, images: ImageSet, *, progress: Progress = QUIET) -> dict[str, float]:
        """Return named numbers."""
        ...


class Exporter(Protocol):
    """Writes a quantized model in a form that something else loads."""

    def export(self, quant_model: QuantModel, path: Path, *, origin: Mapping[str, str] | None = None) -> Path:
        """Write the file or folder `path`, replacing what is there, and return it.

        `origin` is what else is known of where the model comes from, for forms that have room for it.
        """
        ...

    def verify(
        self, quant_model: QuantModel, path: Path, images: ImageSet, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        """Load what `export` wrote, compare it with `quant_model` on `images`, and return what was measured.

        Raises `VerificationError` if it is not what was promised.
        """
        ...


SYNTHESIZERS: Registry[type[Synthesizer]] = Registry("synthesis method")
SELECTORS: Registry[type[Selector]] = Registry("selection method")
QUANTIZERS: Registry[type[QuantStep]] = Registry("quantization method")
METRICS: Registry[type[Metric]] = Registry("metric")
EXPORTERS: Registry[type[Exporter]] = Registry("exporter")
