"""Unit by unit reconstruction: one engine for AdaRound, BRECQ, QDrop and Genie-M.

Each unit is fitted to the output of the float unit. What flows between units is cached and rolled forward: the inputs
of a unit come from the cached outputs of the units before it, so every unit runs once in floating point and once
quantized, whatever the depth of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from synthquant.core.modules import get_module
from synthquant.core.progress import Progress
from synthquant.core.quant_report import UnitReport
from synthquant.core.rng import Rng
from synthquant.methods import MemoryBudget
from synthquant.models.blocks import Granularity, Unit
from synthquant.models.signature import Signature
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.operations import activation_quantizers
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.cache import CacheStore, RowCache, Stream
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.learn import Phase
from synthquant.quantize.replay import Replay
from synthquant.quantize.unit_files import Parts, UnitFiles
from synthquant.quantize.unit_fit import Fitted, UnitFit


class Reconstruction:
    """Fits the units of a network one after the other.

    Attributes:
        units: the units.
        store: the caches, which tell how much memory they took.
        fitted: what the units share.
    """

    def __init__(
        self,
        model: QuantModel,
        samples: CalibrationSet,
        granularity: Granularity,
        memory: MemoryBudget,
        workdir: Path | None,
    ) -> None:
        """Cache what the network is given.

        Args:
            model: a calibrated network with float weights.
            samples: the calibration set.
            granularity: what a unit is: `block`, `layer` or `network`.
            memory: budget of the caches.
            workdir: where finished units are kept, for resuming, and caches that fit in no memory; none: neither.
        """
        self.units = model.units(granularity)
        self.store = CacheStore(memory, model.device, workdir)
        with model.mode(weights=False, activations=False):
            replay = Replay(model.module, self.units, model.float_model.example(3))
        takes = model.float_model.example(1)
        caches, count = self._cache_inputs(takes.signature, samples)
        parts = _parts(model, self.units)
        steps = samples.steps_of(count)
        self.fitted = Fitted(model, replay, parts, self.store, takes, caches, count, samples.at_once, steps)
        self._workdir = workdir
        self._calibration = samples
        self._learned = ""  # what the phases so far led to

    def run(self, phase: Phase, rng: Rng, progress: Progress) -> list[UnitReport]:
        """Go through all units once.

        Args:
            phase: what is learned and how.
            rng: randomness; each unit draws from its own child.
            progress: told about each unit.
        """
        made_from = partial(self._made_from, phase, rng)
        files = UnitFiles(self._workdir, phase.name, made_from, after=self._learned, progress=progress)
        reports = files.load_all(self.fitted.parts) or self._fit_all(phase, files, rng, progress)
        self._learned = files.outcome
        return reports

    def _fit_all(self, phase: Phase, files: UnitFiles, rng: Rng, progress: Progress) -> list[UnitReport]:
        """Fit or load the units one after the other, rolling forward what they put out."""
        teacher, student, reports = Stream(), Stream(), []
        with progress.bar(phase.name, len(self.units) * max(phase.iterations, 1)) as bar:
            for index, unit in enumerate(self.units):
                needed = self.fitted.replay.needed_after(index)
                own = UnitFit(self.fitted, index, phase)
                own.gather(teacher, student)
                report = files.load(index, self.fitted.parts[index])
                if phase.inputs != "teacher" and index in needed:
                    own.keep_outputs()
                if report is None:
                    report = own.fit(rng.child(unit.name), bar)
                    files.save(index, self.fitted.parts[index], report)
                    _warn_of_diverged(report, progress)
                else:
                    bar.advance(max(phase.iterations, 1))
                    own.run_student()
                reports.append(report)
                if own.outputs is not None:
                    student.outputs[index] = own.outputs
                if index in needed:
                    teacher.outputs[index] = own.targets
                teacher.drop_all_but(needed)
                student.drop_all_but(needed)
        return reports

    def _cache_inputs(self, takes: Signature, samples: CalibrationSet) -> tuple[list[RowCache], int]:
        caches = [self.store.allocate(spec.rows(len(samples)), spec.dtype) for spec in takes.varying]
        count = 0
        for batch in samples.batches():
            for cache, tensor in zip(caches, batch.tensors, strict=True):
                cache.write(count, tensor)
            count += len(batch)
        return caches, count

    def _made_from(self, *more: object) -> tuple[object, ...]:
        model = self.fitted.model
        if model.equalization is not None:
            more = (model.equalization.fingerprint, *more)
        return (model.float_model.fingerprint, model.scheme, self._calibration.fingerprint, self.units, *more)


def _warn_of_diverged(report: UnitReport, progress: Progress) -> None:
    if report.diverged:
        losses = (report.loss_start, report.loss_end)
        change = " to ".join("not finite" if loss is None else f"{loss:.4g}" for loss in losses)
        progress.warn(f"unit {report.name or 'network'} got worse ({change}) and was put back")


def _parts(model: QuantModel, units: Sequence[Unit]) -> list[Parts]:
    """Layers of each unit, and the quantizers it may learn: those it runs, not fixed, and not an earlier unit's."""
    taken: set[int] = set()
    parts: list[Parts] = []
    for unit in units:
        layers = [model.layers[name] for name in unit.layers if name in model.layers]
        found = activation_quantizers(get_module(model.module, unit.name))
        own: list[ActivationQuantizer] = [part for part in found if not part.fixed and id(part) not in taken]
        taken |= {id(part) for part in own}
        parts.append((layers, own))
    return parts
