"""Small checkpoints that come with the package, so that everything can be tried without a download."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from synthquant.core.errors import ModelError
from synthquant.core.registry import Registry
from synthquant.data.preprocess import Preprocess
from synthquant.models.zoo.resnet_cifar import resnet20

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ZooModel:
    """A bundled network."""

    name: str
    """As in `zoo/NAME`; also the name of its files."""
    build: Callable[[int], nn.Module]
    """Makes the architecture for a number of classes, with random weights."""
    preprocess: Preprocess
    class_names: tuple[str, ...]

    @property
    def weights(self) -> Path:
        """File of weights (safetensors, fp16)."""
        return _FOLDER / "weights" / f"{self.name}.safetensors"

    @property
    def card(self) -> dict[str, Any]:
        """How the weights were made and how accurate they are.

        Raises `ModelError` if the card is not installed.
        """
        path = self.weights.with_suffix(".json")
        if not path.is_file():
            raise ModelError(f"the card of zoo/{self.name} is missing at {path}; install synthquant again")
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return card


ZOO: Registry[ZooModel] = Registry("zoo model")

ZOO.register("cifar10-resnet20")(
    ZooModel(
        name="cifar10-resnet20",
        build=resnet20,
        preprocess=Preprocess(
            input_size=(32, 32),
            resize=32,
            crop=True,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            interpolation="bilinear",
        ),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
)
