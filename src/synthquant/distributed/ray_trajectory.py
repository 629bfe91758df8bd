"""Recording a diffusion model's trajectory over a Ray cluster: workers sample batches, this process writes them.

A batch's conditions and seeds follow from its number, so a batch of a lost worker is sampled again by the one in its
place. Parts are written here, in order, so that the trajectory is the one that a single process makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from synthquant.core.errors import InputError
from synthquant.distributed.ray_cluster import Worker
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.synthesize.self_sampling import Packed, Piece, SamplingTask, denoiser_of


@dataclass(frozen=True)
class RecorderTask:
    """What workers need to know."""

    source: ModelSource
    """The pipeline."""
    sampling: SamplingTask
    """What is recorded of it."""


class Recorder(Worker):
    """Opens the pipeline and samples."""

    def open(self, task: RecorderTask, device: str) -> None:
        """Open the pipeline."""
        pipeline = denoiser_of(open_model(task.source, device=device)).pipeline
        self._fingerprint = pipeline.fingerprint
        self._sampler = task.sampling.sampler(pipeline)

    def record(self, piece: Piece) -> Packed:
        """Return a part."""
        return self._sampler.record(piece)

    def _opened(self) -> str:
        return self._fingerprint


def require_same_pipeline(fingerprints: list[str], model: FloatModel) -> None:
    """Raise `InputError` if a worker has opened another pipeline than this process has."""
    if any(fingerprint != denoiser_of(model).pipeline.fingerprint for fingerprint in fingerprints):
        raise InputError(
            f"a worker opens another pipeline under the name {model.source.source} than this machine; give all machines"
            " the same files"
        )
