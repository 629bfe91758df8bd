"""What the ways of fine-tuning have in common: settings, and the training loop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from synthquant.core.errors import DataError, InputError
from synthquant.core.processes import Processes
from synthquant.core.progress import QUIET, Bar, Progress, Silent
from synthquant.core.rng import Rng
from synthquant.core.run_metrics import FineTuneMetrics, FineTunePoint
from synthquant.core.settings import Settings
from synthquant.core.tensor_file import digest_of
from synthquant.data.image_set import ImageSet
from synthquant.finetune.augment import flip, shift
from synthquant.finetune.looks import Looks
from synthquant.finetune.losses import (
    LastFeatures,
    attention_map,
    cross_entropy,
    distillation,
    feature_distance,
    trusted_labels,
)
from synthquant.finetune.optimize import Optimizer, Trainer, rate_at
from synthquant.finetune.state_file import StateFile, TrainingState
from synthquant.finetune.student import Student, WeightForm
from synthquant.methods import FineTuned
from synthquant.models.held_out import HeldOut, hold_out
from synthquant.nn.quant_model import QuantModel

if TYPE_CHECKING:
    from synthquant.finetune.batches import BatchSource, TrainingBatch
    from synthquant.models.float_model import FloatModel

_LOSSES_AT_MOST = 200
"""Steps whose loss is looked at; each look waits for the device."""


class FineTuning(Settings, ABC):
    """Settings of training a quantized network end to end, with the float network as its teacher."""

    iterations: int = Field(default=2000, ge=1)
    """Training steps."""
    batch_size: int = Field(default=64, ge=1)
    """Images in a step, over all processes."""
    form: WeightForm = "offsets"
    """What is learned of a weight: `offsets` of the codes that quantization came to (GenQ, arXiv:2312.05272, eq. 12 and
    13), so that training starts with that very network; or `weights`, the float ones with straight-through rounding
    (LSQ, arXiv:1902.08153), which start at its step sizes and lose its learned roundings."""
    optimizer: Optimizer = "adamw"
    """`adamw`, or `sgd` with Nesterov's momentum."""
    weight_lr: float = Field(default=0.01, ge=0)
    """Learning rate of weights or offsets, in step sizes of the layer."""
    weight_scale_lr: float = Field(default=5e-4, ge=0)
    """Learning rate of step sizes of weights, as a share of themselves."""
    activation_scale_lr: float = Field(default=5e-4, ge=0)
    """Learning rate of step sizes of activations, as a share of what they are when training begins."""
    other_lr: float = Field(default=5e-4, ge=0)
    """Learning rate of biases, batch norms that were kept, and layers left in floating point."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of `sgd`, first beta of `adamw`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pull of weights or offsets to zero; of offsets that is the quantized network."""
    warm_up: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rates rise; then they fall to zero as a cosine."""
    clip: float = Field(default=0.0, ge=0)
    """Largest length of the gradient of a step; 0: any."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of a running average of what is learned, which is then the result; 0: none."""
    lsq_gradient_scale: bool = True
    """Multiply gradients of step sizes by `1 / sqrt(n * Q_P)` (LSQ); of no matter to `adamw` in the long run."""

    distillation: float = Field(default=1.0, ge=0)
    """Weight of `T^2 KL(teacher || student)`, mean over the batch."""
    temperature: float = Field(default=1.0, gt=0)
    """`T` of the distillation."""
    cross_entropy: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy with the images' labels; an image without one takes the teacher's class."""
    label_doubt: float = Field(default=1.0, ge=0, le=1)
    """Labels count where the teacher gives them a probability of at least 1 minus this (SynQ: 0.5); 1: everywhere."""
    features: float = Field(default=0.0, ge=0)
    """Weight of the squared distance of the last feature maps, each scaled to length 1 (as HAST and SynQ do)."""
    attention: float = Field(default=0.0, ge=0)
    """Weight of the squared distance of the Grad-CAM maps of each image's label, each scaled to length 1 (SynQ)."""

    flip: bool = True
    """Mirror images at random."""
    shift: float = Field(default=0.125, ge=0, lt=1)
    """Move images at random by up to this share of their sides."""

    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the images that are not trained on: by agreement with the teacher on them the best state is chosen."""
    evaluations: int = Field(default=10, ge=1)
    """How often that is measured, evenly; the start is measured too, and the state kept for a killed run to go on."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and products in both networks; quantizers always compute in float32."""

    @model_validator(mode="after")
    def _learns(self) -> FineTuning:
        if not any((self.weight_lr, self.weight_scale_lr, self.activation_scale_lr, self.other_lr)):
            raise ValueError("all learning rates are 0, so nothing would be learned")
        if not any((self.distillation, self.cross_entropy, self.features, self.attention)):
            raise ValueError("distillation, cross_entropy, features and attention are all 0, so there is no loss")
        return self

    def check(self, model: FloatModel) -> None:
        """Raise `UnsupportedModelError` if this cannot train a network; asked before anything is quantized."""
        model.require_logits()

    def train(
        self,
        quant_model: QuantModel,
        images: ImageSet | None,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
    ) -> FineTuned:
        """Train a copy of `quant_model`, which stays as it is, with images in pixel space.

        With a `workdir` its state is kept there, and a killed training goes on to the same bytes.

        Where `torch.distributed` has a group, all its processes call this with the same arguments. Each learns from its
        share of every batch, gradients are averaged, and all get the same result; the first one alone writes and tells.

        Raises:
            UnsupportedModelError: the network gives no logits, has no feature maps that `features` could compare, or
                nothing that any of the learning rates above 0 would move.
            DataError: there are too few images, or labels that are no classes; or `workdir` holds another training.
            ModelError: `quant_model` is not calibrated.
            InputError: processes do not divide `batch_size`, or have other networks, images or settings.
            OtherProcessError: another process failed.
        """
        processes = Processes.current()
        if not processes.is_first:
            progress, workdir = Silent(), None
        training = processes.together(lambda: _Training(self, quant_model, images, rng, progress, workdir, processes))
        return training.run()

    def trainer(self, student: Student) -> Trainer:
        """Return the optimiser of a student, at the rates of the settings."""
        decays = {name: self.weight_decay * (group == "weights") for name, group in student.groups.items()}
        learned, rates = student.parameters, self.rates(student)
        return Trainer(learned, rates, decays, optimizer=self.optimizer, momentum=self.momentum, clip=self.clip)

    def rates(self, student: Student) -> dict[str, float]:
        """Return the learning rates of all that a student can learn, by name, in units of the parameters."""
        by_group = {
            "weights": self.weight_lr,
            "weight_scales": self.weight_scale_lr,
            "activation_scales": self.activation_scale_lr,
            "others": self.other_lr,
        }
        # A step of AdamW is of the length of the rate, one of SGD goes with the gradient, which a unit changes as well.
        power = 1 if self.optimizer == "adamw" else 2
        return {name: by_group[group] * student.units[name] ** power for name, group in student.groups.items()}

    @property
    @abstractmethod
    def name(self) -> str:
        """What the method is registered as."""

    @abstractmethod
    def source(self, student: Student, images: ImageSet, parts: HeldOut, rng: Rng, processes: Processes) -> BatchSource:
        """What is trained on: those images that are not held out, or others; this process's share of them."""

    def rate_at(self, step: int) -> float:
        """Share of the learning rates at a step (1 .. iterations)."""
        return rate_at(step, self.iterations, self.warm_up)


class _Training:
    """One training from its beginning, or from where a killed one stood."""

    def __init__(
        self,
        settings: FineTuning,
        quant_model: QuantModel,
        images: ImageSet | None,
        rng: Rng,
        progress: Progress,
        workdir: Path | None,
        processes: Processes,
    ) -> None:
        model = quant_model.float_model
        settings.check(model)
        quant_model.require_calibrated()
        if settings.batch_size % processes.count:
            raise InputError(
                f"batch_size is the images of a step over all processes, and {processes.count} processes do not divide"
                f" {settings.batch_size}; choose a multiple of {processes.count}"
            )
        if not isinstance(images, ImageSet):
            what = "" if images is None else f"; a {type(images).__name__} is no image set, which open_images makes"
            raise DataError(f"{settings.name} needs images, to train on and to choose the best state by{what}")
        self._settings, self._model, self._rng, self._progress = settings, model, rng, progress
        self._processes = processes
        self._parts = hold_out(len(images), settings.held_out, rng)
        self._device = quant_model.device
        self._half = settings.compute_dtype == "bfloat16"
        self._student = Student(quant_model, settings.form, lsq_gradient_scale=settings.lsq_gradient_scale)
        self._source = settings.source(self._student, images, self._parts, rng.child("images"), processes)
        self._trainer = settings.trainer(self._student)
        self._average = self._student.values() if settings.average > 0 else None
        self._looks = Looks(images, self._parts, self._student) if processes.is_first else None
        self._features: LastFeatures | None = None
        if settings.features > 0 or settings.attention > 0:
            example = model.example_images(2)
            self._features = LastFeatures(model.module, self._student.network.module, example)
        start = digest_of(quant_model.state())
        made_from = (model.fingerprint, start, images.fingerprint, settings.name, settings.model_dump(), rng)
        names = ("float networks", "quantized networks", "images", "methods", "settings", "seeds")
        self._made_from = dict(zip(names, map(repr, made_from), strict=True))
        self._file = StateFile(workdir, made_from, progress)
        self._state = TrainingState()

    def run(self) -> FineTuned:
        settings, processes = self._settings, self._processes
        processes.require_same(self._made_from)
        self._resume()
        due = {round(settings.iterations * part / settings.evaluations) for part in range(1, settings.evaluations + 1)}
        each = max(1, -(-settings.iterations // _LOSSES_AT_MOST))
        with self._progress.bar(settings.name, settings.iterations) as bar:
            bar.advance(self._state.step)
            if not self._state.points:
                processes.together(lambda: self._source.prepare(self._progress))
                self._take_start()
                self._student.measure_units()  # ranges may just have been set
                self._average = self._student.values() if settings.average > 0 else None
                self._look([], bar)
            self._trainer.set_rates(settings.rates(self._student))
            batches = self._source.batches(self._state.step)
            losses: list[float] = []
            while self._state.step < settings.iterations and not self._state.diverged:
                number = self._state.step + 1
                loss = self._step(number, next(batches))
                self._state.step = number
                bar.advance(1)
                if number % each == 0 or number in due:
                    processes.average([loss])
                    losses.append(float(loss))
                if number in due or (losses and not math.isfinite(losses[-1])):
                    self._look(losses, bar)
                    losses = []
        self._state.points, values = processes.from_first((self._state.points, self._state.tensors.get("best", {})))
        best = self._finished(values)
        last = best if self._state.diverged else self._finished(self._learned())
        return FineTuned(best, last, self._report())

    def _step(self, number: int, batch: TrainingBatch) -> Tensor:
        """Make one training step; returns its loss, detached."""
        generator = self._rng.child("augment").generator(f"step-{number}")
        share, processes = self._settings.shift, self._processes
        images = flip(batch.images, generator, processes) if self._settings.flip else batch.images
        images = shift(images, share, generator, processes) if share > 0 else images
        with self._student.training(), self._watched():
            loss = self._loss(images, batch.labels)
            torch.autograd.backward(loss)
            self._average_gradients()
            self._trainer.step(self._settings.rate_at(number))
            self._student.keep_legal()
        if self._average is not None:
            own = [parameter.detach() for parameter in self._student.parameters.values()]
            torch._foreach_lerp_(list(self._average.values()), own, 1 - self._settings.average)
        return loss.detach()

    def _loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        settings, features = self._settings, self._features
        with torch.set_grad_enabled(settings.attention > 0), self._autocast():
            teacher = self._model.module(images).float()
        with self._autocast():
            student = self._student.network(images).float()
        loss: Tensor = student.new_zeros(())
        if settings.distillation > 0:
            loss = loss + settings.distillation * distillation(teacher.detach(), student, settings.temperature)
        own = teacher.detach().argmax(1)
        known = own if labels is None else torch.where(labels < 0, own, labels)
        if settings.cross_entropy > 0:
            counts = trusted_labels(teacher.detach(), known, settings.label_doubt)
            loss = loss + settings.cross_entropy * cross_entropy(student, known, counts)
        if features is not None and settings.features > 0:
            distance = feature_distance(features.of_teacher.detach().float(), features.of_student.float())
            loss = loss + settings.features * distance
        if features is not None and settings.attention > 0:
            wanted = attention_map(features.of_teacher, teacher, known, create_graph=False).detach()
            found = attention_map(features.of_student, student, known, create_graph=True)
            loss = loss + settings.attention * (wanted - found).square().sum((1, 2)).mean()
        return loss

    def _average_gradients(self) -> None:
        """Let all processes learn from the gradient of the whole batch."""
        if self._processes.count == 1:
            return
        for parameter in self._trainer.learned:
            if parameter.grad is None:  # which parameters a forward pass uses may depend on the images
                parameter.grad = torch.zeros_like(parameter)
        self._processes.average([parameter.grad for parameter in self._trainer.learned if parameter.grad is not None])

    def _look(self, losses: list[float], bar: Bar) -> None:
        """Measure the student and keep the best, and the state; the first process does."""
        self._processes.together(lambda: self._measure(losses, bar))
        self._state.diverged = self._processes.from_first(self._state.diverged)

    def _measure(self, losses: list[float], bar: Bar) -> None:
        if self._looks is None:
            return
        state, values = self._state, self._learned()
        point = self._looks.measure(values, state.step, sum(losses) / len(losses) if losses else None)
        best = max(state.points, key=_merit, default=None)
        if point is not None:
            state.points.append(point)
            bar.advance(0, **({} if point.loss is None else {"loss": point.loss}), agreement=point.held_out)
            if best is None or _merit(point) > _merit(best):
                state.tensors["best"] = values
        elif best is None:
            raise InputError(
                f"{self._model.name}: the network to be trained gives logits that are not finite; quantize it anew"
            )
        else:
            state.diverged = True
            self._progress.warn(
                f"training diverged by step {state.step}: loss or logits are not finite; the best state until then, of"
                f" step {best.step}, is kept; lower the learning rates, or set clip"
            )
        state.tensors |= {"student": self._student.values(), "optimizer": self._trainer.state()}
        state.tensors["units"] = {name: torch.tensor(unit) for name, unit in self._student.units.items()}
        state.tensors["source"] = self._source.state()
        if self._average is not None:
            state.tensors["average"] = dict(self._average)
        self._file.save(state)

    def _learned(self) -> dict[str, Tensor]:
        """What counts as the result so far: the running average, if there is one."""
        if self._average is None:
            return self._student.values()
        return {name: value.clone() for name, value in self._average.items()}

    def _finished(self, values: dict[str, Tensor]) -> QuantModel:
        with self._student.holding(values):
            return self._student.finished()

    def _resume(self) -> None:
        found = self._processes.from_first(self._processes.together(self._file.load))
        if found is None:
            return
        self._state = found
        self._source.load(found.tensors.get("source", {}))
        self._student.load(found.tensors["student"])
        self._student.units |= {name: float(unit) for name, unit in found.tensors.get("units", {}).items()}
        self._trainer.load(found.tensors.get("optimizer", {}))
        if self._average is not None:
            self._average = {name: found.tensors["average"][name].to(self._device) for name in self._average}
        self._take_start()

    def _take_start(self) -> None:
        """Begin where the student of the first process stands: its ranges may just have been set there."""
        if self._processes.count == 1:
            return
        quantizers = self._student.network.quantizers
        grids = {name: {part: value.cpu() for part, value in one.grid().items()} for name, one in quantizers.items()}
        values = {name: value.cpu() for name, value in self._student.values().items()}
        values, grids = self._processes.from_first((values, grids))
        for name, one in quantizers.items():
            one.load_grid(grids[name])
        self._student.load(values)

    def _report(self) -> FineTuneMetrics:
        best = max(self._state.points, key=_merit)
        return FineTuneMetrics(
            method=self._settings.name,
            steps=self._state.step,
            best_step=best.step,
            held_out_count=len(self._parts.held_out),
            diverged=self._state.diverged,
            points=tuple(self._state.points),
        )

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._half else nullcontext()

    def _watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self._features is None else self._features.watched()


def _merit(point: FineTunePoint) -> tuple[float, float, int]:
    """Which of two states is better: by agreement on images held out, then by KL there, then the earlier one."""
    return point.held_out, -point.kl, -point.step
