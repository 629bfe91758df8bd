"""A classifier of the zoo with weights from a file, which looks at what a generator draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from synthquant.evaluate.diversity import features_and_logits
from synthquant.models.float_model import ModelSource
from synthquant.models.open import open_model

_TOGETHER = 500


class Classifier:
    """A network of the zoo with its logits and the features that its last layer reads."""

    def __init__(self, name: str, weights: Path, device: torch.device) -> None:
        self.name = name
        self._model = open_model(ModelSource(source=f"zoo/{name}", weights=str(weights)), device=device)

    def _run(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images.split(_TOGETHER):
            inputs = self._model.preprocess(batch, "cropped").to(self._model.device)
            yield features_and_logits(self._model, inputs)

    def classes(self, images: Tensor) -> Tensor:
        """Class of the highest logit, int64 `[N]`, for images uint8 `[N, 3, 32, 32]`."""
        return torch.cat([logits.argmax(1).cpu() for _, logits in self._run(images)])

    def features(self, images: Tensor) -> Tensor:
        """Features float64 `[N, D]` for images uint8 `[N, 3, 32, 32]`."""
        return torch.cat([features.double().cpu() for features, _ in self._run(images)])
