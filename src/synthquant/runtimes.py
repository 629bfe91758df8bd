"""Exporters whose files a runtime executes: what they have beyond others, and which one wrote a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from pydantic import Field

from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.methods import EXPORTERS, Exporter

if TYPE_CHECKING:
    from torch import Tensor

    from synthquant.data.preprocess import Preprocess
    from synthquant.models.float_model import RecordedSource, Task
    from synthquant.nn.scheme import QuantScheme


@dataclass(frozen=True)
class ExportedNetwork:
    """A file that an exporter wrote, opened: what it computes, and what it says about itself."""

    function: Callable[[Sequence[Tensor]], list[Tensor]]
    """Images `[B, C, H, W]`, normalised and alone in a list, to all tensors of the output, in order; on the CPU."""
    outputs: tuple[str, ...]
    """Names of these tensors in the file."""
    task: Task
    """What the network does."""
    preprocess: Preprocess
    """How images become input."""
    scheme: QuantScheme
    """How the network is quantized."""
    name: str
    """Short name of the network before quantization."""
    source: RecordedSource
    """Where that came from."""
    fingerprint: str
    """Hash of its weights."""
    num_classes: int | None
    """Number of logits."""
    class_names: tuple[str, ...] | None
    """Names of the classes, where known."""

    def run(self, images: Tensor) -> Tensor:
        """Return the first output for images: logits `[B, classes]` of a classifier."""
        return self.function([images])[0]


class SpeedTest(Settings):
    """How the speed of an exported network is measured."""

    batch: int = Field(default=1, ge=1, le=65_536)
    """Images in one call."""
    threads: int = Field(default=2, ge=1, le=1024)
    """Threads of the runtime."""
    seconds: float = Field(default=10.0, ge=0.1, le=86_400)
    """Time to measure each of the two networks for."""


class RuntimeExporter(Exporter, Protocol):
    """An exporter whose files a runtime executes: `evaluate` and `benchmark` find it by the suffix of a file."""

    runtimes: ClassVar[tuple[str, ...]]
    """Names of runtimes that `open` knows, the usual one first."""

    @classmethod
    def open(cls, path: Path, runtime: str | None = None, *, threads: int | None = None) -> ExportedNetwork:
        """Load what `export` wrote into a runtime, by default the usual one; runs no code that the file names.

        Raises `ModelError` if it cannot be loaded or was not written by `export`, `UnknownNameError` if there is no
        such runtime.
        """
        ...

    @classmethod
    def benchmark(
        cls,
        path: Path,
        test: SpeedTest,
        *,
        model: str | None = None,
        trust_code: bool = False,
        progress: Progress = QUIET,
    ) -> dict[str, Any]:
        """Measure a file beside the float network in the same form and runtime, in turns.

        Returns rows `float` and `quantized` (`milliseconds`, `images_per_second`, `bytes`), `speedup`, `size_ratio`,
        `vnni` and `environment`. `model` is the name of the network that was quantized, which lets code of its run, as
        `trust_code` does.
        """
        ...


def runtime_exporters() -> tuple[type[RuntimeExporter], ...]:
    """Return the exporters whose files a runtime executes, sorted by name."""
    return tuple(cast("type[RuntimeExporter]", one) for _, one in EXPORTERS.items() if hasattr(one, "runtimes"))


def exporter_of(path: Path | str) -> type[RuntimeExporter] | None:
    """Return the exporter whose files end as `path` does and can be executed; none if there is none."""
    return next((exporter for exporter in runtime_exporters() if str(path).endswith(exporter.suffix)), None)
