"""Compare a written network with the quantized network it was made from, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from synthquant.core.errors import DataError, VerificationError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.ranking import top_classes
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.nn.quant_model import QuantModel

Network = Callable[[Tensor], Tensor]
"""Images `[B, 3, H, W]` to logits `[B, classes]`, both on the CPU."""

_BATCH = 16
# Two classes whose logits are closer than this share of the logits' standard deviation: the last rounding decides.
_TIE = 0.1


@dataclass(frozen=True)
class Difference:
    """Logits of a file beside those of the quantized network, on the same images.

    Attributes:
        agreement: share (0..1) of images with the same top class.
        differing: images with another top class.
        ties: those among them for which the network itself hardly tells the two classes apart.
        mean_error: mean absolute difference, as a share of the standard deviation of the logits.
        max_error: largest absolute difference, in the same unit.
        mean_steps: mean absolute difference in steps of the output's grid; none if the output is float.
        max_steps: the largest, in the same unit.
    """

    agreement: float
    differing: int
    ties: int
    mean_error: float
    max_error: float
    mean_steps: float | None
    max_steps: float | None


def difference(logits: Tensor, reference: Tensor, step: float | None = None) -> Difference:
    """Compare logits `[N, classes]` with those of the quantized network; `step` is the scale of the output's grid."""
    answers = top_classes(logits)
    same = (answers == top_classes(reference))[:, 0]
    error = (logits - reference).abs().double()
    spread = float(reference.double().std()) or 1.0
    chosen = reference.gather(1, answers).squeeze(1)
    close = reference.amax(1) - chosen < _TIE * spread
    return Difference(
        agreement=float(same.double().mean()),
        differing=int((~same).sum()),
        ties=int((~same & close).sum()),
        mean_error=float(error.mean()) / spread,
        max_error=float(error.max()) / spread,
        mean_steps=None if step is None else float(error.mean()) / step,
        max_steps=None if step is None else float(error.max()) / step,
    )


@torch.no_grad()
def run_beside(
    quant_model: QuantModel,
    networks: Mapping[str, Network],
    images: ImageSet,
    count: int,
    progress: Progress = QUIET,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits `[N, classes]` of the quantized network, and those of each of `networks` by its name.

    Args:
        quant_model: the network that was written.
        networks: what was written, loaded again.
        images: labels are not needed.
        count: how many images to use, evenly spaced over the set.
        progress: draws a bar.

    Raises:
        DataError: no image could be read.
    """
    wanted = min(count, len(images))
    indices = [index * len(images) // wanted for index in range(wanted)]
    reference: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in networks}
    with progress.bar("verify", wanted) as bar:
        for batch in input_batches(images, quant_model.float_model.preprocess, _BATCH, indices):
            reference.append(quant_model(batch.inputs.to(quant_model.device)).float().cpu())
            for name, network in networks.items():
                parts[name].append(network(batch.inputs))
            bar.advance(len(batch.inputs))
    if not reference:
        raise DataError(f"no image to verify with: {len(images)} in the set, none readable")
    return torch.cat(reference), {name: torch.cat(values) for name, values in parts.items()}


def require_close(
    found: Difference, title: str, count: int, min_agreement: float, max_mean_error: float, advice: str = ""
) -> None:
    """Raise `VerificationError` if a difference on `count` images is larger than allowed.

    `title` says whose it is, `advice` what may help.
    """
    guide = f"{advice}see 'If verification fails' in the export guide"
    wrong = found.differing - found.ties
    # one image of a small set would be more than a strict share allows
    if wrong > max(1, int((1 - min_agreement) * count)):
        raise VerificationError(
            f"{title} gives {wrong} of {count} images another top class than the quantized network, ties aside"
            f" ({1 - wrong / count:.2%} agree, at least {min_agreement:.2%} is promised); {guide}"
        )
    # not `>`: a difference that is not a number must fail
    if not found.mean_error <= max_mean_error:
        raise VerificationError(
            f"{title} gives logits that differ from the quantized network's by {found.mean_error:.2%} of their spread"
            f" on average ({max_mean_error:.2%} is allowed); {guide}"
        )
