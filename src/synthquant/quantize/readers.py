"""What layers and products read, and how much the network's answer depends on what they put out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.models.float_model import Task
from synthquant.models.signature import named_outputs
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.layers import QuantLayer
from synthquant.nn.operations import QuantScope, tensors_replaced
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet

# Elements of the largest tensor that is made of candidates at a time.
_AT_ONCE = 2**24


@dataclass
class Call:
    """One call of a layer or an operation in the float network.

    Attributes:
        function: what was called.
        args: its arguments by position.
        kwargs: its arguments by name.
        output: what it gave.
        gradient: of the loss with respect to that, divided by a power of two that all of them share; none if nothing
            depends on it.
    """

    function: Callable[..., Tensor]
    args: Any
    kwargs: Any
    output: Tensor
    gradient: Tensor | None = None

    def read(self, index: int) -> Tensor:
        """The tensor of this number among those it was called with."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)][index]

    def run(self, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        """What the function gives if some of these tensors are changed."""
        args, kwargs = tensors_replaced(changes, self.args, self.kwargs)
        output: Tensor = self.function(*args, **kwargs)
        return output


@dataclass
class Reader:
    """A layer, or a product of two activations, with what it read in the float network.

    Attributes:
        name: of the layer or the product.
        layer: the layer; none for products.
        quantizers: what the tensors that it reads go through, by their number.
        calls: its calls.
    """

    name: str
    layer: QuantLayer | None
    quantizers: dict[int, ActivationQuantizer]
    calls: list[Call] = field(default_factory=list)

    def read_through(self, quantizer: ActivationQuantizer) -> list[Tensor]:
        """All tensors that it read and that a quantizer stands before."""
        indices = [index for index, one in self.quantizers.items() if one is quantizer]
        return [call.read(index) for index in indices for call in self.calls]

    def errors_of_channels(self) -> Tensor:
        """Error of the output with what the layer and its input are quantized to now, float64 `[C]`.

        Sum over samples and positions of `(g (O - O_hat))^2`, `g` the gradient at the output `O` (PTQ4ViT,
        arXiv:2111.12293, eq. 7): the diagonal of the Fisher matrix weighs the error.
        """
        channel = -1 if isinstance(self.layer, nn.Linear) else 1
        errors = []
        for call, gradient in self._weighed():
            output = call.run(self._changes())
            errors.append(_squares(output, call.output, gradient, channel))
        return torch.stack(errors).sum(0)

    def errors_of(self, quantizer: ActivationQuantizer, grids: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The same error, summed over channels, with each of these grids of one of the quantizers, float64 `[n]`."""
        total = torch.zeros(len(grids), dtype=torch.float64)
        for call, gradient in self._weighed():
            size = max(call.output.numel(), call.read(0).numel())
            step = 1 if self.layer is None else max(1, _AT_ONCE // size)
            for start in range(0, len(grids), step):
                outputs = self._outputs(call, quantizer, grids[start : start + step])
                total[start : start + step] += _squares(outputs, call.output, gradient, 0).cpu()
        return total

    def _outputs(self, call: Call, quantizer: ActivationQuantizer, grids: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Outputs of one call, `[n, ...]`; a layer takes the samples of all grids as one batch."""

        def under_all(x: Tensor) -> Tensor:
            rounded = []
            for grid in grids:
                quantizer.load_grid(grid)
                rounded.append(quantizer.quantize(x))
            return torch.cat(rounded)

        if self.layer is not None:
            return torch.unflatten(call.run({0: under_all}), 0, (len(grids), -1))
        quantizer.load_grid(grids[0])
        return call.run(self._changes())[None]

    def _changes(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {index: quantizer.quantize for index, quantizer in self.quantizers.items()}

    def _weighed(self) -> list[tuple[Call, Tensor]]:
        """Calls that the answer depends on, with their gradients."""
        return [(call, call.gradient) for call in self.calls if call.gradient is not None]


def _squares(found: Tensor, wanted: Tensor, gradient: Tensor, dim: int) -> Tensor:
    """Sums of `(g (found - wanted))^2` over all but one dimension, float64.

    They are taken in float32, whose range gradients of at most 1 leave room in: this runs for every candidate, and in
    double precision it would cost more than the layer itself.
    """
    error = (found - wanted).mul_(gradient).square_()
    kept = dim % error.ndim
    summed: Tensor = error.sum([other for other in range(error.ndim) if other != kept])
    return summed.double()


def find_readers(model: QuantModel) -> list[Reader]:
    """All layers that have a quantized weight or input, and all products whose factors have quantizers of their own."""
    readers = []
    for name, layer in model.layers.items():
        quantizer = model.quantizers[model.reads[name]] if name in model.reads else None
        readers.append(Reader(name, layer, {} if quantizer is None else {0: quantizer}))
    for scope, key, quantizers in _products(model):
        readers.append(Reader(f"{scope.scope_name}.{key}".lstrip("."), None, dict(quantizers)))
    return readers


def _products(model: QuantModel) -> Iterable[tuple[QuantScope, str, dict[int, ActivationQuantizer]]]:
    for scope in model.module.modules():
        if isinstance(scope, QuantScope):
            for key, quantizers in scope.operand_quantizers.items():
                yield scope, key, quantizers


def record(
    model: QuantModel, samples: CalibrationSet, count: int, generator: torch.Generator, readers: Sequence[Reader]
) -> None:
    """Keep what the readers read and put out in the float network, with gradients, from one pass over `count` samples.

    Memory grows with the samples: all that layers and products read and put out, twice over.

    Raises `UnsupportedModelError` if the network's answer has no gradient.

    Args:
        model: the network.
        samples: the calibration set.
        count: how many of its samples to run.
        generator: draws the answers that gradients are for (`drawn_loss`).
        readers: filled with calls.
    """
    of_layers = {reader.name: reader for reader in readers if reader.layer is not None}
    of_products = {reader.name: reader for reader in readers if reader.layer is None}

    def after_layer(module: Any, args: Any, kwargs: Any, output: Tensor, *, name: str) -> Tensor:
        return _noted(of_layers[name], module.forward, args, kwargs, output)

    def after_product(key: str, function: Any, args: Any, kwargs: Any, output: Tensor, *, scope: str) -> Tensor:
        reader = of_products.get(f"{scope}.{key}".lstrip("."))
        return output if reader is None else _noted(reader, function, args, kwargs, output)

    scopes = {id(scope): scope for scope, _, _ in _products(model)}.values()
    hooks = [(model.layers[name], partial(after_layer, name=name)) for name in of_layers]
    try:
        for scope in scopes:
            scope.watcher = partial(after_product, scope=scope.scope_name)
        with model.mode(weights=False, activations=False), hooked(hooks, with_kwargs=True), torch.enable_grad():
            for batch in samples.batches(count):
                loss = drawn_loss(batch.call(model), model.float_model.task, generator)
                if not loss.requires_grad:
                    raise UnsupportedModelError(
                        f"{model.float_model.name}: its answer has no gradient with respect to any layer, and ranges"
                        " are searched by it; quantize with another method"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for scope in scopes:
            scope.watcher = None
    _scale([call for reader in readers for call in reader.calls])


def _scale(calls: Iterable[Call]) -> None:
    """Divide all gradients so that the largest is within 1/2 and 1: squares of small numbers vanish.

    A power of two changes no choice, to the last digit, whatever readers there are.
    """
    found = [call.gradient for call in calls if call.gradient is not None]
    largest = max((float(gradient.abs().amax()) for gradient in found), default=0.0)
    for gradient in found if largest > 0 else ():
        gradient.div_(2.0 ** math.frexp(largest)[1])


def _noted(reader: Reader, function: Callable[..., Tensor], args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """Keep a call, and have its gradient kept; returns what takes the place of its output."""
    args, kwargs = pytree.tree_map_only(Tensor, _copied, (args, kwargs))
    call = Call(function, args, kwargs, _copied(output))
    reader.calls.append(call)
    if not output.requires_grad:
        output = output.detach().requires_grad_()

    def keep(gradient: Tensor) -> None:
        call.gradient = gradient.detach().clone()

    output.register_hook(keep)  # type: ignore[no-untyped-call]
    return output.clone()  # code behind may work in place


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def drawn_loss(answer: Any, task: Task, generator: torch.Generator) -> Tensor:
    """Minus the log probability of answers drawn from the network's own, summed over samples.

    The expected square of its gradient is the diagonal of the Fisher matrix. PTQ4ViT's own choice, the divergence of
    the network's answer from itself, has a gradient of 0; its code squares what rounding leaves of that.

    A classifier's answer is drawn from the softmax of its logits. The values of any other network are means of normal
    distributions of variance 1.
    """
    if task == "classify":
        logits = answer.double()
        shares = logits.detach().softmax(1).cpu()
        labels = torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)
        return F.cross_entropy(logits, labels, reduction="sum")
    means = named_outputs(answer).values()
    noise = [torch.randn(mean.shape, generator=generator).to(mean) for mean in means]
    # half the squared distance to mean + noise has minus the noise for a gradient
    return torch.stack([-(mean * drawn).sum() for mean, drawn in zip(means, noise, strict=True)]).sum()
