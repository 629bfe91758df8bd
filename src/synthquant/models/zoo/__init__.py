"""Small checkpoints that come with the package, so that everything can be tried without a download.

`NETWORKS` are all architectures that `training/` knows how to train; `ZOO` holds those of them whose weights and card
are installed, and only these are offered as `zoo/NAME`.

- `mobilenet_cifar`: MobileNetV2 of width 0.5 for 32x32 images.
- `pipelines`: where the bundled diffusion models lie: folders that diffusers opens.
- `resnet_cifar`: ResNet for 32x32 images.
- `vit_cifar`: vision transformer for 32x32 images.
"""

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
from synthquant.models.zoo.mobilenet_cifar import mobilenetv2
from synthquant.models.zoo.resnet_cifar import resnet20
from synthquant.models.zoo.vit_cifar import vit

_FOLDER = Path(__file__).parent

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Names of the labels 0..9."""

CIFAR10_PREPROCESS = Preprocess(
    input_size=(32, 32),
    resize=32,
    crop=True,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    interpolation="bilinear",
)
"""How every bundled classifier of CIFAR-10 sees an image."""


@dataclass(frozen=True)
class ZooModel:
    """A bundled network."""

    name: str
    """As in `zoo/NAME`; also the name of its files."""
    build: Callable[[int], nn.Module]
    """Makes the architecture for a number of classes, with random weights."""
    preprocess: Preprocess = CIFAR10_PREPROCESS
    class_names: tuple[str, ...] = CIFAR10_CLASSES

    @property
    def weights(self) -> Path:
        """File of weights (safetensors, fp16)."""
        return _FOLDER / "weights" / f"{self.name}.safetensors"

    @property
    def installed(self) -> bool:
        """Whether weights and card are in the package."""
        return self.weights.is_file() and self.weights.with_suffix(".json").is_file()

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


# The networks called "-half" have seen the first half of the training images only: the bundled text-to-image model was
# trained on the other half, so that what it draws is not their training data.
NETWORKS = {
    entry.name: entry
    for entry in (
        ZooModel("cifar10-mobilenetv2", mobilenetv2),
        ZooModel("cifar10-mobilenetv2-half", mobilenetv2),
        ZooModel("cifar10-resnet20", resnet20),
        ZooModel("cifar10-resnet20-half", resnet20),
        ZooModel("cifar10-vit", vit),
    )
}

ZOO: Registry[ZooModel] = Registry("zoo model")

for _entry in NETWORKS.values():
    if _entry.installed:
        ZOO.register(_entry.name)(_entry)
