from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from synthquant.models.trace import Trace, Value, tensors_in, trace


class Net(nn.Module):
    """A network with one convolution, batch norm and linear layer, and any forward pass."""

    def __init__(self, run: Callable[[Net, Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.other = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


EXAMPLE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def follow(run: Callable[[Net, Tensor], object]) -> Trace:
    return trace(Net(run), EXAMPLE)


def output_of(seen: Trace, name: str, call: int = 0) -> Value:
    (value,) = seen.calls(name)[call].outputs
    return value


def input_of(seen: Trace, name: str, call: int = 0) -> Value:
    return seen.calls(name)[call].inputs[0]


def names(seen: Trace, value: Value) -> list[str]:
    return [operation.name for operation in seen.consumers(value)]


def test_calls_are_seen_in_order_with_their_tensors() -> None:
    seen = follow(lambda net, x: net.norm(net.conv(x)))
    assert seen.order == ("", "conv", "norm")
    assert [call.parent for call in seen.module_calls] == [None, 0, 0]
    assert output_of(seen, "conv") == input_of(seen, "norm")
    assert output_of(seen, "conv").shape == (2, 3, 4, 4)
    assert output_of(seen, "conv").numel() == 96
    assert names(seen, output_of(seen, "conv")) == ["batch_norm"]
    assert seen.calls("other") == ()
    producer = seen.producer(output_of(seen, "conv"))
    assert producer is not None
    assert (producer.name, producer.call) == ("conv2d", 1)
    assert seen.parameters["conv.weight"] in producer.inputs
    assert seen.producer(input_of(seen, "")) is None


def test_passing_a_tensor_through_is_no_consumption() -> None:
    seen = follow(lambda net, x: net.norm(net.drop(net.same(net.conv(x).contiguous().float()))))
    assert output_of(seen, "conv") == output_of(seen, "same") == output_of(seen, "drop") == input_of(seen, "norm")
    assert names(seen, output_of(seen, "conv")) == ["batch_norm"]


def test_asking_for_a_shape_is_no_consumption() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        assert y.shape[0] == y.size(0) == len(y)
        assert y.dim() == 4
        return net.norm(y).reshape(y.shape[0], -1)

    seen = follow(run)
    assert names(seen, output_of(seen, "conv")) == ["batch_norm"]


def test_in_place_module_makes_a_new_value_of_the_same_tensor() -> None:
    seen = follow(lambda net, x: net.norm(net.relu(net.conv(x))))
    assert output_of(seen, "conv") == input_of(seen, "relu")
    assert output_of(seen, "relu") == input_of(seen, "norm")
    assert output_of(seen, "conv") != output_of(seen, "relu")
    assert names(seen, output_of(seen, "conv")) == ["relu"]


def test_in_place_addition_is_a_merge_of_the_former_value() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        y += x
        return net.other(y)

    seen = follow(run)
    (merge,) = [operation for operation in seen.operations if operation.is_merge]
    assert set(merge.inputs) == {output_of(seen, "conv"), input_of(seen, "conv")}
    assert merge.outputs == (input_of(seen, "other"),)
    assert merge.call == 0


def test_writing_through_an_index_or_a_view_changes_the_value() -> None:
    def index(net: Net, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :1] = net.conv(x)[:, :1]
        return net.other(y)

    def view(net: Net, x: Tensor) -> Tensor:
        y = torch.zeros(2, 3, 4, 4)
        y.view(2, -1).copy_(net.conv(x).flatten(1))
        return net.other(y)

    def in_view_of_output(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        y[:, :1].zero_()
        return net.norm(y)

    for run in (index, view):
        assert input_of(follow(run), "other").from_input
    seen = follow(in_view_of_output)
    assert input_of(seen, "norm") != output_of(seen, "conv")
    assert input_of(seen, "norm").from_input


def test_only_what_depends_on_the_input_can_merge() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        position = net.other(torch.ones(2, 3, 4, 4))
        y = net.conv(x) + position
        z = torch.cat([y, position], 1)
        twice = y + y
        gate = y * x
        return torch.stack([twice, gate]).sum(0) + z[:, :3]

    seen = follow(run)
    assert not output_of(seen, "other").from_input
    assert [operation.name for operation in seen.operations if operation.is_merge] == ["stack", "add"]


def test_a_module_called_twice_has_two_calls() -> None:
    seen = follow(lambda net, x: net.conv(net.conv(x)))
    first, second = seen.calls("conv")
    assert first.outputs[0] == second.inputs[0]
    assert seen.order == ("", "conv")
    assert names(seen, seen.parameters["conv.weight"]) == ["conv2d", "conv2d"]


def test_calls_nest() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + x

    seen = trace(nn.Sequential(Outer()), EXAMPLE)
    operation = next(operation for operation in seen.operations if operation.name == "conv2d")
    assert [call.name for call in seen.enclosing(operation.call)] == ["0.body.0", "0.body", "0", ""]
    (merge,) = [operation for operation in seen.operations if operation.is_merge]
    assert [call.name for call in seen.enclosing(merge.call)] == ["0", ""]


@dataclass
class Bundle:
    first: Tensor
    count: int


def test_tensors_are_found_in_nested_arguments_and_results() -> None:
    class Inner(nn.Module):
        def forward(self, pair: tuple[Tensor, list[Tensor]], *, extra: dict[str, Tensor]) -> dict[str, object]:
            a, (b,) = pair
            return {"sum": a + b, "rest": [extra["c"], Bundle(a, 3)]}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            result = self.inner((x, [x + 1]), extra={"c": x + 2})
            return result["sum"]

    seen = trace(Outer(), EXAMPLE)
    (call,) = seen.calls("inner")
    x = seen.module_calls[0].inputs[0]
    assert len(call.inputs) == 3
    assert call.inputs[0] == x
    assert call.outputs[1:] == (call.inputs[2], x)
    assert list(tensors_in(Bundle(EXAMPLE, 3))) == [EXAMPLE]
    assert list(tensors_in(Bundle)) == []


def test_a_shared_module_and_tied_weights_are_known_under_one_name_and_one_value() -> None:
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.Linear(4, 4), layer)
    network[1].weight = layer.weight
    seen = trace(network, torch.zeros(1, 4))
    assert seen.order == ("", "0", "1")
    assert len(seen.calls("0")) == 2
    assert seen.parameters["0.weight"] == seen.parameters["1.weight"] == seen.parameters["2.weight"]


def test_an_exception_that_the_network_catches_does_not_confuse_the_order() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.fails(x)
            except RuntimeError:
                return self.conv(x)

    seen = trace(nn.Sequential(Tries(), nn.ReLU()), EXAMPLE)
    assert seen.calls("1")[0].parent == 0
    assert seen.calls("0")[0].outputs == seen.calls("1")[0].inputs


@contextmanager
def unchanged(module: nn.Module, example: Tensor) -> Iterator[None]:
    state = {name: (value.clone(), value._version) for name, value in module.state_dict(keep_vars=True).items()}
    modes = [part.training for part in module.modules()]
    copy = example.clone()
    yield
    assert modes == [part.training for part in module.modules()]
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())
    assert torch.equal(copy, example)
    for name, value in module.state_dict(keep_vars=True).items():
        assert torch.equal(value, state[name][0])
        assert value._version == state[name][1]


def test_the_network_and_the_example_stay_as_they_were() -> None:
    module = Net(lambda net, x: net.norm(net.conv(functional.relu(x, inplace=True)))).train()
    module.conv.eval()
    with unchanged(module, EXAMPLE):
        trace(module, EXAMPLE)
    broken = Net(lambda net, x: net.conv(x[:, :2]))
    with unchanged(broken, EXAMPLE), pytest.raises(RuntimeError):
        trace(broken, EXAMPLE)


def test_it_works_in_inference_mode_and_with_gradients_on() -> None:
    module = Net(lambda net, x: net.relu(net.conv(x)))
    with torch.inference_mode():
        seen = trace(module, EXAMPLE.clone())
    assert output_of(seen, "conv") != output_of(seen, "relu")
    assert output_of(trace(module, EXAMPLE), "relu").from_input
