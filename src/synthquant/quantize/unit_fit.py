"""Fitting one unit to what its float self puts out: what it reads and gives, the loss, and learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from synthquant.core.clips import saved_results
from synthquant.core.modules import get_module
from synthquant.core.progress import Bar
from synthquant.core.registry import Registry
from synthquant.core.rng import Rng
from synthquant.methods import UnitReport
from synthquant.models.blocks import Unit
from synthquant.models.signature import Inputs, Leaves, Signature, TensorSpec
from synthquant.nn.functional import random_keep
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.cache import CacheStore, RowCache
from synthquant.quantize.calibrate import observe
from synthquant.quantize.fisher import fisher_weights, in_float, output_gradient
from synthquant.quantize.layout import channels_last
from synthquant.quantize.learn import Learnable, Learned, Phase, learn_unit, reconstruction_error, undropped
from synthquant.quantize.replay import NETWORK_INPUT, Replay
from synthquant.quantize.unit_files import Parts, finite, snapshot


@dataclass
class Stream:
    """What one of the two networks (float or quantized) put out so far: caches of unit outputs still needed."""

    outputs: dict[int, list[RowCache]] = field(default_factory=dict)

    def drop_all_but(self, needed: set[int]) -> None:
        """Let go of what no later unit reads."""
        for index in set(self.outputs) - needed:
            del self.outputs[index]


@dataclass(frozen=True)
class Fitted:
    """What all units of a network share while they are fitted.

    Attributes:
        model: the network.
        replay: how its units are reached.
        parts: layers and quantizers of each unit, in order.
        store: where caches come from.
        takes: an example of what the network is given.
        given: caches of the tensors in it that vary.
        count: how many samples.
        at_once: how many run together without gradients.
    """

    model: QuantModel
    replay: Replay
    parts: Sequence[Parts]
    store: CacheStore
    takes: Inputs
    given: Sequence[RowCache]
    count: int
    at_once: int

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and last sample (exclusive) of what runs at a time."""
        for start in range(0, self.count, self.at_once):
            yield start, min(start + self.at_once, self.count)

    def inputs(self, start: int, stop: int) -> Inputs:
        """What the network is given, of the samples from `start` to `stop` (exclusive)."""
        return self.takes.filled([cache.read(start, stop) for cache in self.given])

    def gathered(self, batch: torch.Tensor) -> Inputs:
        """What the network is given, of samples of these indices `[B]`."""
        return self.takes.filled([cache.gather(batch) for cache in self.given])


class UnitFit:
    """One unit in one phase; its caches go when it goes.

    Attributes:
        unit: the unit.
        layers: its quantized layers.
        quantizers: the activation quantizers that it may learn.
        reads: its arguments.
        gives: what it puts out.
        student: cached arguments as the quantized network gives them, if the phase uses them.
        teacher: cached arguments as the float network gives them, if the phase uses them.
        targets: what the float unit puts out.
        weights: of the error of the unit's first output, with its rows, once `update_fisher` was called.
        outputs: what the quantized unit puts out, if that is kept.
    """

    def __init__(self, fitted: Fitted, index: int, phase: Phase) -> None:
        """Take unit number `index`; nothing runs yet."""
        self._fitted, self._index, self._phase = fitted, index, phase
        self._model, self._replay = fitted.model, fitted.replay
        self.unit: Unit = fitted.replay.units[index]
        self.layers, self.quantizers = fitted.parts[index]
        self.reads: Signature = fitted.replay.inputs[index]
        self.gives: Signature = fitted.replay.outputs[index]
        self.student: list[RowCache] = []
        self.teacher: list[RowCache] = []
        self.targets: list[RowCache] = []
        self.outputs: list[RowCache] = []
        self.weights: RowCache | None = None
        self._before = Stream()

    @property
    def device(self) -> torch.device:
        """Where the unit is."""
        return self._model.device

    @property
    def source(self) -> list[RowCache]:
        """The arguments with which the unit is calibrated and its loss measured."""
        return self.teacher if self._phase.inputs == "teacher" else self.student

    def gather(self, teacher: Stream, student: Stream) -> None:
        """Cache targets and arguments, one chunk of samples at a time, from what earlier units put out."""
        self.targets = self._caches(self.gives)
        self._before = teacher if self._phase.inputs == "teacher" else student
        for start, stop in self._fitted.chunks():
            with self._model.mode(weights=False, activations=False), torch.no_grad():
                leaves, origins = self._arguments(start, stop, teacher)
                if self._phase.inputs != "student":
                    self.teacher = self._keep(self.teacher, start, leaves, origins, teacher)
                self._write(self.targets, start, self._run(leaves))
            if self._phase.inputs != "teacher":
                with self._quantized(), torch.no_grad():
                    leaves, origins = self._arguments(start, stop, student)
                    self.student = self._keep(self.student, start, leaves, origins, student)

    def keep_outputs(self) -> None:
        """Make room for what the quantized unit puts out; `fit` and `run_student` fill it."""
        self.outputs = self._caches(self.gives)

    def run_student(self) -> None:
        """Fill `outputs`, if they are kept."""
        if self.outputs:
            with self._quantized(), torch.no_grad():
                for start, stop in self._fitted.chunks():
                    self._write(self.outputs, start, self._run(self._read(self.source, start, stop)))

    def fit(self, rng: Rng, bar: Bar) -> UnitReport:
        """Learn the unit; put it back if that made it worse. Fills `outputs`, if they are kept.

        Args:
            rng: randomness of this unit.
            bar: advanced with each step.
        """
        began, phase = time.perf_counter(), self._phase
        with self._quantized():
            if phase.activations and phase.calibrate_images:
                self.calibrate()
            rounded = self._rounded()
            if phase.fisher and rounded:
                self.update_fisher()
            start_loss = self.loss()
            before = snapshot(self.layers, self.quantizers)
            learned = Learned(None, (), ())
            if rounded or phase.activation_scale_lr:
                error_of, device = UNIT_ERRORS.get(phase.error)(self, rng), self._model.device
                learnable = Learnable(rounded, self.quantizers, error_of, self._fitted.count, device)
                with saved_results(self._model.module):
                    learned = learn_unit(phase, learnable, rng, _ticker(bar, self.unit))
            end_loss = self.loss(self.outputs)
            diverged = not end_loss <= start_loss
            if diverged:
                before.restore(self.layers, self.quantizers)
                self.run_student()
        if not learned.steps:
            bar.advance(max(phase.iterations, 1))
        return UnitReport(
            name=self.unit.name, layers=self.unit.layers, loss_start=finite(start_loss), loss_end=finite(end_loss),
            undecided=learned.undecided, diverged=diverged, seconds=time.perf_counter() - began,
            steps=learned.steps, losses=learned.losses,
        )  # fmt: skip

    def calibrate(self) -> None:
        """Set the unit's activation ranges from the quantized network's own activations."""
        count = min(self._phase.calibrate_images or 0, self._fitted.count)

        def run() -> None:
            for start, stop in self._fitted.chunks():
                if start < count:
                    self._replay.run_unit(self._index, self._read(self.source, start, min(stop, count)))

        with torch.no_grad():
            observe(self.quantizers, run, self._phase.observer)

    def loss(self, outputs: Sequence[RowCache] = ()) -> float:
        """Squared reconstruction error over all samples, with hard rounding and no dropping; weighted if learning is.

        What the unit puts out is kept in `outputs`, if there are any, so that it need not run again.
        """
        total = 0.0
        with torch.no_grad():
            for start, stop in self._fitted.chunks():
                output = self._run(self._read(self.source, start, stop))
                if outputs:
                    self._write(outputs, start, output)
                wanted = self._wanted([cache.read(start, stop) for cache in self.targets])
                weights = self.gives.first(self.weights.read(start, stop)) if self.weights else None
                error = reconstruction_error(
                    output, wanted, self._channels_last, 2.0, weights, self._phase.fisher == "full"
                )
                total += float(error) * (stop - start)
        return total / self._fitted.count

    def output(self, batch: torch.Tensor, mixing: torch.Generator) -> Leaves:
        """What the unit puts out for samples of these indices, from the inputs of the phase; `mixing` mixes them."""
        phase = self._phase
        student = [cache.gather(batch) for cache in self.student]
        rows = [cache.gather(batch) for cache in self.teacher] if phase.inputs != "student" else student
        if phase.inputs == "mixed":
            rows = [_mix(s, t, phase.quantize_probability, mixing) for s, t in zip(student, rows, strict=True)]
        return self._run([spec.from_rows(row) for spec, row in zip(self.reads.varying, rows, strict=True)])

    def output_error(self, batch: torch.Tensor, output: Leaves) -> torch.Tensor:
        """How far `output` is from what the float unit puts out, in the norm and with the weights of the phase."""
        wanted = self._wanted([cache.gather(batch) for cache in self.targets])
        weights = self.gives.first(self.weights.gather(batch)) if self.weights else None
        full = self._phase.fisher == "full"
        return reconstruction_error(output, wanted, self._channels_last, self._phase.norm, weights, full)

    def rest(self, batch: torch.Tensor, output: Leaves) -> Any:
        """What the float network behind the unit makes of its `output` for samples of these indices.

        Gradients reach `output`, which stays as it is. It can be asked for at any step.
        """
        copies = [leaf.clone() for leaf in output]  # what follows may work in place
        stored = partial(self._gathered, self._before, batch)
        with in_float(self._fitted.parts[self._index + 1 :]):
            return self._replay.run_behind(self._index, self._fitted.gathered(batch), copies, stored)

    @torch.no_grad()
    def float_answer(self, batch: torch.Tensor) -> Any:
        """What the float network makes of samples of these indices."""
        with self._model.mode(weights=False, activations=False):
            return self._fitted.gathered(batch).call(self._model)

    def update_fisher(self) -> None:
        """Weigh the error of the unit's first output by what the network's answer depends on as the unit now is.

        It can be asked for again while the unit learns; nothing is dropped meanwhile.
        """
        fitted, gives = self._fitted, self.gives
        spec, module = gives.varying[gives.main], get_module(self._model.module, self.unit.name)
        later = fitted.parts[self._index + 1 :]
        if self.weights is None:
            self.weights = self._allocate(spec)
        with undropped(self.quantizers):
            for start, stop in fitted.chunks():
                inputs = fitted.inputs(start, stop)
                run = partial(
                    self._replay.run_from, self._index, inputs, partial(self._stored, self._before, start, stop)
                )
                gradient = output_gradient(self._model, module, gives.leaf(gives.main), later, inputs, run)
                self.weights.write(start, fisher_weights(spec.to_rows(gradient)))

    def _quantized(self) -> AbstractContextManager[None]:
        """The network as it is quantized in this phase."""
        return self._model.mode(weights=True, activations=self._phase.activations)

    def _rounded(self) -> list[QuantLayer]:
        """Those of the unit's layers whose roundings the phase learns."""
        if not self._phase.rounding_lr:
            return []
        first = self._model.layers.get(self._model.first_layer) if self._phase.skip_first_layer else None
        return [layer for layer in self.layers if layer.weight_quantizer is not None and layer is not first]

    def _arguments(self, start: int, stop: int, stream: Stream) -> tuple[Leaves, list[int | None]]:
        """The unit's arguments for some samples, and which earlier unit's output each of them is as it is."""
        reads_inputs = NETWORK_INPUT in self._replay.sources[self._index]
        inputs = self._fitted.inputs(start, stop) if reads_inputs else None
        return self._replay.run_to(self._index, stop - start, inputs, partial(self._stored, stream, start, stop))

    def _gathered(self, stream: Stream, batch: torch.Tensor, unit: int) -> Leaves:
        specs = self._replay.outputs[unit].varying
        return [spec.from_rows(cache.gather(batch)) for spec, cache in zip(specs, stream.outputs[unit], strict=True)]

    def _stored(self, stream: Stream, start: int, stop: int, unit: int) -> Leaves:
        specs = self._replay.outputs[unit].varying
        return [
            spec.from_rows(cache.read(start, stop)) for spec, cache in zip(specs, stream.outputs[unit], strict=True)
        ]

    def _keep(
        self, caches: list[RowCache], start: int, leaves: Leaves, origins: list[int | None], stream: Stream
    ) -> list[RowCache]:
        """Cache the leaves of a chunk; those that are another unit's output as it is share that unit's cache."""
        specs = self.reads.varying
        if not caches:
            caches = [
                self._allocate(spec) if origin is None else stream.outputs[origin][0]
                for spec, origin in zip(specs, origins, strict=True)
            ]
        for cache, spec, leaf, origin in zip(caches, specs, leaves, origins, strict=True):
            if origin is None:
                cache.write(start, spec.to_rows(leaf))
        return caches

    def _caches(self, signature: Signature) -> list[RowCache]:
        """Empty caches for the leaves of a signature."""
        return [self._allocate(spec) for spec in signature.varying]

    def _allocate(self, spec: TensorSpec) -> RowCache:
        return self._fitted.store.allocate(spec.rows(self._fitted.count), spec.dtype)

    def _run(self, leaves: Leaves) -> Leaves:
        return self.gives.per_sample(self._replay.run_unit(self._index, leaves))

    def _write(self, caches: Sequence[RowCache], start: int, leaves: Leaves) -> None:
        for cache, spec, leaf in zip(caches, self.gives.varying, leaves, strict=True):
            cache.write(start, spec.to_rows(leaf))

    def _read(self, caches: list[RowCache], start: int, stop: int) -> Leaves:
        return [spec.from_rows(cache.read(start, stop)) for spec, cache in zip(self.reads.varying, caches, strict=True)]

    def _wanted(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        return [spec.from_rows(row) for spec, row in zip(self.gives.varying, rows, strict=True)]

    @cached_property
    def _channels_last(self) -> bool:
        """Whether the unit puts out tokens rather than feature maps; tried out on one sample."""
        layer, leaf = get_module(self._model.module, self.unit.layers[-1]), self.gives.main
        with self._model.mode(weights=False, activations=False):
            return channels_last(layer, lambda: self._run(self._read(self.source, 0, 1))[leaf])


ErrorOf = Callable[[torch.Tensor], torch.Tensor]
"""The differentiable error of a unit for a batch of indices of samples."""
UNIT_ERRORS: Registry[Callable[[UnitFit, Rng], ErrorOf]] = Registry("error of a unit")


@UNIT_ERRORS.register("outputs")
def output_error(unit: UnitFit, rng: Rng) -> ErrorOf:
    """The error of what the unit puts out, as AdaRound, BRECQ, QDrop and Genie-M have it."""
    mixing = rng.generator("mix", unit.device)
    return lambda batch: unit.output_error(batch, unit.output(batch, mixing))


def _mix(student: torch.Tensor, teacher: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """QDrop's mixture of quantized and float inputs, element by element; whole numbers and masks are the teacher's."""
    if not student.is_floating_point():
        return teacher
    return torch.lerp(teacher, student, random_keep(student, probability, generator))


def _ticker(bar: Bar, unit: Unit) -> Callable[[int, float | None], None]:
    def tick(step: int, loss: float | None) -> None:
        if loss is None:
            bar.advance(1)
        else:
            bar.advance(1, unit=unit.name or "network", loss=loss)

    return tick
