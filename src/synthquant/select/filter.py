"""What all filters have: how many images stay, and a way to run alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.methods import SELECTORS
from synthquant.select.keep import checked_keep
from synthquant.select.sequence import registered_name, run_filters

if TYPE_CHECKING:
    from torch import Tensor

    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.methods import Candidates, Probe
    from synthquant.models.float_model import FloatModel


class Filter(Settings, ABC):
    """Base of the filters."""

    keeps_highest: ClassVar[bool] = False

    keep: int | float = 0.7071
    """What stays: a share above 0 and up to 1, or a count of images. Two filters that keep 0.7071 leave a half."""

    per_class: bool = False
    """Whether `keep` holds for each class by itself, which takes labelled images."""

    @field_validator("keep", mode="before")
    @classmethod
    def _check_keep(cls, keep: Any) -> int | float:
        return checked_keep(keep)

    @abstractmethod
    def supports(self, model: FloatModel) -> bool:
        """Return whether the network has what the scores are made from."""

    @abstractmethod
    def probe(self, model: FloatModel) -> Probe:
        """Return what watches the forward pass. Raises `UnsupportedModelError` if the network is unfit."""

    @abstractmethod
    def scores(self, candidates: Candidates) -> Tensor:
        """Return the scores, float64 `[n]`, of the candidates, in their order."""

    def select(
        self, images: ImageSet, model: FloatModel, rng: Rng, *, batch_size: int = 64, progress: Progress = QUIET
    ) -> ImageSet:
        """Return what this filter alone keeps of `images`, in their order, with the scores as a column.

        Raises:
            UnsupportedModelError: the network lacks what the scores are made from.
            DataError: no image can be used, there are fewer than are to stay, or labels are missing.
        """
        return run_filters([self], images, model, rng, batch_size=batch_size, progress=progress).kept


def unfit(filter_: Filter, model: FloatModel, lacks: str) -> UnsupportedModelError:
    """Return the error for a network without what a filter needs; it names the filters that do work for it."""
    method = registered_name(filter_)
    others = [name for name, other in SELECTORS.items() if name != method and other().supports(model)]
    return UnsupportedModelError(
        f"{model.name} has {lacks}, which {method} needs; use a filter that works for it: {', '.join(others)}"
    )
