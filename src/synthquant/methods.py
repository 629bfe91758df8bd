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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeGuard

from pydantic import Field

from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.registry import Registry
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from synthquant.core.run_metrics import FineTuneMetrics
    from synthquant.data.image_set import ImageSet
    from synthquant.diffusion.trajectory import Trajectory
    from synthquant.models.float_model import FloatModel
    from synthquant.models.samples import Samples
    from synthquant.nn.quant_model import QuantModel


Equalize = Literal["none", "weights", "activations", "layer_norms"]
"""What channels are scaled by before quantization: nothing, ranges of weights (DFQ) or of activations (SmoothQuant), or
grids for each channel of what layer norms put out (RepQ-ViT)."""


class MemoryBudget(Settings):
    """How much memory the caches of reconstruction may take, and in which precision they are kept."""

    device_gib: float | None = Field(default=None, ge=0)
    """GiB of cache kept on an accelerator; none: half of what is free there. Not used on a CPU."""

    host_gib: float | None = Field(default=None, ge=0)
    """GiB of cache kept in main memory; none: half of what is free. What does not fit goes to files of the run."""

    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of cached unit inputs and outputs; half precision halves the cache."""


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning came to."""

    best: QuantModel
    """The network with the best agreement on images held out: the result."""
    last: QuantModel
    """The network of the last step."""
    report: FineTuneMetrics
    """What was done and measured."""


class Synthesizer(Protocol):
    """Makes images from a trained network alone, or what a diffusion model samples of itself."""

    def synthesize(
        self,
        model: FloatModel,
        count: int,
        rng: Rng,
        *,
        writer: Any = None,
        progress: Progress = QUIET,
    ) -> ImageSet | Trajectory:
        """Make exactly `count` images in pixel space; the last batch may be smaller.

        With a `writer`, each batch is one part on disk and parts that are already there are skipped. Batch `b` draws
        only from `rng.child(f"batch-{b}")`, or its images from `rng.child(f"image-{i}")` with their numbers in the set,
        so that a resumed run makes the same bytes. A writer is an `ImageSetWriter`; a method that makes something else,
        which says `makes_images = False`, opens one of its own (`open_writer`).
        """
        ...


class Probe(Protocol):
    """Watches forward passes of a network and sums up what it saw in a row of numbers for every image."""

    @property
    def name(self) -> str:
        """What the rows are; probes of equal names give equal rows, so that one of them serves all their filters."""
        ...

    def watch(self, count: int) -> AbstractContextManager[object]:
        """Watch the forward pass of `count` images that runs inside; nothing of it stays in the network."""
        ...

    def rows(self, logits: Tensor) -> Tensor:
        """Return float32 `[B, K]` for the pass that was watched last, which gave `logits` `[B, classes]`.

        Raises `UnsupportedModelError` if the network did not show what the probe looks for.
        """
        ...


@dataclass(frozen=True)
class Candidates:
    """What a filter scores: the images that earlier filters left, what was seen of them, and the network."""

    probe: Any
    """What the filter's `probe` returned, after the pass."""
    table: Tensor
    """`[M, K]`, the rows of the probe, on the CPU, perhaps larger than memory: read `chosen` rows in pieces."""
    chosen: Tensor
    """int64 `[n]`, the rows of the candidates."""
    images: ImageSet
    """The candidates, in the order of `chosen`."""
    model: FloatModel
    """The network."""
    rng: Rng
    """For what is drawn."""
    batch_size: int = 64
    """Images in a forward pass."""
    progress: Progress = QUIET
    """Told how far it is."""


class Selector(Protocol):
    """Gives every image a score, and keeps the images that resemble what the network was trained on.

    Its fields `keep` and `per_class` say how many. Several of them in sequence share one forward pass over the pool.
    """

    keeps_highest: ClassVar[bool]
    """Whether a high score is a good one."""

    @property
    def keep(self) -> int | float:
        """How many images stay: a count, or a share above 0 and up to 1."""
        ...

    @property
    def per_class(self) -> bool:
        """Whether `keep` is meant for each class."""
        ...

    def supports(self, model: FloatModel) -> bool:
        """Return whether the network has what the scores are made from; may run it on a few images of noise."""
        ...

    def probe(self, model: FloatModel) -> Probe:
        """Return what watches the forward pass. Raises `UnsupportedModelError` if the network is seen to be unfit."""
        ...

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the scores, float64 `[n]`, of the candidates, in their order.

        A filter that learns something from the images that earlier filters left does it here.
        """
        ...

    def select(
        self, images: ImageSet, model: FloatModel, rng: Rng, *, batch_size: int = 64, progress: Progress = QUIET
    ) -> ImageSet:
        """Return a subset of `images` in their order, with the scores kept as a column."""
        ...


class QuantStep(Protocol):
    """Sets the scales, zero points and roundings of a quantized model."""

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
        """Quantize `quant_model` in place with `images`, or with samples of what else the network takes.

        With a `workdir`, each finished unit is saved there and a killed run resumes after it.
        """
        ...


class GeneratingStep(QuantStep, Protocol):
    """A quantization step that can do without given images, because it makes its own while it trains."""

    needs_images: ClassVar[bool]
    """False. Steps that do not say it need images."""

    def apply(
        self,
        quant_model: QuantModel,
        images: ImageSet | Samples | None,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
    ) -> QuantReport:
        """Quantize `quant_model` in place, with images of its own, and with `images` if there are any.

        What it makes it keeps in `workdir` with what it has learned, so that a killed run resumes there.
        """
        ...


class CheckingStep(QuantStep, Protocol):
    """A quantization step that does not work for every network."""

    def check(self, quant_model: QuantModel) -> None:
        """Raise `UnsupportedModelError` if a network, just built, is not one for it; asked before images are made."""
        ...


def is_checking(step: QuantStep) -> TypeGuard[CheckingStep]:
    """Return whether a step says for which networks it works."""
    return hasattr(step, "check")


def is_generating(step: QuantStep) -> TypeGuard[GeneratingStep]:
    """Return whether a step can do without given images."""
    return not getattr(step, "needs_images", True)


class FineTuner(Protocol):
    """Trains a quantized network end to end, with the float network as its teacher."""

    needs_images: ClassVar[bool]
    """Whether it cannot do without given images."""

    def check(self, model: FloatModel) -> None:
        """Raise `UnsupportedModelError` if a network cannot be trained so; asked before anything is quantized."""
        ...

    def train(
        self,
        quant_model: QuantModel,
        images: ImageSet | None,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
    ) -> FineTuned:
        """Train a copy of `quant_model`, which stays as it is, and choose the best state on images held out.

        With a `workdir` its state is kept there, and a killed training goes on to the same bytes.
        """
        ...


class Exporter(Protocol):
    """Writes a quantized model in a form that something else loads; its fields are its options."""

    suffix: ClassVar[str]
    """How the names of its files end; empty: it writes a folder."""

    def export(self, quant_model: QuantModel, path: Path, *, origin: Mapping[str, str] | None = None) -> Path:
        """Write the file or folder `path`, replacing what is there, and return it.

        `origin` is what else is known of where the model comes from, for forms that have room for it.
        """
        ...

    def check(self, quant_model: QuantModel) -> None:
        """Raise `SchemeError` if this form cannot express the scheme; asked before anything is quantized."""
        ...

    def verify(
        self, quant_model: QuantModel, path: Path, images: ImageSet | Samples, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        """Load what `export` wrote, compare it with `quant_model` on `images`, and return what was measured.

        Raises `VerificationError` if it is not what was promised.
        """
        ...


_HOME = "synthquant.api"
SYNTHESIZERS: Registry[type[Synthesizer]] = Registry("synthesis method", home=_HOME)
SELECTORS: Registry[type[Selector]] = Registry("selection method", home=_HOME)
QUANTIZERS: Registry[type[QuantStep]] = Registry("quantization method", home=_HOME)
FINE_TUNERS: Registry[type[FineTuner]] = Registry("fine-tuning method", home=_HOME)
EXPORTERS: Registry[type[Exporter]] = Registry("exporter", home=_HOME)
