"""Frechet distance between sets of images in the features of one of our classifiers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cifar import MEAN_STD
from synthquant.models.zoo import NETWORKS


class Classifier:
    """A network of the zoo with its logits and the features that its last layer reads."""

    def __init__(self, name: str, weights: Path, device: torch.device) -> None:
        self.name, self.device = name, device
        self.model = NETWORKS[name].build(10)
        self.model.load_state_dict(load_file(weights))
        self.model.eval().to(device)
        self.head = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
        self.mean, self.std = (value.to(device) for value in MEAN_STD)

    @torch.no_grad()
    def _run(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            for batch in images.split(500):
                logits = self.model(batch.to(self.device).float().div(255).sub(self.mean).div(self.std))
                yield logits, found.pop()
        finally:
            hook.remove()

    def classes(self, images: Tensor) -> Tensor:
        """Class of the highest logit, int64 `[N]`, for images uint8 `[N, 3, 32, 32]`."""
        return torch.cat([logits.argmax(1).cpu() for logits, _ in self._run(images)])

    def features(self, images: Tensor) -> Tensor:
        """Features float64 `[N, D]` for images uint8 `[N, 3, 32, 32]`."""
        return torch.cat([features.double().cpu() for _, features in self._run(images)])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance between normal distributions fitted to two sets of features `[N, D]` (arXiv:1706.08500).

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`; the trace of the root is the sum of the roots of the eigenvalues of
    the symmetric `C1^(1/2) C2 C1^(1/2)`.
    """
    first, second = first.double(), second.double()
    covariance_1, covariance_2 = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(covariance_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    distance = (first.mean(0) - second.mean(0)).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * mixed
    return float(distance.item())
