"""Fine-tuning on images of a generator that learns in turns with the network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.errors import DataError, InputError
from synthquant.core.modules import frozen
from synthquant.core.progress import Progress
from synthquant.data.image_set import ImageSet
from synthquant.finetune.batches import TrainingBatch
from synthquant.finetune.dealt import from_first
from synthquant.finetune.fine_tuning import FineTuning
from synthquant.finetune.generator import ClassGenerator
from synthquant.finetune.inverted import inverted_network, require_statistics
from synthquant.nn.observers import OBSERVERS
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations
from synthquant.synthesize.inversion import Objective

if TYPE_CHECKING:
    from synthquant.core.processes import Processes
    from synthquant.core.rng import Rng
    from synthquant.finetune.batches import BatchSource
    from synthquant.finetune.student import Student
    from synthquant.models.float_model import FloatModel
    from synthquant.models.held_out import HeldOut
    from synthquant.synthesize.inversion import InvertedNetwork

_RECALIBRATED_WITH = 256


class GeneratedFineTuning(FineTuning):
    """Settings of training with a generator: each step trains the generator, then the network on its images."""

    needs_images: ClassVar[bool] = True

    latent_size: int = Field(default=100, ge=1)
    """Length of the noise that an image is made from."""
    generator_lr: float = Field(default=1e-3, gt=0)
    """Adam learning rate of the generator (betas 0.5 and 0.999), which falls with those of the network."""
    generator_warm_up: int = Field(default=200, ge=0)
    """Steps that the generator makes alone before the network learns (authors of GDFQ: 800 on CIFAR-100)."""
    batch_norm: float = Field(default=0.1, gt=0)
    """Weight, in the generator's loss, of the distance of batch statistics, mean over batch norms and channels."""
    recalibrate: bool = True
    """Set ranges of activations anew, on images of the warmed-up generator, before the network learns."""
    observer: str = "minmax"
    """How these ranges are searched: `minmax`, `running`, `brecq`, `genie`, `qdrop` or `percentile`."""

    @field_validator("observer")
    @classmethod
    def _known(cls, value: str) -> str:
        OBSERVERS.get(value)  # known before the generator has warmed up
        return value

    def check(self, model: FloatModel) -> None:
        """Raise `UnsupportedModelError` if the network gives no logits, or no batch norm has learned statistics."""
        super().check(model)
        require_statistics(model, self.name)

    def source(self, student: Student, images: ImageSet, parts: HeldOut, rng: Rng, processes: Processes) -> BatchSource:
        """The generator's images; those that are given serve to choose the best state, and nothing else.

        Of several processes the first one has the generator, for batch statistics are those of all images of a batch.
        """
        del images, parts
        model = student.network.float_model
        return from_first(lambda: GeneratedImages(self, student, rng), self.batch_size, model, processes)

    def setup(self, network: InvertedNetwork, images: GeneratedImages, rng: Rng) -> None:
        """Measure what the generator's loss needs to know of the network."""

    @abstractmethod
    def objective(self, images: GeneratedImages, labels: Tensor, rng: Rng) -> Objective:
        """What the generator minimises beside `batch_norm` times the distance of statistics; of classes `[B]`."""


class GeneratedImages:
    """Batches of a generator, each trained on as soon as it is made, and the state of it all.

    Attributes:
        student: the network that is trained.
        layers: batch norms that the generator's loss looks at.
        classes: of the network.
    """

    def __init__(self, settings: GeneratedFineTuning, student: Student, rng: Rng) -> None:
        model = student.network.float_model
        self.student, self._settings, self._rng, self._model = student, settings, rng, model
        if model.num_classes is None:
            raise DataError(f"{model.name} does not say how many classes it has, which {settings.name} makes images of")
        self.classes = model.num_classes
        self._shape = (model.preprocess.channels, *model.preprocess.input_size)
        self._generator = ClassGenerator(
            self.classes, settings.latent_size, self._shape, rng.generator("generator")
        ).to(model.device)
        parameters = list(self._generator.parameters())
        self._optimizer = torch.optim.Adam(parameters, lr=settings.generator_lr, betas=(0.5, 0.999), fused=True)
        self._network = inverted_network(model, settings.name)
        self._network.gaps(model.example_images(2))  # runs it, so that its layers are known
        self.layers = len(self._network.layers)
        settings.setup(self._network, self, rng)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self._shape

    def prepare(self, progress: Progress) -> None:
        """Warm the generator up, and set ranges anew."""
        settings = self._settings
        if settings.generator_warm_up:
            with progress.bar(f"{settings.name}, generator", settings.generator_warm_up) as bar:
                for number in range(settings.generator_warm_up):
                    self._train(self._rng.child(f"warm-up-{number}"), 1.0)
                    bar.advance(1)
        if settings.recalibrate:
            made = [
                self._made(self._rng.child(f"calibration-{index}"), settings.batch_size)[0].detach()
                for index in range(max(1, _RECALIBRATED_WITH // settings.batch_size))
            ]
            if not bool(torch.isfinite(torch.cat(made)).all()):
                raise InputError(
                    f"{settings.name}: the generator diverged while it was warmed up; lower generator_lr (now"
                    f" {settings.generator_lr:g})"
                )
            pixels = self._model.preprocess.pixels(torch.cat(made)).to("cpu", torch.float16).contiguous()
            images = CalibrationSet(self.student.network, ImageSet.from_tensors(pixels, framing="cropped"))
            with frozen(self.student.network), torch.no_grad():
                calibrate_activations(
                    self.student.network, images, len(pixels), settings.observer, quantized_weights=True
                )

    def batches(self, start: int = 0) -> Iterator[TrainingBatch]:
        """Train the generator by a step and yield what it made, without end, from step `start` on."""
        number = start
        while True:
            images, labels = self._train(self._rng.child(f"step-{number}"), self._settings.rate_at(number + 1))
            yield TrainingBatch(images, labels)
            number += 1

    def state(self) -> dict[str, Tensor]:
        """The generator, its optimiser's memory, and grids of activations, whose zero points no optimiser holds."""
        state = {f"generator.{name}": value for name, value in self._generator.state_dict().items()}
        for index, entries in self._optimizer.state_dict()["state"].items():
            state |= {f"adam.{index}.{key}": torch.as_tensor(value) for key, value in entries.items()}
        for name, quantizer in self.student.network.quantizers.items():
            state |= {f"grid.{name}|{part}": value for part, value in quantizer.grid().items()}
        return {name: value.detach().clone() for name, value in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        own = {name.removeprefix("generator."): value for name, value in state.items() if name.startswith("generator.")}
        self._generator.load_state_dict(own)
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})
        for name, quantizer in self.student.network.quantizers.items():
            quantizer.load_grid({part: state[f"grid.{name}|{part}"] for part in quantizer.grid()})

    def _train(self, rng: Rng, share: float) -> tuple[Tensor, Tensor]:
        """Make a batch and train the generator on it; returns the images as they were before, and their classes."""
        images, labels = self._made(rng, self._settings.batch_size)
        objective = self._settings.objective(self, labels, rng)
        # The distance is a sum over layers, and `batch_norm` is the weight of their mean: all else is that much larger.
        scale = self.layers / self._settings.batch_norm
        self._optimizer.zero_grad(set_to_none=True)
        self._network.backward(images, _scaled(objective, scale))
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.generator_lr * share
        self._optimizer.step()
        return self._model.preprocess.cut_off(images.detach()), labels

    def _made(self, rng: Rng, count: int) -> tuple[Tensor, Tensor]:
        source = rng.generator("latents")
        latents = torch.randn(count, self._settings.latent_size, generator=source).to(self._model.device)
        labels = torch.randint(self.classes, (count,), generator=source).to(self._model.device)
        images: Tensor = self._generator(latents, F.one_hot(labels, self.classes).to(latents.dtype))
        return images, labels


def _scaled(objective: Objective, factor: float) -> Objective:
    """The same with all terms multiplied."""

    def times(term: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda of: factor * term(of)

    of_logits = None if objective.of_logits is None else times(objective.of_logits)
    return replace(objective, of_images=tuple(times(term) for term in objective.of_images), of_logits=of_logits)
