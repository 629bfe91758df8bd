"""Fitting one unit to what its float self puts out: what it reads and gives, the loss, and learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch

from synthquant.core.clips import saved_results
from synthquant.core.modules import get_module
from synthquant.core.progress import Bar
from synthquant.core.quant_report import UnitReport
from synthquant.core.registry import Registry
from synthquant.core.rng import Rng
from synthquant.models.blocks import Unit
from synthquant.models.signature import Inputs, Leaves, Signature, TensorSpec
from synthquant.nn.functional import random_keep
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.cache import CacheStore, LeafCaches, RowCache, Stream
from synthquant.quantize.calibrate import observe
from synthquant.quantize.fisher import fisher_weights, in_float, output_gradient
from synthquant.quantize.layout import channels_last
from synthquant.quantize.learn import Learnable, Learned, Phase, learn_unit, reconstruction_error, undropped
from synthquant.quantize.replay import NETWORK_INPUT, Origin, Replay
from synthquant.quantize.unit_files import Parts, Snapshot, finite, snapshot


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
        steps: the sampler step of each sample, if they are of steps.
    """

    model: QuantModel
    replay: Replay
    parts: Sequence[Parts]
    store: CacheStore
    takes: Inputs
    given: Sequence[RowCache]
    count: int
    at_once: int
    steps: torch.Tensor | None = None

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and last sample (exclusive) of what runs at a time."""
        for start in range(0, self.count, self.at_once):
            yield start, min(start + self.at_once, self.count)

    def inputs(self, start: int, stop: int) -> Inputs:
        """What the network is given, of the samples from `start` to `stop` (exclusive)."""
        return self.takes.filled([cache.read(start, stop) for cache in self.given])

    def caches(self, specs: Sequence[TensorSpec]) -> LeafCaches:
        """Room for tensors of these kinds."""
        return LeafCaches(specs, [self.store.allocate(spec.rows(self.count), spec.dtype) for spec in specs])

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
        self.student: LeafCaches | None = None
        self.teacher: LeafCaches | None = None
        self.targets = fitted.caches(())
        self.outputs: LeafCaches | None = None
        self.weights: LeafCaches | None = None
        self._before, self._float_before = Stream(), Stream()

    @property
    def phase(self) -> Phase:
        """What is learned and how."""
        return self._phase

    @property
    def model(self) -> QuantModel:
        """The network that the unit is part of."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where the unit is."""
        return self._model.device

    @property
    def source(self) -> LeafCaches:
        """The arguments with which the unit is calibrated and its loss measured."""
        found = self.teacher if self._phase.inputs == "teacher" else self.student
        assert found is not None  # the first chunk was gathered
        return found

    def gather(self, teacher: Stream, student: Stream) -> None:
        """Cache targets and arguments, one chunk of samples at a time, from what earlier units put out."""
        self.targets = self._fitted.caches(self.gives.varying)
        self._before = teacher if self._phase.inputs == "teacher" else student
        self._float_before = teacher
        for start, stop in self._fitted.chunks():
            with self._model.mode(weights=False, activations=False), torch.no_grad():
                leaves, origins = self._arguments(start, stop, teacher)
                if self._phase.inputs != "student":
                    self.teacher = self._keep(self.teacher, start, leaves, origins, teacher)
                self.targets.write(start, self._run(leaves))
            if self._phase.inputs != "teacher":
                with self._quantized(), torch.no_grad():
                    leaves, origins = self._arguments(start, stop, student)
                    self.student = self._keep(self.student, start, leaves, origins, student)

    def keep_outputs(self) -> None:
        """Make room for what the quantized unit puts out; `fit` and `run_student` fill it."""
        self.outputs = self._fitted.caches(self.gives.varying)

    def run_student(self) -> None:
        """Fill `outputs`, if they are kept."""
        if self.outputs is not None:
            with self._quantized(), torch.no_grad():
                for start, stop in self._fitted.chunks():
                    self.outputs.write(start, self._run(self.source.read(start, stop)))

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
            learned, error_of = Learned(None, (), ()), None
            if rounded or phase.activation_scale_lr:
                error_of, fitted = UNIT_ERRORS.get(phase.error)(self, rng), self._fitted
                learnable = Learnable(rounded, self.quantizers, error_of, fitted.count, self.device, fitted.steps)
                with saved_results(self._model.module):
                    learned = learn_unit(phase, learnable, rng, _ticker(bar, self.unit))
            end_loss = self.loss(self.outputs)
            if learned.steps and isinstance(error_of, JudgingError):
                diverged = self._is_worse(error_of, before)
            else:
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
                    self._replay.run_unit(self._index, self.source.read(start, min(stop, count)))

        with torch.no_grad():
            observe(self.quantizers, run, self._phase.observer)

    def loss(self, outputs: LeafCaches | None = None) -> float:
        """Squared reconstruction error over all samples, with hard rounding and no dropping; weighted if learning is.

        What the unit puts out is kept in `outputs`, if there are any, so that it need not run again.
        """
        total = 0.0
        with torch.no_grad():
            for start, stop in self._fitted.chunks():
                output = self._run(self.source.read(start, stop))
                if outputs is not None:
                    outputs.write(start, output)
                wanted = self.targets.read(start, stop)
                weights = None if self.weights is None else self.weights.read(start, stop)[0]
                error = reconstruction_error(
                    output, wanted, self._channels_last, 2.0, weights, self._phase.fisher == "full"
                )
                total += float(error) * (stop - start)
        return total / self._fitted.count

    def output(self, batch: torch.Tensor, mixing: torch.Generator) -> Leaves:
        """What the unit puts out for samples of these indices, from the inputs of the phase; `mixing` mixes them."""
        phase, student, teacher = self._phase, self.student, self.teacher
        leaves = self.source.gather(batch) if teacher is None else teacher.gather(batch)
        if phase.inputs == "mixed" and student is not None:
            pairs = enumerate(zip(student.gather(batch), leaves, strict=True))
            leaves = [
                _mix(own, wanted, phase.quantize_probability, mixing, infinite=place in student.infinite)
                for place, (own, wanted) in pairs
            ]
        return self._run(leaves)

    def output_error(self, batch: torch.Tensor, output: Leaves) -> torch.Tensor:
        """How far `output` is from what the float unit puts out, in the norm and with the weights of the phase."""
        wanted = self.targets.gather(batch)
        weights = None if self.weights is None else self.weights.gather(batch)[0]
        full = self._phase.fisher == "full"
        return reconstruction_error(output, wanted, self._channels_last, self._phase.norm, weights, full)

    def samples(self) -> Iterator[torch.Tensor]:
        """Indices of all samples, as many at a time as run together without gradients."""
        for start, stop in self._fitted.chunks():
            yield torch.arange(start, stop, device=self.device)

    @torch.no_grad()
    def alone(self, batch: torch.Tensor) -> Leaves:
        """What the unit as it now is puts out behind a float network; the phase must not read the student alone."""
        assert self.teacher is not None
        return self._run(self.teacher.gather(batch))

    def rest(self, batch: torch.Tensor, output: Leaves, *, float_before: bool = False) -> Any:
        """What the float network behind the unit makes of its `output` for samples of these indices.

        Gradients reach `output`, which stays as it is. It can be asked for at any step.

        Args:
            batch: the indices, `[B]`.
            output: the unit's.
            float_before: what units before this one put out, where something behind it reads that, is the float
                network's; else it is that of the inputs of the phase.
        """
        copies = [leaf.clone() for leaf in output]  # what follows may work in place
        stored = partial((self._float_before if float_before else self._before).gather, batch)
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
            self.weights = fitted.caches([spec])
        with undropped(self.quantizers):
            for start, stop in fitted.chunks():
                inputs = fitted.inputs(start, stop)
                run = partial(self._replay.run_from, self._index, inputs, partial(self._before.read, start, stop))
                gradient = output_gradient(self._model, module, gives.leaf(gives.main), later, inputs, run)
                self.weights.rows[0].write(start, fisher_weights(spec.to_rows(spec.samples_first(gradient))))

    def _is_worse(self, error: JudgingError, before: Snapshot) -> bool:
        """Whether the unit's error, as it was weighed last, is larger than it is for what the unit was `before`."""
        after, errors = snapshot(self.layers, self.quantizers), []
        for state in (before, after):
            state.restore(self.layers, self.quantizers)
            with torch.no_grad():
                batches = ((batch, self._run(self.source.gather(batch))) for batch in self.samples())
                errors.append(sum(float(error.judge(batch, output)) * len(batch) for batch, output in batches))
        return not errors[1] <= errors[0]

    def _quantized(self) -> AbstractContextManager[None]:
        """The network as it is quantized in this phase."""
        return self._model.mode(weights=True, activations=self._phase.activations)

    def _rounded(self) -> list[QuantLayer]:
        """Those of the unit's layers whose roundings the phase learns."""
        if not self._phase.rounding_lr and not self._phase.weight_lr:
            return []
        first = self._model.layers.get(self._model.first_layer) if self._phase.skip_first_layer else None
        return [layer for layer in self.layers if layer.weight_quantizer is not None and layer is not first]

    def _arguments(self, start: int, stop: int, stream: Stream) -> tuple[Leaves, list[Origin | None]]:
        """The unit's arguments for some samples, and whose output or input of the network each of them is as it is."""
        reads_inputs = NETWORK_INPUT in self._replay.sources[self._index]
        inputs = self._fitted.inputs(start, stop) if reads_inputs else None
        return self._replay.run_to(self._index, stop - start, inputs, partial(stream.read, start, stop))

    def _keep(
        self, caches: LeafCaches | None, start: int, leaves: Leaves, origins: list[Origin | None], stream: Stream
    ) -> LeafCaches:
        """Cache the leaves of a chunk; those that have a cache already, as they are, share that."""
        if caches is None:
            specs = self.reads.varying
            found = [
                self._fitted.caches([spec]).rows[0] if origin is None else self._cached(origin, stream)
                for spec, origin in zip(specs, origins, strict=True)
            ]
            caches = LeafCaches(specs, found)
        own = [index for index, origin in enumerate(origins) if origin is None]
        caches.write(start, leaves, own)
        return caches

    def _cached(self, origin: Origin, stream: Stream) -> RowCache:
        source, leaf = origin
        return self._fitted.given[leaf] if source == NETWORK_INPUT else stream.outputs[source].rows[leaf]

    def _run(self, leaves: Leaves) -> Leaves:
        return self.gives.per_sample(self._replay.run_unit(self._index, leaves))

    @cached_property
    def _channels_last(self) -> bool:
        """Whether the unit puts out tokens rather than feature maps; tried out on one sample."""
        layer, leaf = get_module(self._model.module, self.unit.layers[-1]), self.gives.main
        with self._model.mode(weights=False, activations=False):
            return channels_last(layer, lambda: self._run(self.source.read(0, 1))[leaf])


ErrorOf = Callable[[torch.Tensor], torch.Tensor]
"""The differentiable error of a unit for a batch of indices of samples."""


@runtime_checkable
class JudgingError(Protocol):
    """An error that says itself whether learning made a unit worse; of others the squared error of outputs does."""

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """The error for samples of these indices, differentiable."""
        ...

    def judge(self, batch: torch.Tensor, output: Leaves) -> torch.Tensor:
        """The error of what the unit puts out for these samples, weighed as it was last."""
        ...


UNIT_ERRORS: Registry[Callable[[UnitFit, Rng], ErrorOf]] = Registry("error of a unit")


@UNIT_ERRORS.register("outputs")
def output_error(unit: UnitFit, rng: Rng) -> ErrorOf:
    """The error of what the unit puts out, as AdaRound, BRECQ, QDrop and Genie-M have it."""
    mixing = rng.generator("mix", unit.device)
    return lambda batch: unit.output_error(batch, unit.output(batch, mixing))


def _mix(
    student: torch.Tensor, teacher: torch.Tensor, probability: float, generator: torch.Generator, *, infinite: bool
) -> torch.Tensor:
    """QDrop's mixture of quantized and float inputs, element by element; whole numbers and masks are the teacher's."""
    if not student.is_floating_point():
        return teacher
    mixed = torch.lerp(teacher, student, random_keep(student, probability, generator))
    return torch.where(student == teacher, teacher, mixed) if infinite else mixed  # between equal infinities lies none


def _ticker(bar: Bar, unit: Unit) -> Callable[[int, float | None], None]:
    def tick(step: int, loss: float | None) -> None:
        if loss is None:
            bar.advance(1)
        else:
            bar.advance(1, unit=unit.name or "network", loss=loss)

    return tick
