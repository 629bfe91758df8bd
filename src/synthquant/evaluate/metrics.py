"""A user's own metric, and agreement with masks: what they are given, and the numbers that they give.

A metric is one of two things:

- a function `metric(outputs, targets)` that is called once for each network, with what the network gave for all samples
  (a tensor `[count, ...]`, or the network's tuples and dictionaries of such) and with all targets;
- an object with `update(outputs, targets)`, called for each batch, and `compute()`, called at the end, as torchmetrics
  has them, or a class that makes one. Each network gets a fresh copy of the object, and no output is kept.

Outputs are on the CPU, in the type that the network gives. Targets are class labels int64 `[n]` (-1 where one is
missing), or what else the data hold for each sample: stacked in a tensor `[n, ...]` if all of the set are tensors of
one shape, else a list; none if there are none. Both return a number, or a dictionary of numbers by name.
"""

from __future__ import annotations

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from synthquant.core.errors import DataError, InputError, SynthquantError
from synthquant.core.modules import eval_mode
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.data.targets import Targets
from synthquant.evaluate.outputs import ClassOverlap
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import Samples, none_readable, samples_for
from synthquant.models.signature import Inputs, channel_dim, named_outputs
from synthquant.models.user_file import names_code, user_code
from synthquant.models.weights import one_line

Values = dict[str, float | None]
"""What a metric gave, by name; none for a number that is not finite."""

_IGNORED = 255  # in the masks of Pascal VOC, Cityscapes and ADE20K, as 8 bits of -1


@dataclass(frozen=True)
class Metric:
    """A metric that has been looked at, but not called."""

    name: str
    """Of the function or class; that of its number if it gives one only."""
    subject: Any
    """The function, object or class."""

    @classmethod
    def of(cls, metric: Any) -> Metric:
        """Return what a program gave as a metric.

        Raises `InputError` if it is none, or does not take outputs and targets; of a `FILE.py:NAME` as `open_metric`.
        """
        if isinstance(metric, str | Path):
            return open_metric(str(metric))
        updates = _updates(metric)
        if not updates and (isinstance(metric, type) or not callable(metric)):
            kind = metric.__name__ if isinstance(metric, type) else f"a {type(metric).__name__}"
            raise InputError(
                f"{kind} is no metric; give a function of outputs and targets that returns a number or a dictionary of"
                " numbers, or an object or class with update(outputs, targets) and compute()"
            )
        name = getattr(metric, "__name__", type(metric).__name__)
        found = cls("metric" if name == "<lambda>" else name, metric)
        found._require_two(metric.update if updates else metric, 3 if isinstance(metric, type) else 2)
        return found

    def started(self) -> Measuring:
        """Return one for one network, which has seen nothing yet."""
        return Measuring(self)

    def _require_two(self, function: Any, count: int) -> None:
        try:
            inspect.signature(function).bind(*[None] * count)
        except TypeError as error:
            raise InputError(f"metric {self.name} must take outputs and targets: {one_line(error)}") from error
        except ValueError:  # no signature is known of what is written in C
            return


def open_metric(reference: str) -> Metric:
    """Return the metric that `FILE.py:NAME` names.

    Raises `InputError` if there is no such file or name in it, if the file cannot be run, or if that is no metric.
    """
    if not names_code(reference):
        raise InputError(f"metric {reference!r} is not FILE.py:NAME; give a Python file and a function or class in it")
    try:
        with user_code(reference, "metric") as found:
            return Metric.of(found)
    except SynthquantError:
        raise
    except Exception as error:
        raise _failed(f"metric {reference} cannot be opened", error) from error


class Measuring:
    """A metric at work on one network."""

    def __init__(self, metric: Metric) -> None:
        """Start; raises `InputError` if the class or the copy of the object cannot be made."""
        self._metric, self._keeps = metric, not _updates(metric.subject)
        self._outputs: list[Any] = []
        self._indices: list[int] = []
        subject = metric.subject
        if not self._keeps:
            made = subject if isinstance(subject, type) else lambda: copy.deepcopy(subject)
            subject = self._called(made)
        self._subject = subject

    def add(self, outputs: Any, indices: Sequence[int], targets: Targets | None) -> None:
        """Take what the network gave for a batch of samples at these positions."""
        outputs = pytree.tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, outputs)
        if self._keeps:
            self._outputs.append(outputs)
            self._indices += indices
        else:
            self._called(self._subject.update, outputs, None if targets is None else targets.at(indices))

    def values(self, targets: Targets | None) -> Values:
        """Return the numbers.

        Raises `InputError` if the metric fails or gives something else, or outputs of batches cannot be joined for it.
        """
        if self._keeps:
            known = None if targets is None else targets.at(self._indices)
            found = self._called(self._subject, _joined(self._outputs, self._metric.name), known)
        else:
            found = self._called(self._subject.compute)
        values = found if isinstance(found, Mapping) else {self._metric.name: found}
        return {str(name): self._number(name, value) for name, value in values.items()}

    def _number(self, name: Any, value: Any) -> float | None:
        array = value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value
        number = array.item() if isinstance(array, np.ndarray | np.generic) and array.size == 1 else array
        if not isinstance(number, int | float):
            shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
            raise InputError(
                f"metric {self._metric.name} gives a {type(value).__name__}{shape} as {name}; it must give a number,"
                " or a dictionary of numbers by name"
            )
        return float(number) if math.isfinite(number) else None

    def _called(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except SynthquantError:
            raise
        except Exception as error:
            without = " (it was given None as targets: the data have none)" if args[1:] == (None,) else ""
            raise _failed(f"metric {self._metric.name} failed", error, without) from error


class MaskAgreement:
    """Agreement of maps of classes with masks: share of places, and mean over classes of intersection over union.

    Places that a mask marks as 255, or below 0, are left out.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._overlaps: dict[str, ClassOverlap] = {}

    def update(self, outputs: Any, masks: Tensor) -> None:
        """Add outputs `[B, classes, H, W]`, one or several, and masks `[B, H, W]`; those of other sizes are left out.

        Raises `DataError` for a class that the network does not have.
        """
        for name, output in named_outputs(outputs).items():
            dim = channel_dim(output)
            if dim is None or output.ndim != 4 or output.shape[1] < 2 or output.shape[2:] != masks.shape[1:]:
                continue
            known = (masks != _IGNORED) & (masks >= 0)
            wanted = masks[known].long()
            if wanted.numel() and int(wanted.max()) >= output.shape[1]:
                raise DataError(
                    f"masks have the class {int(wanted.max())}, and output {name or 'of the network'} has"
                    f" {output.shape[1]} channels; give masks of its classes, with {_IGNORED} where nothing counts"
                )
            overlap = self._overlaps.setdefault(name, ClassOverlap(output.shape[1]))
            overlap.add(wanted, output.argmax(dim)[known])

    def compute(self) -> dict[str, float]:
        """Return `pixel_accuracy` and `miou` of each output, with its name if it has one."""
        found: dict[str, float] = {}
        for name, overlap in self._overlaps.items():
            found |= {f"{way} {name}".rstrip(): value for way, value in overlap.shares("pixel_accuracy").items()}
        return found


def metrics_for(model: FloatModel, metric: Metric | None, targets: Targets | None) -> list[Metric]:
    """Return what is measured of a network: the user's metric, and the agreement with masks of a `dense` one."""
    dense = model.task == "dense" and targets is not None and targets.masks is not None
    return [*([Metric("masks", MaskAgreement)] if dense else []), *([] if metric is None else [metric])]


@torch.no_grad()
def measure_metrics(
    network: torch.nn.Module,
    model: FloatModel,
    samples: ImageSet | Samples,
    metrics: Sequence[Metric],
    targets: Targets | None,
    *,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    progress: Progress = QUIET,
    title: str = "metric",
) -> Values:
    """Run a network on samples and return what the metrics give.

    Args:
        network: the module of `model`, or its quantized network.
        model: the float network, which says what it takes and where it is.
        samples: images, or what else it takes.
        metrics: at least one.
        targets: of all samples; none: there are none.
        batch_size: samples per forward pass, fewer where activations are large.
        indices: positions of the samples; none: all.
        progress: draws a bar called `title`, and takes warnings of numbers that are not finite.
        title: says what is measured.

    Raises:
        DataError: no sample can be read, or there are more or fewer targets than samples.
        InputError: as `Measuring.values`.
    """
    if targets is not None and len(targets) != len(samples):
        raise DataError(f"there are {len(targets)} targets for {len(samples)} samples; give one for each")
    measured = [metric.started() for metric in metrics]
    places, found = list(range(len(samples)) if indices is None else indices), False
    with eval_mode(network), progress.bar(title, len(places)) as bar:
        for inputs, at in _batches(model, samples, model.samples_at_once(batch_size), places):
            outputs, found = inputs.to(model.device).call(network), True
            for one in measured:
                one.add(outputs, at, targets)
            bar.advance(len(at))
    if not found:
        raise none_readable(samples, len(places), "to measure on")
    return _values(measured, targets, progress, title)


def metrics_of(
    outputs: Tensor,
    images: ImageSet,
    metrics: Sequence[Metric],
    targets: Targets | None,
    progress: Progress,
    title: str,
) -> Values:
    """Return what metrics give for outputs `[n, ...]` of all images of a set that could be read."""
    if targets is not None and len(targets) != len(images):
        raise DataError(f"there are {len(targets)} targets for {len(images)} images; give one for each")
    at = [index for index in range(len(images)) if index not in images.notes.broken]
    measured = [metric.started() for metric in metrics]
    for one in measured:
        one.add(outputs, at, targets)
    return _values(measured, targets, progress, title)


def _values(measured: Sequence[Measuring], targets: Targets | None, progress: Progress, title: str) -> Values:
    found: Values = {}
    for one in measured:
        found |= one.values(targets)
    if missing := [name for name, value in found.items() if value is None]:
        progress.warn(f"{title}: {', '.join(missing)} is not a finite number")
    return found


def _batches(
    model: FloatModel, samples: ImageSet | Samples, size: int, places: Sequence[int]
) -> Iterator[tuple[Inputs, list[int]]]:
    """Inputs with the positions of their samples."""
    if isinstance(samples, ImageSet):
        for batch in input_batches(samples, model.preprocess, size, places):
            yield Inputs.of(batch.inputs), batch.indices
        return
    fitting = samples_for(model, samples)
    for start in range(0, len(places), size):
        chunk, read = list(places[start : start + size]), 0
        for inputs in fitting.batches(size, chunk):
            yield inputs, chunk[read : read + len(inputs)]
            read += len(inputs)
        if read != len(chunk):
            raise DataError(
                f"{len(chunk) - read} of {len(chunk)} samples cannot be read, so that it is not known which target is"
                " of which; leave them out of the samples"
            )


def _updates(metric: Any) -> bool:
    return callable(getattr(metric, "update", None)) and callable(getattr(metric, "compute", None))


def _joined(parts: Sequence[Any], name: str) -> Any:
    """The outputs of all batches as those of one."""
    flat = [pytree.tree_flatten(part) for part in parts]
    leaves = list(zip(*(found for found, _ in flat), strict=False))
    forms = [{leaf.shape[1:] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in one} for one in leaves]
    if any(tree != flat[0][1] for _, tree in flat) or any(len(form) > 1 or None in form for form in forms):
        raise InputError(
            f"metric {name} is a function of all outputs, and those of batches cannot be joined: they are not tensors"
            " of equal shapes in every batch; give an object or class with update(outputs, targets) and compute()"
        )
    return pytree.tree_unflatten([torch.cat(one) for one in leaves], flat[0][1])


def _failed(what: str, error: Exception, end: str = "") -> InputError:
    """What went wrong in a user's code, and on which line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return InputError(f"{what}: {type(error).__name__}: {one_line(error)}{place}{end}")
