"""Unit by unit reconstruction: one engine for AdaRound, BRECQ, QDrop and Genie-M.

Each unit is fitted to the output of the float unit. What flows between units is cached and rolled forward: the inputs
of a unit come from the cached outputs of the units before it, so every unit runs once in floating point and once
quantized, whatever the depth of the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from synthquant.core.clips import saved_results
from synthquant.core.modules import get_module
from synthquant.core.progress import Bar, Progress
from synthquant.core.rng import Rng
from synthquant.methods import MemoryBudget, UnitReport
from synthquant.models.blocks import Granularity, Unit
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.functional import random_keep
from synthquant.nn.layers import QuantLayer
from synthquant.nn.operations import activation_quantizers
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.cache import CacheStore, RowCache
from synthquant.quantize.calibrate import CalibrationImages, observe
from synthquant.quantize.fisher import fisher_weights, output_gradient
from synthquant.quantize.layout import channels_last
from synthquant.quantize.learn import Learned, Phase, learn_unit, reconstruction_error
from synthquant.quantize.replay import NETWORK_INPUT, Leaves, Replay
from synthquant.quantize.unit_files import UnitFiles, finite, snapshot


@dataclass
class _Stream:
    """What one of the two networks (float or quantized) put out so far: caches of unit outputs still needed."""

    outputs: dict[int, list[RowCache]] = field(default_factory=dict)

    def drop_all_but(self, needed: set[int]) -> None:
        for index in set(self.outputs) - needed:
            del self.outputs[index]


class Reconstruction:
    """Fits the units of a network one after the other.

    Attributes:
        store: the caches, which tell how much memory they took.
    """

    def __init__(
        self,
        model: QuantModel,
        images: CalibrationImages,
        granularity: Granularity,
        memory: MemoryBudget,
        workdir: Path | None,
    ) -> None:
        """Cache the images.

        Args:
            model: a calibrated network with float weights.
            images: the calibration images.
            granularity: what a unit is: `block`, `layer` or `network`.
            memory: budget of the caches.
            workdir: where finished units are kept, for resuming, and caches that fit in no memory; none: neither.
        """
        self.model = model
        self.units = model.units(granularity)
        self.workdir = workdir
        self.store = CacheStore(memory, model.device, workdir)
        with model.mode(weights=False, activations=False):
            self._replay = Replay(model.module, self.units, model.float_model.example_input(3))
        self._calibration = images
        self._images, self.count = self._cache_images(images)
        self._owners = _owners(model, self.units)
        self._learned = ""  # what the phases so far led to

    def run(self, phase: Phase, rng: Rng, progress: Progress) -> list[UnitReport]:
        """Go through all units once.

        Args:
            phase: what is learned and how.
            rng: randomness; each unit draws from its own child.
            progress: told about each unit.
        """
        made_from = partial(self._made_from, phase, rng)
        files = UnitFiles(self.workdir, phase.name, made_from, after=self._learned, progress=progress)
        finished = files.load_all([self._parts(index) for index in range(len(self.units))])
        if finished is not None:
            self._learned = files.outcome
            return finished
        teacher, student = _Stream(), _Stream()
        reports = []
        with progress.bar(phase.name, len(self.units) * max(phase.iterations, 1)) as bar:
            for index in range(len(self.units)):
                needed = self._replay.needed_after(index)
                targets, inputs = self._gather_inputs(index, phase, teacher, student)
                report = files.load(index, self._parts(index))
                outputs = self._outputs(index) if phase.inputs != "teacher" and index in needed else []
                if report is None:
                    stream = teacher if phase.inputs == "teacher" else student
                    child = rng.child(self.units[index].name)
                    report = self._fit(index, phase, inputs, targets, stream, outputs, child, bar)
                    files.save(index, self._parts(index), report)
                    if report.diverged:
                        losses = (report.loss_start, report.loss_end)
                        change = " to ".join("not finite" if loss is None else f"{loss:.4g}" for loss in losses)
                        progress.warn(f"unit {report.name or 'network'} got worse ({change}) and was put back")
                else:
                    bar.advance(max(phase.iterations, 1))
                    if outputs:
                        self._run_student(index, phase, inputs.student, outputs)
                reports.append(report)
                if outputs:
                    student.outputs[index] = outputs
                if index in needed:
                    teacher.outputs[index] = targets
                teacher.drop_all_but(needed)
                student.drop_all_but(needed)
        self._learned = files.outcome
        return reports

    def _cache_images(self, images: CalibrationImages) -> tuple[RowCache, int]:
        height, width = self.model.float_model.preprocess.input_size
        cache = self.store.allocate((len(images), 3, height, width))
        count = 0
        for batch in images.batches():
            cache.write(count, batch)
            count += len(batch)
        return cache, count

    def _made_from(self, *more: object) -> tuple[object, ...]:
        float_model, equalization = self.model.float_model, self.model.equalization
        if equalization is not None:
            more = (equalization.fingerprint, *more)
        return (float_model.fingerprint, self.model.scheme, self._calibration.fingerprint, self.units, *more)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        size = self._calibration.at_once
        for start in range(0, self.count, size):
            yield start, min(start + size, self.count)

    def _parts(self, index: int) -> tuple[list[QuantLayer], list[ActivationQuantizer]]:
        layers = [self.model.layers[name] for name in self.units[index].layers if name in self.model.layers]
        return layers, self._owners[index]

    def _gather_inputs(
        self, index: int, phase: Phase, teacher: _Stream, student: _Stream
    ) -> tuple[list[RowCache], _Inputs]:
        """Targets of a unit and the inputs it learns from, one chunk of images at a time."""
        targets = self._outputs(index)
        inputs = _Inputs()
        for start, stop in self._chunks():
            with self.model.mode(weights=False, activations=False), torch.no_grad():
                leaves, origins = self._inputs_of(index, start, stop, teacher)
                if phase.inputs != "student":
                    inputs.teacher = self._keep(inputs.teacher, index, start, leaves, origins, teacher)
                self._write(index, targets, start, self._run(index, leaves))
            if phase.inputs != "teacher":
                with self.model.mode(weights=True, activations=phase.activations), torch.no_grad():
                    leaves, origins = self._inputs_of(index, start, stop, student)
                    inputs.student = self._keep(inputs.student, index, start, leaves, origins, student)
        return targets, inputs

    def _inputs_of(self, index: int, start: int, stop: int, stream: _Stream) -> tuple[Leaves, list[int | None]]:
        reads_images = NETWORK_INPUT in self._replay.sources[index]
        images = self._images.read(start, stop) if reads_images else None
        return self._replay.run_to(index, stop - start, images, partial(self._stored, stream, start, stop))

    def _stored(self, stream: _Stream, start: int, stop: int, unit: int) -> Leaves:
        kinds = self._replay.outputs[unit].varying
        return [
            kind.from_rows(cache.read(start, stop)) for kind, cache in zip(kinds, stream.outputs[unit], strict=True)
        ]

    def _keep(
        self,
        caches: list[RowCache],
        index: int,
        start: int,
        leaves: Leaves,
        origins: list[int | None],
        stream: _Stream,
    ) -> list[RowCache]:
        """Cache the leaves of a chunk; those that are another unit's output as it is share that unit's cache."""
        kinds = self._replay.inputs[index].varying
        if not caches:
            caches = [
                self.store.allocate(kind.rows(self.count), kind.dtype) if origin is None else stream.outputs[origin][0]
                for kind, origin in zip(kinds, origins, strict=True)
            ]
        for cache, kind, leaf, origin in zip(caches, kinds, leaves, origins, strict=True):
            if origin is None:
                cache.write(start, kind.to_rows(leaf))
        return caches

    def _outputs(self, index: int) -> list[RowCache]:
        """Empty caches for what a unit puts out."""
        kinds = self._replay.outputs[index].varying
        return [self.store.allocate(kind.rows(self.count), kind.dtype) for kind in kinds]

    def _run(self, index: int, leaves: Leaves) -> Leaves:
        return self._replay.outputs[index].per_image(self._replay.run_unit(index, leaves))

    def _write(self, index: int, caches: Sequence[RowCache], start: int, leaves: Leaves) -> None:
        for cache, kind, leaf in zip(caches, self._replay.outputs[index].varying, leaves, strict=True):
            cache.write(start, kind.to_rows(leaf))

    def _run_student(self, index: int, phase: Phase, inputs: list[RowCache], outputs: Sequence[RowCache]) -> None:
        """Fill `outputs` with what the quantized unit puts out."""
        with self.model.mode(weights=True, activations=phase.activations), torch.no_grad():
            for start, stop in self._chunks():
                self._write(index, outputs, start, self._run(index, self._read(index, inputs, start, stop)))

    def _read(self, index: int, caches: list[RowCache], start: int, stop: int) -> Leaves:
        kinds = self._replay.inputs[index].varying
        return [kind.from_rows(cache.read(start, stop)) for kind, cache in zip(kinds, caches, strict=True)]

    def _fit(
        self,
        index: int,
        phase: Phase,
        inputs: _Inputs,
        targets: list[RowCache],
        stream: _Stream,
        outputs: Sequence[RowCache],
        rng: Rng,
        bar: Bar,
    ) -> UnitReport:
        """Learn one unit; put it back if that made it worse. Fills `outputs`, if there are any."""
        began = time.perf_counter()
        unit = self.units[index]
        layers, quantizers = self._parts(index)
        source = inputs.teacher if phase.inputs == "teacher" else inputs.student
        with self.model.mode(weights=True, activations=phase.activations):
            if phase.activations and phase.calibrate_images:
                self._calibrate(index, phase, source, quantizers)
            rounded = self._rounded(phase, layers)
            fisher = self._fisher(index, stream) if phase.fisher and rounded else None
            start_loss = self._loss(index, phase, source, targets, fisher)
            before = snapshot(layers, quantizers)
            learned = Learned(None, (), ())
            if rounded or phase.activation_scale_lr:
                error_of = self._error_of(index, phase, inputs, targets, fisher, rng)
                with saved_results(self.model.module):
                    learned = learn_unit(
                        phase, rounded, quantizers, error_of, self.count, self.model.device, rng, _ticker(bar, unit)
                    )
            end_loss = self._loss(index, phase, source, targets, fisher, outputs)
            diverged = not end_loss <= start_loss
            if diverged:
                before.restore(layers, quantizers)
                if outputs:
                    self._run_student(index, phase, source, outputs)
        if not learned.steps:
            bar.advance(max(phase.iterations, 1))
        return UnitReport(
            name=unit.name, layers=unit.layers, loss_start=finite(start_loss), loss_end=finite(end_loss),
            undecided=learned.undecided, diverged=diverged, seconds=time.perf_counter() - began,
            steps=learned.steps, losses=learned.losses,
        )  # fmt: skip

    def _rounded(self, phase: Phase, layers: Sequence[QuantLayer]) -> list[QuantLayer]:
        """Those of a unit's layers whose roundings the phase learns."""
        if not phase.rounding_lr:
            return []
        first = self.model.layers.get(self.model.first_layer) if phase.skip_first_layer else None
        return [layer for layer in layers if layer.weight_quantizer is not None and layer is not first]

    def _calibrate(
        self, index: int, phase: Phase, source: list[RowCache], quantizers: Sequence[ActivationQuantizer]
    ) -> None:
        """Set the unit's activation ranges from the quantized network's own activations."""
        count = min(phase.calibrate_images or 0, self.count)

        def run() -> None:
            for start, stop in self._chunks():
                if start < count:
                    self._replay.run_unit(index, self._read(index, source, start, min(stop, count)))

        with torch.no_grad():
            observe(quantizers, run, phase.observer)

    def _loss(
        self,
        index: int,
        phase: Phase,
        source: list[RowCache],
        targets: list[RowCache],
        fisher: RowCache | None,
        outputs: Sequence[RowCache] = (),
    ) -> float:
        """Squared reconstruction error over all images, with hard rounding and no dropping; weighted if learning is.

        What the unit puts out is kept in `outputs`, if there are any, so that it need not run again.
        """
        total, last = 0.0, self._channels_last(index, source)
        with torch.no_grad():
            for start, stop in self._chunks():
                output = self._run(index, self._read(index, source, start, stop))
                if outputs:
                    self._write(index, outputs, start, output)
                wanted = self._targets(index, [cache.read(start, stop) for cache in targets])
                weights = self._replay.outputs[index].first(fisher.read(start, stop)) if fisher else None
                error = reconstruction_error(output, wanted, last, 2.0, weights, phase.fisher == "full")
                total += float(error) * (stop - start)
        return total / self.count

    def _targets(self, index: int, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        kinds = self._replay.outputs[index].varying
        return [kind.from_rows(row) for kind, row in zip(kinds, rows, strict=True)]

    def _channels_last(self, index: int, source: list[RowCache]) -> bool:
        """Whether the unit puts out tokens rather than feature maps; tried out on one image."""
        layer, leaf = get_module(self.model.module, self.units[index].layers[-1]), self._replay.outputs[index].main
        with self.model.mode(weights=False, activations=False):
            return channels_last(layer, lambda: self._run(index, self._read(index, source, 0, 1))[leaf])

    def _error_of(
        self,
        index: int,
        phase: Phase,
        inputs: _Inputs,
        targets: list[RowCache],
        fisher: RowCache | None,
        rng: Rng,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The differentiable error of a batch of image indices."""
        kinds = self._replay.inputs[index].varying
        last = self._channels_last(index, inputs.student or inputs.teacher)
        generator = rng.generator("mix", self.model.device)

        def error_of(batch: torch.Tensor) -> torch.Tensor:
            student = [cache.gather(batch) for cache in inputs.student] if inputs.student else []
            rows = [cache.gather(batch) for cache in inputs.teacher] if phase.inputs != "student" else student
            if phase.inputs == "mixed":
                rows = [_mix(s, t, phase.quantize_probability, generator) for s, t in zip(student, rows, strict=True)]
            leaves = [kind.from_rows(row) for kind, row in zip(kinds, rows, strict=True)]
            output = self._run(index, leaves)
            wanted = self._targets(index, [cache.gather(batch) for cache in targets])
            weights = self._replay.outputs[index].first(fisher.gather(batch)) if fisher else None
            return reconstruction_error(output, wanted, last, phase.norm, weights, phase.fisher == "full")

        return error_of

    def _fisher(self, index: int, stream: _Stream) -> RowCache:
        """Weights of the error of the unit's (first) output, with the rows of that output."""
        port = self._replay.outputs[index]
        kind, module = port.varying[port.main], get_module(self.model.module, self.units[index].name)
        later = [self._parts(other) for other in range(index + 1, len(self.units))]
        cache = self.store.allocate(kind.rows(self.count), kind.dtype)
        for start, stop in self._chunks():
            images = self._images.read(start, stop)
            run = partial(self._replay.run_from, index, images, partial(self._stored, stream, start, stop))
            gradient = output_gradient(self.model, module, port.leaf(port.main), later, images, run)
            cache.write(start, fisher_weights(kind.to_rows(gradient)))
        return cache


@dataclass
class _Inputs:
    """Cached arguments of the unit at hand."""

    student: list[RowCache] = field(default_factory=list)
    teacher: list[RowCache] = field(default_factory=list)


def _mix(student: torch.Tensor, teacher: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """QDrop's mixture of quantized and float inputs, element by element; whole numbers and masks are the teacher's."""
    if not student.is_floating_point():
        return teacher
    return torch.lerp(teacher, student, random_keep(student, probability, generator))


def _owners(model: QuantModel, units: Sequence[Unit]) -> list[list[ActivationQuantizer]]:
    """For each unit the quantizers it may learn: those it runs, not fixed, and not learned by an earlier unit."""
    taken: set[int] = set()
    owners = []
    for unit in units:
        root = get_module(model.module, unit.name)
        found = [quantizer for quantizer in activation_quantizers(root) if not quantizer.fixed]
        own = [part for part in found if id(part) not in taken]
        taken |= {id(part) for part in own}
        owners.append(own)
    return owners


def _ticker(bar: Bar, unit: Unit) -> Callable[[int, float | None], None]:
    def tick(step: int, loss: float | None) -> None:
        if loss is None:
            bar.advance(1)
        else:
            bar.advance(1, unit=unit.name or "network", loss=loss)

    return tick
