"""Accuracy on images, with a confidence interval, and agreement with a reference network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from synthquant.core.errors import DataError, InputError
from synthquant.core.modules import eval_mode
from synthquant.core.progress import QUIET, Progress
from synthquant.core.ranking import top_classes
from synthquant.data.preprocess import Preprocess, input_batches
from synthquant.data.sources import open_images
from synthquant.models.samples import none_readable

_Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class Evaluation:
    """What a network did on a set of images; shares are 0..1, `None` where there is nothing to compare with.

    Of classes with equal logits the lower number comes first, for the network, the reference and the five highest.
    """

    count: int
    """Images that were evaluated."""

    top1: float | None
    """Share whose label got the highest logit; `None` without labels."""

    top5: float | None
    """Share whose label is among the five highest logits (all of them, where the network has fewer than five)."""

    interval: tuple[float, float] | None
    """95% Wilson interval of `top1`."""

    agreement: float | None
    """Share of images with the same top class as the reference."""

    kl: float | None
    """Mean Kullback-Leibler divergence KL(reference || network) of the class probabilities [nats]."""

    recovery: float | None
    """`top1` divided by the reference's `top1`."""

    reference_top1: float | None
    """The reference's `top1`."""

    non_finite: int
    """Images whose logits held NaN or infinity; they count as wrong and as not agreeing, and are left out of `kl`."""

    seconds: float
    """Wall-clock time, reading and preprocessing included."""

    set_aside: tuple[tuple[str, str], ...]
    """Name and reason of every image that could not be read."""

    logits: Tensor
    """`[count, classes]` float32 on the CPU, in the order of the images: the `reference_logits` of another
    evaluation."""

    def row(self, name: str) -> dict[str, Any]:
        """Return the JSON row of the accuracy table in `run.json`, called `name`."""
        return {
            "name": name,
            "count": self.count,
            "top1": self.top1,
            "top5": self.top5,
            "interval": None if self.interval is None else list(self.interval),
            "agreement": self.agreement,
            "kl": self.kl,
            "recovery": self.recovery,
            "non_finite": self.non_finite,
            "seconds": self.seconds,
        }


@torch.no_grad()
def evaluate_model(
    model: nn.Module | Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    data: Any,
    *,
    reference_logits: Tensor | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: Progress = QUIET,
    title: str = "evaluate",
) -> Evaluation:
    """Run `model` on every readable image of `data` and compare with the labels and with `reference_logits`.

    Args:
        model: takes normalised images `[B, C, H, W]`, returns logits `[B, classes]`. A module is put into eval mode for
            the call and back afterwards.
        preprocess: the preprocessing of the network.
        data: images, labelled or not: an image set, or what else `open_images` takes.
        reference_logits: `[count, classes]`, the `logits` of an earlier evaluation on the same images (the float
            network's).
        batch_size: images per forward pass.
        device: where the images go; by default where the parameters of `model` are.
        progress: draws a bar called `title`.

    Raises:
        DataError: there are no images, none could be read, there are neither labels nor reference logits, or a label is
            not a class of the network.
        InputError: `reference_logits` belong to other images or to another number of classes.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give at least 1")
    start = time.perf_counter()
    images = open_images(data)
    parts: list[Tensor] = []
    label_parts: list[Tensor] = []
    target = _device_of(model) if device is None else torch.device(device)
    with _evaluating(model), progress.bar(title, len(images)) as bar:
        for batch in input_batches(images, preprocess, batch_size):
            output = model(batch.inputs.to(target))
            parts.append(_checked(output, len(batch.inputs)).float().cpu())
            if batch.labels is not None:
                label_parts.append(batch.labels)
            bar.advance(len(batch.inputs))
    set_aside = tuple((item.name, item.reason) for item in images.set_aside)
    if not parts:
        raise none_readable(images, len(images), "to evaluate on")
    logits = torch.cat(parts)
    labels = torch.cat(label_parts) if label_parts else None
    evaluation = compare_logits(logits, labels, reference_logits)
    return replace(evaluation, seconds=time.perf_counter() - start, set_aside=set_aside)


def compare_logits(logits: Tensor, labels: Tensor | None, reference_logits: Tensor | None = None) -> Evaluation:
    """Measure logits `[N, classes]` against `labels` `[N]`, against `reference_logits` `[N, classes]`, or both.

    Raises:
        DataError: both are missing, or a label is not in 0..classes-1.
        InputError: a shape does not fit.
    """
    if labels is None and reference_logits is None:
        raise DataError("the images have no labels and there is no reference network to compare with; add labels")
    finite = torch.isfinite(logits).all(dim=1)
    top1 = top5 = recovery = reference_top1 = None
    interval = None
    if labels is not None:
        _check_labels(labels, logits)
        top1, top5 = _top_share(logits, labels, finite, 1), _top_share(logits, labels, finite, 5)
        interval = wilson_interval(round(top1 * len(labels)), len(labels))
    agreement = kl = None
    if reference_logits is not None:
        reference = reference_logits.detach().float().cpu()
        _check_reference(reference, logits)
        agreement = _top_share(logits, top_classes(reference)[:, 0], finite, 1)
        kl = _mean_kl(reference, logits, finite & torch.isfinite(reference).all(dim=1))
        if labels is not None and top1 is not None:
            reference_top1 = _top_share(reference, labels, torch.isfinite(reference).all(dim=1), 1)
            recovery = top1 / reference_top1 if reference_top1 > 0 else None
    return Evaluation(
        count=len(logits),
        top1=top1,
        top5=top5,
        interval=interval,
        agreement=agreement,
        kl=kl,
        recovery=recovery,
        reference_top1=reference_top1,
        non_finite=int((~finite).sum()),
        seconds=0.0,
        set_aside=(),
        logits=logits,
    )


def image_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of each row `[N]` of logits `[N, classes]`, float64 [nats]."""
    target = reference.double().log_softmax(dim=1)
    actual = logits.double().log_softmax(dim=1)
    return functional.kl_div(actual, target, reduction="none", log_target=True).sum(dim=1)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a share (Wilson 1927): unlike the normal one it stays inside 0..1.

    Raises:
        ValueError: `count` is not positive or `successes` is not in 0..count.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count} is not a share")
    share = successes / count
    spread = _Z95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # at 0 and at `count` one end is exact in theory and off by a rounding error in floating point
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == count else centre + half
    return low, high


def _top_share(logits: Tensor, labels: Tensor, valid: Tensor, k: int) -> float:
    """Share of rows whose label is among the `k` highest logits; rows that are not `valid` count as wrong."""
    hits = (top_classes(logits, k) == labels.unsqueeze(1)).any(dim=1) & valid
    return int(hits.sum()) / len(logits)


def _mean_kl(reference: Tensor, logits: Tensor, valid: Tensor) -> float | None:
    """Mean KL(softmax(reference) || softmax(logits)) over the `valid` rows, in float64."""
    if not bool(valid.any()):
        return None
    # rounding can bring equal rows to -1e-17
    return max(0.0, float(image_kl(reference[valid], logits[valid]).mean()))


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != (len(logits),):
        raise InputError(
            f"{tuple(labels.shape)} labels for logits {tuple(logits.shape)}: one label per image is needed"
        )
    unlabelled = int((labels == -1).sum())
    if unlabelled:
        raise DataError(f"{unlabelled} of {len(labels)} images have no label; label them all, or leave these out")
    classes = logits.shape[1]
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())} but the network has {classes} classes "
            f"(0 to {classes - 1}): {int(wrong.sum())} of {len(labels)} images do not fit; give data of its classes"
        )


def _check_reference(reference: Tensor, logits: Tensor) -> None:
    if reference.shape != logits.shape:
        raise InputError(
            f"reference logits are {tuple(reference.shape)} but the network gave {tuple(logits.shape)}: "
            "evaluate both networks on the same images and classes"
        )


def _checked(output: object, count: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != count:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the network returned {got} for {count} images; logits [{count}, classes] are needed")
    return output


def _device_of(model: nn.Module | Callable[[Tensor], Tensor]) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


@contextmanager
def _evaluating(model: nn.Module | Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Eval mode for modules; nothing for plain functions."""
    if isinstance(model, nn.Module):
        with eval_mode(model):
            yield
    else:
        yield
