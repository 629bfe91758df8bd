"""The error of FIMA-Q: a unit's squared error as a low-rank and diagonal Fisher matrix weighs it (CVPR 2025)."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from synthquant.core.rng import Rng
from synthquant.models.signature import Leaves
from synthquant.quantize.fisher import divergence
from synthquant.quantize.unit_fit import UNIT_ERRORS, ErrorOf, UnitFit

_TEMPERATURE = 20.0
_RIDGE = 1e-4


@UNIT_ERRORS.register("fima")
def fima(unit: UnitFit, rng: Rng) -> ErrorOf:
    """The error of FIMA-Q, whose Fisher matrix is measured anew at `Phase.fisher_rank` steps that divide the phase."""
    return FisherError(unit, rng)


class FisherError:
    """`e G^T (D D^T + ridge)^-1 G e^T + sum(e**2 mean_k G)` with `e = |out - wanted|`, averaged over samples.

    At each of `rank` steps a row is added to `G` and to `D`: the means over all samples of the absolute gradient of
    the divergence between the network's answers, and of `e`. Nothing but the unit is quantized then, as it is while it
    learns, with soft roundings and dropped activations; what it reads, and all that is behind it, is float. Answers of
    a classifier are logits divided by 20. Rows of `D` are nearly parallel, so the system is solved in float64, with
    1e-4 of its mean diagonal as the ridge. Each of the two terms is divided by its value in the first batch that its
    weights meet.

    Attributes:
        gradients: `G`, a float64 `[F]` for each measurement; `F` numbers make up what the unit puts out for a sample.
        distances: `D`, alike.
    """

    def __init__(self, unit: UnitFit, rng: Rng) -> None:
        self._unit = unit
        self._mixing = rng.generator("mix", unit.device)
        self._every = max(1, unit.phase.iterations // unit.phase.fisher_rank)
        self._step = 0
        self._sizes: tuple[torch.Tensor, torch.Tensor] | None = None
        self._root = self._diagonal = torch.empty(0)  # set with the first rows
        self.gradients: list[torch.Tensor] = []
        self.distances: list[torch.Tensor] = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """The error for samples of these indices, `[B]`."""
        if self._step % self._every == 0 and len(self.gradients) < self._unit.phase.fisher_rank:
            self.measure()
        self._step += 1
        return self.judge(batch, self._unit.output(batch, self._mixing))

    def judge(self, batch: torch.Tensor, output: Leaves) -> torch.Tensor:
        """The error of what the unit puts out for these samples, by the Fisher matrix as it was measured last."""
        terms = self.terms(_distance(output, self._unit.targets.gather(batch), len(batch)))
        if self._sizes is None:
            smallest = torch.finfo(terms[0].dtype).tiny
            self._sizes = (terms[0].detach().clamp_min(smallest), terms[1].detach().clamp_min(smallest))
        return terms[0] / self._sizes[0] + terms[1] / self._sizes[1]

    def terms(self, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The low-rank and the diagonal term, scalars, of absolute errors `[B, F]`, each up to a factor."""
        low_rank = (error @ self._root.T).square().sum(1).mean()
        return low_rank, (error.square() @ self._diagonal).mean()

    def weigh(self) -> None:
        """Set the weights of errors from the rows; terms are divided by their next values from now on.

        The low-rank term is the squared length of `L^-1 G e^T`, with `L L^T = D D^T + ridge`. As only shares of terms
        count, weights are divided by the largest one, so that small gradients vanish in no square.
        """
        gradients, distances = torch.stack(self.gradients), torch.stack(self.distances)
        gram = distances @ distances.T
        ridge = (_RIDGE * gram.diagonal().mean()).clamp_min(torch.finfo(gram.dtype).tiny)
        lower = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        root = torch.linalg.solve_triangular(lower, gradients, upper=False)
        self._root, self._diagonal = _scaled(root), _scaled(gradients.mean(0))
        self._sizes = None

    def measure(self) -> None:
        """Add a row to the gradients and to the distances, and weigh errors by them."""
        gradient: torch.Tensor | float = 0.0
        distance: torch.Tensor | float = 0.0
        count = 0
        for batch in self._unit.samples():
            output, wanted = self._unit.alone(batch), self._unit.targets.gather(batch)
            gradient = gradient + self._gradient(batch, output).abs().double().sum(0)
            distance = distance + _distance(output, wanted, len(batch)).double().sum(0)
            count += len(batch)
        assert isinstance(gradient, torch.Tensor) and isinstance(distance, torch.Tensor)
        self.gradients.append(gradient / count)
        self.distances.append(distance / count)
        self.weigh()

    def _gradient(self, batch: torch.Tensor, output: Leaves) -> torch.Tensor:
        """Of each sample's own divergence with respect to what the unit puts out for it, `[B, F]`."""
        unit, task = self._unit, self._unit.model.float_model.task
        leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in output]
        with torch.enable_grad():
            answers = unit.float_answer(batch), unit.rest(batch, leaves, float_before=True)
            if task == "classify":
                answers = pytree.tree_map(lambda logits: logits / _TEMPERATURE, answers)
            floating = [leaf for leaf in leaves if leaf.is_floating_point()]
            # A leaf that nothing behind the unit reads has no gradient: its error does not matter.
            error = divergence(*answers, task) + sum(0 * leaf.sum() for leaf in floating)
            found = torch.autograd.grad(error, floating)
        return torch.cat([gradient.reshape(len(batch), -1) for gradient in found], 1)


def _scaled(weights: torch.Tensor) -> torch.Tensor:
    """Weights as shares of the largest one, float32."""
    largest = weights.abs().amax()
    return (weights / largest.clamp_min(torch.finfo(weights.dtype).tiny)).float()


def _distance(output: Leaves, wanted: Leaves, samples: int) -> torch.Tensor:
    """Absolute differences of all floating-point numbers that a unit puts out, `[B, F]`."""
    pairs = [(one, other) for one, other in zip(output, wanted, strict=True) if other.is_floating_point()]
    return torch.cat([(one - other).abs().reshape(samples, -1) for one, other in pairs], 1)
