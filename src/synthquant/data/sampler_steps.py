"""What the images of a set looked like at every step of the sampler, for a few of them: `steps.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from synthquant.core.errors import DataError, InputError
from synthquant.core.tensor_file import read_sealed_tensors, write_sealed_tensors

STEPS_NAME = "steps.safetensors"


@dataclass(frozen=True)
class SamplerSteps:
    """The noisy images that a denoiser was given."""

    images: Tensor
    """float32 `[S, N, ...]`: pixels or latents before each of S steps, from noise on."""
    times: Tensor
    """float64 `[S]`: the time of each step, as the denoiser is told it."""
    seeds: Tensor
    """int64 `[N]`: seeds of the images."""

    def write(self, folder: Path) -> None:
        """Write them beside the images of a set; raises `OutputError`."""
        tensors = {"images": self.images, "times": self.times, "seeds": self.seeds}
        write_sealed_tensors(folder / STEPS_NAME, tensors, {})

    @classmethod
    def read(cls, folder: Path | None) -> SamplerSteps | None:
        """Return what lies beside the images of a set; none if nothing does.

        Raises `DataError` if the file is not as it was written.
        """
        if folder is None or not (folder / STEPS_NAME).is_file():
            return None
        try:
            found = read_sealed_tensors(folder / STEPS_NAME).tensors
            return cls(found["images"], found["times"], found["seeds"])
        except (InputError, KeyError) as error:
            raise DataError(f"{folder / STEPS_NAME} holds no steps of a sampler: {error}") from error

    def paired(self, other: SamplerSteps) -> tuple[Tensor, Tensor] | None:
        """Return the images of equal seeds of both, `[S, P, ...]` each; none unless steps and shapes are the same."""
        if self.images.shape[2:] != other.images.shape[2:] or self.times.shape != other.times.shape:
            return None
        if not torch.equal(self.times, other.times):
            return None
        places = {seed: place for place, seed in enumerate(other.seeds.tolist())}
        found = [(place, places[seed]) for place, seed in enumerate(self.seeds.tolist()) if seed in places]
        if not found:
            return None
        first, second = (list(each) for each in zip(*found, strict=True))
        return self.images[:, first], other.images[:, second]
