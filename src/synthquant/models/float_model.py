"""The full-precision network as every stage sees it: a frozen classifier with its preprocessing and its origin."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.preprocess import ChannelMean, ChannelStd, Preprocess, Side


class ModelSource(Settings):
    """Where a network comes from: enough to build the same architecture again."""

    source: str = Field(min_length=1)
    """`timm/NAME`, `torchvision/NAME`, `transformers/REPO_OR_FOLDER`, `zoo/NAME` or `FILE.py:FUNCTION`."""

    weights: str | None = Field(default=None, min_length=1)
    """File of weights (.safetensors, or one that `torch.load` reads with `weights_only=True`) used instead of the
    published ones."""

    input_size: tuple[Side, Side] | None = None
    """Height and width in pixels, where they differ from what the model says or it says nothing."""

    mean: tuple[ChannelMean, ChannelMean, ChannelMean] | None = None
    """Mean of each channel (pixels in 0..1), where it differs from what the model says or it says nothing."""

    std: tuple[ChannelStd, ChannelStd, ChannelStd] | None = None
    """Standard deviation of each channel (pixels in 0..1), where it differs from what the model says or it says
    nothing."""

    num_classes: int | None = Field(default=None, ge=1, le=10**7)
    """Number of classes, where it differs from the architecture's own."""


@dataclass(frozen=True)
class FloatModel:
    """A full-precision classifier: in eval mode, without gradients for its parameters, and never changed by anybody."""

    module: nn.Module
    """Maps normalised images `[B, 3, H, W]` to logits `[B, num_classes]`."""
    preprocess: Preprocess
    name: str
    source: ModelSource
    task: Literal["classify"] = "classify"
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over name, type, shape and bytes of every entry of the state dict.

        It is computed anew each time, so it also tells whether somebody changed the weights; the device does not
        matter.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def example_input(self, batch: int = 2, seed: int = 0) -> Tensor:
        """Normal noise `[batch, 3, H, W]` on the model's device; the same values for the same seed on every device."""
        height, width = self.preprocess.input_size
        generator = Rng(seed).generator("example_input")
        return torch.randn(batch, 3, height, width, generator=generator).to(self.device)

    def logits(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of normalised images `[B, 3, H, W]`; gradients flow to the images.

        Raises `UnsupportedModelError` if the network does not return logits of that shape.
        """
        logits = self.module(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            found = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UnsupportedModelError(
                f"{self.source.source}: the network returns {found} for {len(images)} images, not logits"
                f" [{len(images)}, classes]; wrap it in a module that does"
            )
        return logits

    def to(self, device: torch.device | str) -> FloatModel:
        """The same model on `device`. The module itself moves, so the old value is on `device` too."""
        return replace(self, module=self.module.to(device), device=torch.device(device))
