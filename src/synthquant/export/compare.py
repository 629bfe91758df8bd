"""Compare a written network with the quantized network it was made from, on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import VerificationError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.ranking import top_classes
from synthquant.data.image_set import ImageSet
from synthquant.export.flat import FlatFunction, flat_output, output_names
from synthquant.models.samples import Samples, none_readable, samples_for, spread
from synthquant.nn.quant_model import QuantModel

_BATCH = 16
# Two classes whose logits are closer than this share of the logits' standard deviation: the last rounding decides.
_TIE = 0.1


@dataclass(frozen=True)
class Difference:
    """An output of a file beside that of the quantized network, on the same samples.

    Attributes:
        agreement: share (0..1) of images with the same top class, of logits; of equal numbers, of whole ones.
        differing: images with another top class, or other numbers.
        ties: those among them for which the network itself hardly tells the two classes apart.
        mean_error: mean absolute difference, as a share of the standard deviation of the output.
        max_error: largest absolute difference, in the same unit.
        mean_steps: mean absolute difference in steps of the output's grid; none if the output is float.
        max_steps: the largest, in the same unit.
    """

    agreement: float | None
    differing: int | None
    ties: int | None
    mean_error: float
    max_error: float
    mean_steps: float | None
    max_steps: float | None


def difference(found: Tensor, reference: Tensor, step: float | None = None, *, logits: bool = True) -> Difference:
    """Compare an output `[N, ...]` with that of the quantized network.

    Args:
        found: what the file gives.
        reference: what the network gives.
        step: the scale of the output's grid.
        logits: they are logits `[N, classes]`.
    """
    agreement: float | None = None
    differing: int | None = None
    ties: int | None = None
    error = (found - reference).abs().double()
    spread = (float(reference.double().std()) if reference.numel() > 1 else 0.0) or 1.0
    if logits:
        answers = top_classes(found)
        same = (answers == top_classes(reference))[:, 0]
        close = reference.amax(1) - reference.gather(1, answers).squeeze(1) < _TIE * spread
        agreement, differing, ties = float(same.double().mean()), int((~same).sum()), int((~same & close).sum())
    elif not reference.is_floating_point():
        same = found == reference
        agreement, differing, ties = float(same.double().mean()), int((~same).sum()), 0
    return Difference(
        agreement=agreement,
        differing=differing,
        ties=ties,
        mean_error=float(error.mean()) / spread,
        max_error=float(error.max()) / spread,
        mean_steps=None if step is None else float(error.mean()) / step,
        max_steps=None if step is None else float(error.max()) / step,
    )


Differences = Mapping[str, Difference]
"""Of all outputs by their names."""


def row(found: Differences) -> dict[str, Any]:
    """Return differences as they are reported: those of a lone output by themselves."""
    rows = {name: asdict(one) for name, one in found.items()}
    return next(iter(rows.values())) if len(rows) == 1 else {"outputs": rows}


@dataclass(frozen=True)
class Beside:
    """All outputs, `[N, ...]`, of the quantized network and of what was written, by their names.

    Attributes:
        reference: those of the quantized network.
        outputs: those of each network that was written.
        logits: they are logits.
        count: number of samples.
        noun: what these are, `images` or `samples`.
    """

    reference: dict[str, Tensor]
    outputs: dict[str, dict[str, Tensor]]
    logits: bool
    count: int
    noun: str

    def differences(self, name: str, steps: Mapping[str, float] | None = None) -> dict[str, Difference]:
        """Compare what one of the written networks gives; `steps` are scales of the grids of outputs."""
        steps = steps or {}
        return {
            output: difference(self.outputs[name][output], value, steps.get(output), logits=self.logits)
            for output, value in self.reference.items()
        }


@torch.no_grad()
def run_beside(
    quant_model: QuantModel,
    networks: Mapping[str, FlatFunction],
    samples: ImageSet | Samples,
    count: int,
    progress: Progress = QUIET,
) -> Beside:
    """Return all outputs of the quantized network and of each of `networks`.

    Args:
        quant_model: the network that was written.
        networks: what was written, loaded again, by a name.
        samples: images, of which labels are not needed, or what else the network takes.
        count: how many to use, evenly spaced.
        progress: draws a bar.

    Raises:
        DataError: no sample could be read.
        VerificationError: a network gives another number of tensors.
    """
    model = quant_model.float_model
    names, read = output_names(model), samples_for(model, samples)
    reference: list[list[Tensor]] = []
    parts: dict[str, list[list[Tensor]]] = {name: [] for name in networks}
    used, noun = 0, "images" if isinstance(samples, ImageSet) else "samples"
    with progress.bar("verify", min(count, len(read))) as bar:
        for inputs in read.batches(_BATCH, spread(len(read), count)):
            output = flat_output(inputs.to(quant_model.device).clone().call(quant_model))
            reference.append([value.float() if value.is_floating_point() else value for value in output])
            for name, network in networks.items():
                parts[name].append(network(inputs.tensors))
            bar.advance(len(inputs))
            used += len(inputs)
    if not reference:
        raise none_readable(samples, min(count, len(read)), "to verify with")
    for found in (one for several in parts.values() for one in several):
        if len(found) != len(names):
            raise VerificationError(f"what was written gives {len(found)} tensors, the network gives {len(names)}")
    outputs = {name: _whole(names, values) for name, values in parts.items()}
    return Beside(_whole(names, reference), outputs, model.task == "classify", used, noun)


def _whole(names: Sequence[str], parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Outputs by name, batches joined; what is one number for a whole batch has a row for each batch."""
    return {name: torch.cat([_rows(part[index]) for part in parts]) for index, name in enumerate(names)}


def _rows(output: Tensor) -> Tensor:
    return output if output.ndim else output[None]


def require_close(
    found: Differences, title: str, count: int, min_agreement: float, max_mean_error: float, advice: str = ""
) -> None:
    """Raise `VerificationError` if an output of `count` samples differs by more than allowed.

    `title` says whose it is, `advice` what may help.
    """
    guide = f"{advice}see 'If verification fails' in the export guide"
    for name, one in found.items():
        wrong = (one.differing or 0) - (one.ties or 0)
        if name != "logits" and one.agreement is not None:
            if not one.agreement >= min_agreement:
                raise VerificationError(
                    f"{title} gives {wrong} other whole numbers in output {name} than the quantized network"
                    f" ({one.agreement:.2%} agree, at least {min_agreement:.2%} is promised); {guide}"
                )
            continue
        # one image of a small set would be more than a strict share allows
        if wrong > max(1, int((1 - min_agreement) * count)):
            raise VerificationError(
                f"{title} gives {wrong} of {count} images another top class than the quantized network, ties aside"
                f" ({1 - wrong / count:.2%} agree, at least {min_agreement:.2%} is promised); {guide}"
            )
        # not `>`: a difference that is not a number must fail
        if not one.mean_error <= max_mean_error:
            what = "logits that differ" if name == "logits" else f"values of output {name} that differ"
            raise VerificationError(
                f"{title} gives {what} from the quantized network's by {one.mean_error:.2%} of their"
                f" spread on average ({max_mean_error:.2%} is allowed); {guide}"
            )
