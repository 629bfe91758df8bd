"""Static ranges of differences between the steps of a sampler, for modulated networks (MoDiff, arXiv:2506.22463)."""

from __future__ import annotations

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import ModulationReport
from synthquant.data.image_set import ImageSet
from synthquant.models.samples import Samples, SteppedSamples, is_stepped, samples_for
from synthquant.models.signature import Inputs
from synthquant.nn.modulation import Modulation
from synthquant.nn.observers import ActivationHistogram
from synthquant.nn.quant_model import QuantModel

IMAGES = 32
"""Trajectories that ranges are set from: as many as the authors say are enough for ranges by minimum and maximum."""


def modulation_report(
    model: QuantModel, source: ImageSet | Samples | None, progress: Progress = QUIET
) -> ModulationReport | None:
    """Set the static ranges of a modulated network, if it has such, and tell what a sampler's run will keep.

    Args:
        model: a quantized network, whose roundings are what they will be; none is returned if it is not modulated.
        source: what it was quantized with; for static ranges a trajectory whose steps follow each other.
        progress: told how far it is, and what is kept.

    Raises:
        DataError: ranges are static and the source is no such trajectory.
    """
    modulation = model.modulation
    if modulation is None:
        return None
    images = 0 if modulation.calibrated else calibrate_differences(model, source, progress=progress)
    progress.say(str(modulation))
    return ModulationReport(
        layers=len(modulation.layers), bytes_per_row=modulation.bytes_per_sample, images=images or None
    )


def calibrate_differences(
    model: QuantModel,
    source: ImageSet | Samples | None,
    images: int = IMAGES,
    observer: str = "genie",
    progress: Progress = QUIET,
) -> int:
    """Set the range of each layer's differences from those between the steps of a trajectory.

    The network runs over each image's steps as a sampler would call it, with quantized weights and float activations,
    twice: for ranges, then for what lies in them.

    Args:
        model: a modulated network with static ranges.
        source: rows of a sampler's inputs, of all of its steps.
        images: how many images' trajectories to look at: the first ones.
        observer: how ranges are searched, where the scheme's `input_activations` does not say. The authors' ranges are
            those from the smallest to the largest difference; what a smaller one cuts off is part of the next step's.
        progress: told how far it is.

    Returns:
        How many images there were.

    Raises:
        DataError: the source is no trajectory, it has not all of the sampler's steps, or no image has.
    """
    modulation, rows = model.modulation, _Trajectories(model, source)
    assert modulation is not None
    chosen = rows.images[:images]
    watched = [reading for reading in modulation.readings.values() if not reading.calibrated]
    with model.mode(weights=True, activations=False), torch.no_grad(), progress.bar("differences", 2) as bar:
        try:
            for reading in watched:
                reading.watcher = ActivationHistogram()
            for first in (True, False):
                for reading in watched:
                    reading.watching_range = first
                rows.run(modulation, chosen)
                bar.advance(1)
            for reading in watched:
                reading.calibrate(reading.args.observer or observer)
        finally:
            for reading in watched:
                reading.watcher, reading.watching_range = None, False
    modulation.run.timesteps = torch.tensor(rows.timesteps, dtype=torch.float64)
    return len(chosen)


_KEPT_BYTES = 2**30
"""Of what the network keeps between steps, for all trajectories that run at a time."""


class _Trajectories:
    """The rows of a trajectory, image by image and step by step."""

    def __init__(self, model: QuantModel, source: ImageSet | Samples | None) -> None:
        if source is None or isinstance(source, ImageSet) or not is_stepped(source):
            raise DataError(
                f"{model.float_model.name}: static ranges of differences are set from a trajectory, which knows images"
                " and steps of its rows (synthesize --method self_sampling); give one, or set"
                " scheme.modulation.ranges=dynamic"
            )
        recorded = len(set(source.steps.tolist()))
        if not source.is_consecutive or recorded != len(source.timesteps):
            raise DataError(
                f"{model.float_model.name}: static ranges of differences need all {len(source.timesteps)} steps of the"
                f" sampler, one after the other, and the trajectory has {recorded} of them; record all (self_sampling"
                " with steps=null), or set scheme.modulation.ranges=dynamic"
            )
        self._model, self._samples = model, samples_for(model.float_model, source)
        self._rows = _rows_of_images(source, model.float_model.name)
        self.images = list(range(len(self._rows)))
        self.timesteps: list[float] = []

    def run(self, modulation: Modulation, chosen: list[int]) -> None:
        """Let the trajectories of some images go through the network, as many at once as its memory allows."""
        most = max(1, min(len(chosen), _KEPT_BYTES // modulation.bytes_per_sample))
        at_once = self._model.float_model.samples_at_once(most)
        for start in range(0, len(chosen), at_once):
            rows = self._rows[torch.tensor(chosen[start : start + at_once])]
            order = rows.T.reshape(-1).tolist()
            self.timesteps = []
            with modulation.sampling():
                for batch in self._samples.batches(len(rows), order):
                    self._call(modulation, batch, len(rows))

    def _call(self, modulation: Modulation, batch: Inputs, count: int) -> None:
        if len(batch) != count or not batch.finite:
            raise DataError("a row of the trajectory cannot be read or is not finite; record it anew")
        self.timesteps.append(modulation.run.timestep_of(batch))
        batch.to(self._model.device).call(self._model)


def _rows_of_images(source: SteppedSamples, name: str) -> Tensor:
    """Positions of rows, int64 `[images, S]`, steps in the order of the sampler; images that lack a step left out.

    With guidance an image has several rows at a step, and each is a trajectory of its own.
    """
    steps, images = source.steps.tolist(), source.images.tolist()
    found: dict[int, dict[int, list[int]]] = {}
    for row, (step, image) in enumerate(zip(steps, images, strict=True)):
        found.setdefault(image, {}).setdefault(step, []).append(row)
    wanted, trajectories = sorted(set(steps)), []
    for of_steps in found.values():
        counts = {len(rows) for rows in of_steps.values()}
        if sorted(of_steps) == wanted and len(counts) == 1:
            trajectories += [list(rows) for rows in zip(*(of_steps[step] for step in wanted), strict=True)]
    if not trajectories:
        raise DataError(
            f"{name}: the trajectory has no image with rows at all of its {len(wanted)} steps; make it larger"
        )
    return torch.tensor(trajectories)
