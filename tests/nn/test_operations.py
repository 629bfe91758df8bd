"""Operations inside a module's own forward, told apart by name and number."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from synthquant.core.errors import UnsupportedModelError
from synthquant.models.trace import trace
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.layers import QuantLayer, quantize_layer
from synthquant.nn.operations import QuantScope, activation_quantizers, watch_operations
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.visible import KERNELS


def quantizer(scale: float) -> AffineQuantizer:
    made = AffineQuantizer(QuantArgs(num_bits=8))
    made.set_grid(torch.tensor([scale]), torch.tensor([128.0]))
    return made


class Inner(nn.Module):
    """Adds twice, with a layer and an activation that is used twice in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv(x))
        return self.act(y + x) + 1


class Outer(nn.Module):
    """Adds, calls a module that adds, and adds again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.extra = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x + x) + x
        for _ in range(self.extra):
            y = y + x
        return y


def watched(network: nn.Module, layers: tuple[str, ...] = ("inner.conv",)) -> dict[str, QuantScope]:
    network.eval().requires_grad_(False)
    scopes = watch_operations(network, trace(network, torch.randn(2, 3, 4, 4)), layers, KERNELS)
    for name in layers:
        quantize_layer(network.get_submodule(name), None, None)
    return scopes


COUNTS = {"": {"add": {2}}, "inner": {"add": {2}, "relu": {2}}}


def images() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_each_module_counts_its_own_operations() -> None:
    network = Outer()
    scopes = watched(network)
    assert set(scopes) == {"", "inner"}
    x = images()
    plain = network(x)
    scopes[""].quantize_operation("add_1", quantizer(0.5), COUNTS)
    assert torch.equal(network(x), (plain / 0.5).round() * 0.5)
    scopes["inner"].quantize_operation("relu_1", quantizer(0.25), COUNTS)
    conv = network.inner.conv
    with torch.no_grad():
        x2 = x + x
        relu = torch.relu(torch.relu(conv(x2)) + x2)
        wanted = (((relu / 0.25).round() * 0.25 + 1 + x) / 0.5).round() * 0.5
    assert torch.equal(network(x), wanted)
    inner = network.inner(x2)
    assert torch.equal(inner, (relu / 0.25).round() * 0.25 + 1), "a module run alone does what it does inside"


def test_what_layers_hooks_and_quantizers_compute_is_not_counted() -> None:
    network = Outer()
    scopes = watched(network)
    scopes["inner"].quantize_operation("add_1", quantizer(0.5), COUNTS)
    x = images()
    wanted = network(x)
    for part in (network.inner.conv, network.inner):
        part.register_forward_pre_hook(lambda _, args: (args[0] + 0,))
        part.register_forward_hook(lambda _, args, output: output + 0)
    assert torch.equal(network(x), wanted)


def test_copies_have_their_own_quantizers() -> None:
    network = Outer()
    scopes = watched(network)
    scopes[""].quantize_operation("add_1", quantizer(0.5), COUNTS)
    twin = copy.deepcopy(network)
    (own,), (other,) = activation_quantizers(network), activation_quantizers(twin)
    assert own is not other
    other.set_grid(torch.tensor([2.0]), torch.tensor([128.0]))
    x = images()
    assert not torch.equal(twin(x), network(x))
    assert torch.equal(twin(x), (twin(x) / 2).round() * 2)


def test_other_operations_than_before_are_refused() -> None:
    network = Outer()
    scopes = watched(network)
    scopes[""].quantize_operation("add_1", quantizer(0.5), COUNTS)
    network.extra = 1
    with pytest.raises(UnsupportedModelError, match="module '' ran 'add' 3 times, not 2 times"):
        network(images())
    network.extra = 0
    network(images())  # nothing is left behind


def test_a_function_that_changes_nothing_counts_in_the_trace_as_in_the_running_network() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x.float().double()).float() + 1  # the first gives back the tensor it was given

    network, x = Casting(), images()
    seen = trace(network, x)
    keys = [operation.key for operation in seen.operations]
    assert keys == ["double_0", "relu_0", "float_1", "add_0"] and seen.counts[""]["float"] == {2}
    scopes = watched(network, ())
    scopes[""].quantize_operation("float_1", quantizer(0.5), seen.counts)
    assert torch.equal(network(x), (torch.relu(x) / 0.5).round() * 0.5 + 1)


def test_an_exception_that_the_network_catches_leaves_nothing_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(x.shape)

    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Failing()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.part(x)
            except ValueError:
                return x + x

    network = Catching()
    scopes = watched(network, ())
    scopes[""].quantize_operation("add_0", quantizer(0.5), {"": {"add": {1}}})
    x = images()
    assert torch.equal(network(x), (2 * x / 0.5).round() * 0.5)


class Attention(nn.Module):
    """One head, with the mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.proj(x.flatten(2))
        return F.scaled_dot_product_attention(tokens, tokens, x.flatten(2), attn_mask=None, scale=1.0)


def test_attention_is_made_visible() -> None:
    network = Attention()
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    plain = network.eval()(x)
    (scope,) = watch_operations(network, trace(network, x), ("proj",), KERNELS).values()
    assert torch.allclose(network(x), plain, atol=1e-6)
    names = [operation.name for operation in trace(network, x).operations]
    assert names.count("matmul") == 2 and names.count("softmax") == 1
    scope.quantize_operation("softmax_0", quantizer(1.0), {"": {"softmax": {1}}})
    tokens = network.proj(x.flatten(2))
    weights = torch.softmax(tokens @ tokens.transpose(1, 2), -1).round()
    assert torch.allclose(network(x), weights @ x.flatten(2), atol=1e-6)


def test_gradients_pass_although_the_network_works_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            y += x
            y = F.relu(y + x)
            y *= 2
            return y

    network = InPlace()
    (scope,) = watched(network, ("conv",)).values()
    cast(QuantLayer, network.conv).output_quantizer = quantizer(0.1)
    counts = {"": {"relu": {1}, "add": {2}}}
    scope.quantize_operation("add_0", quantizer(0.1), counts)
    scope.quantize_operation("relu_0", quantizer(0.1), counts)
    found = activation_quantizers(network)
    assert len(found) == 3
    for part in found:
        part.learning = True
        part.scale.requires_grad_(True)
    network(images()).square().sum().backward()
    assert all(part.scale.grad is not None and float(part.scale.grad.abs()) > 0 for part in found)


@pytest.mark.parametrize("calls", [1, 2])
def test_torch_export_sees_the_quantizers(calls: int) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Outer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(calls):
                x = self.network(x)
            return x

    holder = Wrapped()
    scopes = watched(holder.network)
    scopes[""].quantize_operation("add_1", quantizer(0.5), COUNTS)
    scopes["inner"].quantize_operation("relu_1", quantizer(0.25), COUNTS)
    program = torch.export.export(
        holder, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},), strict=False
    )
    x = torch.randn(3, 3, 4, 4)
    assert torch.equal(program.module()(x), holder(x))
    assert sum("round" in str(node.target) for node in program.graph.nodes) == 2 * calls
