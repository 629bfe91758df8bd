"""The full-precision network as every stage sees it: frozen, with what it takes, what it is for and its origin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.core.modules import device_of, hooked
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.preprocess import ChannelMean, ChannelStd, Preprocess, Side
from synthquant.models.signature import Inputs
from synthquant.models.user_file import names_code, same_code

Task = Literal["classify", "dense", "detect", "embed", "denoise", "other"]
"""What a network is for: logits of classes, maps (of classes, depth, saliency), boxes with scores, vectors that stand
for what it is given, the noise in a diffusion model's images, or something else."""

IN_MEMORY = "memory"
"""What the source of a network starts with that was given as a module: `memory/NAME` cannot be opened again."""

# Bytes of the largest activation when samples go through a network together.
_LARGEST_ON_CPU, _LARGEST = 2**27, 2**30


class _Source(Settings):
    """The fields that say where a network comes from: enough to build the same architecture again."""

    source: str = Field(min_length=1)
    """`timm/NAME`, `torchvision/NAME`, `transformers/REPO_OR_FOLDER`, `diffusers/REPO_OR_FOLDER` (a diffusion
    pipeline, whose denoiser is meant), `zoo/NAME` or `FILE.py:FUNCTION`; the first two with a tag of weights
    (`timm/resnet18.a1_in1k`, `torchvision/mobilenet_v2.IMAGENET1K_V1`), without one the library's best, whose
    preprocessing a file of weights gets, too."""

    weights: str | None = Field(default=None, min_length=1)
    """File of weights (.safetensors, or one that `torch.load` reads with `weights_only=True`) used instead of the
    published ones."""

    input_size: tuple[Side, Side] | None = None
    """Height and width in pixels, where they differ from what the model says or it says nothing."""

    mean: tuple[ChannelMean, ...] | None = None
    """Mean of each channel (pixels in 0..1), where it differs from what the model says or it says nothing."""

    std: tuple[ChannelStd, ...] | None = None
    """Standard deviation of each channel (pixels in 0..1), where it differs from what the model says or it says
    nothing."""

    num_classes: int | None = Field(default=None, ge=1, le=10**7)
    """Number of classes, where it differs from the architecture's own."""

    task: Task = "classify"
    """What the network gives: logits of classes (`classify`), or any tree of tensors, whose distance to those of the
    float network is measured instead of accuracy: maps (`dense`), boxes and scores (`detect`), vectors (`embed`) or
    anything (`other`). That of a diffusion pipeline is always `denoise`."""

    @model_serializer(mode="wrap")
    def _without_the_usual_task(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `task` out where it is `classify`: such files are as they were before there were others."""
        fields: dict[str, Any] = handler(self)
        if self.task == "classify":
            fields.pop("task", None)
        return fields


class ModelSource(_Source):
    """Where a network comes from, in the words of the user: it may name code, which runs."""


class RecordedSource(_Source):
    """Where a network came from, in the words of a file, which may have come from elsewhere.

    It is data: `open_model` does not take it, and `confirmed` is the only way to what it does take.
    """

    @classmethod
    def of(cls, source: ModelSource) -> RecordedSource:
        """Return what a file says about a network from `source`."""
        return cls.model_validate(source.model_dump())

    def confirmed(self, where: str, *, model: str | None = None, trust_code: bool = False) -> ModelSource:
        """Return the source to open; code that it names is left out unless the user wants it to run.

        Args:
            where: the file that says so, for messages.
            model: the network in the user's own words. It must be the recorded one; a file of Python code may lie in
                another folder by now, and the one that the user names is the one that runs.
            trust_code: run what the file names.

        Raises:
            ModelError: it names code and the user has said neither, or `model` is another network.
        """
        if model is not None:
            code = names_code(self.source)
            if model != self.source and not (code and names_code(model) and same_code(model, self.source)):
                raise ModelError(f"{where} was made from {self.source}, not from {model}; name that, or leave it out")
            return ModelSource.model_validate(self.model_dump() | {"source": model})
        if names_code(self.source) and not trust_code:
            raise ModelError(
                f"{where} names code, and a file from elsewhere must not run code: if you know it, give"
                f" --model {self.source} or --trust-code (in Python trust_code=True)"
            )
        return ModelSource.model_validate(self.model_dump())


@dataclass(frozen=True)
class FloatModel:
    """A full-precision network: in eval mode, without gradients for its parameters, and never changed by anybody."""

    module: nn.Module
    """Maps what it takes to logits `[B, num_classes]` if its task is to classify, else to any tree of tensors."""
    takes: Preprocess | Inputs
    """How images become its input, `[B, C, H, W]`, or an example of its inputs, for networks that take others."""
    name: str
    source: ModelSource
    task: Task = "classify"
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    recorded_fingerprint: str = ""
    """Fingerprint of the weights that are meant, where random ones stand in for them: the architecture alone, good for
    its preprocessing and names, not to compare with. Empty: the weights are there."""

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        input_size: int | tuple[int, int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        preprocess: Preprocess | None = None,
        example: Any = None,
        name: str | None = None,
        task: Task | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> FloatModel:
        """Return a network that a program has in memory; a copy in float32 and eval mode, `module` stays as it is.

        It must say what the network takes: images, by `preprocess` or by `input_size`, `mean` and `std`, or something
        else, by an `example` of its inputs. A network of timm says it itself. It is run once, on noise or the example.

        Args:
            module: made of Python modules; what `torch.compile` wraps is unwrapped.
            input_size: height and width in pixels, one number for a square.
            mean: of each channel, for pixels in 0..1; as many as the network takes channels.
            std: standard deviation of each channel, alike.
            preprocess: all of that, and how larger images are resized and cropped.
            example: a tensor, a tuple or list of positional arguments, a dictionary of keyword arguments, or `Inputs`,
                with the samples in the first dimension of every tensor.
            name: by which it is called; by default that of its class.
            task: by default `classify` if it gives one tensor `[B, classes]`, else `other`.
            num_classes: how many classes it must have; by default as many as it gives.
            class_names: of its classes, in the order of the logits.

        Raises:
            ModelError: it is not said what the network takes, or twice; it fails on that, gives NaN, or another number
                of classes; or `module` is a traced, exported or lazy one.
            UnsupportedModelError: it gives no logits and is to classify, or no tensors at all.
        """
        from synthquant.models.in_memory import model_of_module

        return model_of_module(
            module,
            {"input_size": input_size, "mean": mean, "std": std},
            preprocess=preprocess,
            example=example,
            name=name,
            task=task,
            num_classes=num_classes,
            class_names=class_names,
        )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.module)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over name, type, shape and bytes of every entry of the state dict.

        It is computed anew each time, so it also tells whether somebody changed the weights; the device does not
        matter. Of an architecture alone it is that of the weights that are meant.
        """
        if self.recorded_fingerprint:
            return self.recorded_fingerprint
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def preprocess(self) -> Preprocess:
        """How images become input; raises `UnsupportedModelError` if the network takes something else."""
        if not isinstance(self.takes, Preprocess):
            names = ", ".join(name for name, _ in self.takes.named())
            instead = "; quantize it with what self_sampling records" if self.task == "denoise" else ""
            raise UnsupportedModelError(
                f"{self.name} takes no images, but inputs {names}; what makes, reads or selects images cannot be used"
                f"{instead}"
            )
        return self.takes

    @property
    def input_limits(self) -> tuple[float, float] | None:
        """Smallest and largest value of its input, where they are known: black and white of images."""
        return self.takes.limits if isinstance(self.takes, Preprocess) else None

    def example(self, batch: int = 2) -> Inputs:
        """Inputs of so many samples on the model's device, the same on every call: noise, or the example in turns."""
        if isinstance(self.takes, Inputs):
            return self.takes.cycled(batch).to(self.device)
        return Inputs.of(self.example_images(batch))

    def example_images(self, batch: int = 2, seed: int = 0) -> Tensor:
        """Normal noise `[batch, C, H, W]` on the model's device; the same values for the same seed on every device."""
        height, width = self.preprocess.input_size
        generator = Rng(seed).generator("example_input")
        return torch.randn(batch, self.preprocess.channels, height, width, generator=generator).to(self.device)

    def require_logits(self) -> None:
        """Raise `UnsupportedModelError` if the network's task is not to classify."""
        if self.task != "classify":
            raise UnsupportedModelError(
                f"{self.name} is no classifier (its task is {self.task!r}), so it has no logits, no top class and no"
                " accuracy; measure its outputs instead"
            )

    def logits(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of normalised images `[B, C, H, W]`; gradients flow to the images.

        Raises `UnsupportedModelError` if the network is no classifier or does not return logits of that shape.
        """
        self.require_logits()
        return self.checked_logits(self.module(images), len(images))

    def checked_logits(self, logits: Any, count: int) -> Tensor:
        """Return what the network gave; raises `UnsupportedModelError` if it is not logits of so many samples."""
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
            found = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UnsupportedModelError(
                f"{self.source.source}: the network returns {found} for {count} images, not logits [{count}, classes];"
                " wrap it in a module that does, or give --task other, model.task=other in a recipe"
                ' (in Python task="other")'
            )
        return logits

    @torch.no_grad()
    def samples_at_once(self, most: int) -> int:
        """Return how many samples, `most` or a power of two below it, go through the network at once without gradients.

        The largest tensor that a module returns then takes up to 128 MiB on a CPU, where more at a time is no faster,
        and 1 GiB elsewhere; several of that size exist at a time.
        """
        largest = 1

        def look(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal largest
            found = [leaf.nbytes for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            largest = max(largest, *found, 1)

        with hooked([(module, look) for module in self.module.modules()]):
            self.example(1).call(self.module)
        fitting = (_LARGEST_ON_CPU if self.device.type == "cpu" else _LARGEST) // largest
        return most if fitting >= most else 1 << max(0, fitting.bit_length() - 1)

    def to(self, device: torch.device | str) -> FloatModel:
        """The same model on `device`. The module itself moves, so the old value is on `device` too."""
        return replace(self, module=self.module.to(device))
