"""What a quantized network is trained on: the answers of the float network, labels, and what it sees on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import get_module, hooked


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, mean over the batch (arXiv:1503.02531, section 2).

    Logits are `[B, classes]`. The factor keeps gradients alike at all temperatures. Codes of zero-shot methods average
    over batch and classes instead (GDFQ, DSG), which makes the term smaller by the number of classes.
    """
    target = F.log_softmax(teacher / temperature, dim=1)
    actual = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(actual, target, reduction="batchmean", log_target=True) * temperature**2


def trusted_labels(teacher: Tensor, labels: Tensor, doubt: float) -> Tensor:
    """Which labels the teacher agrees with (SynQ, ICLR 2025): `1 - p(label) <= doubt`; bool `[B]`."""
    return 1 - teacher.softmax(1).gather(1, labels[:, None])[:, 0] <= doubt


def cross_entropy(student: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy over those labels `[B]` that count (bool `[B]`), divided by the size of the batch."""
    each: Tensor = F.cross_entropy(student, labels, reduction="none")
    return (each * counts).mean()


def attention_map(features: Tensor, logits: Tensor, labels: Tensor, *, create_graph: bool) -> Tensor:
    """Grad-CAM (arXiv:1610.02391, eq. 1-2) of each image's label, `[B, H, W]`, of length 1 for each image.

    `features` is `[B, C, H, W]`, a tensor that `logits` depend on.
    """
    of_labels = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(of_labels, features, create_graph=create_graph, retain_graph=True)
    importance = gradient.mean((2, 3), keepdim=True)
    heat: Tensor = F.relu((importance * features).sum(1))
    return F.normalize(heat.flatten(1), dim=1).view_as(heat)


def feature_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of two feature maps `[B, C, H, W]`, each scaled to length 1; mean over the batch."""
    flat = [F.normalize(one.flatten(1), dim=1) for one in (teacher, student)]
    return (flat[0] - flat[1]).square().sum(1).mean()


class LastFeatures:
    """The last feature map `[B, C, H, W]` with more than one position that two networks have in common."""

    def __init__(self, teacher: nn.Module, student: nn.Module, example: Tensor) -> None:
        """Find it by running both on a few images; raises `UnsupportedModelError` if there is none."""
        shapes = [_maps(network, example) for network in (teacher, student)]
        common = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
        if not common:
            raise UnsupportedModelError(
                "float and quantized network have no feature map in common, which `features` and `attention` compare;"
                " leave both at 0"
            )
        self.name = common[-1]
        self._modules = [get_module(network, self.name) for network in (teacher, student)]
        self.seen: dict[int, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep what either network computes there, as `of_teacher` and `of_student`."""

        def keep(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                del module, args
                own = output if output.requires_grad else output.detach().requires_grad_()
                self.seen[index] = own
                return own.clone()  # what follows may work in place

            return hook

        with hooked([(module, keep(index)) for index, module in enumerate(self._modules)]):
            yield

    @property
    def of_teacher(self) -> Tensor:
        """What the float network computed."""
        return self.seen[0]

    @property
    def of_student(self) -> Tensor:
        """What the quantized network computed."""
        return self.seen[1]


def _maps(network: nn.Module, example: Tensor) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the feature maps that modules put out, by name, in the order in which modules end."""
    found: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            del module, args
            found.pop(name, None)
            if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                found[name] = tuple(output.shape)

        return hook

    modules = [(module, keep(name)) for name, module in network.named_modules() if name]
    with torch.no_grad(), hooked(modules):
        network(example)
    return found
