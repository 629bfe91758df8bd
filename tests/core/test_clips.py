"""Clips that save their result compute the same to the bit, with fewer tensors in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from synthquant.core.clips import saved_results


class Clipped(nn.Module):
    """A clip between two layers that keep what they read."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.before, self.clip, self.after = nn.Conv2d(3, 4, 1), clip, nn.Conv2d(4, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.after(self.clip(self.before(images) * 4))
        return result


class Shifted(nn.ReLU6):
    """Computes something of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 1)


def network(clip: nn.Module) -> Clipped:
    torch.manual_seed(0)
    return Clipped(clip)


def images() -> torch.Tensor:
    values = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    values[0, :, 0, 0] = torch.nan
    return values.requires_grad_()


def gradients(part: nn.Module) -> list[torch.Tensor]:
    read = images()
    output = part(read)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [read, *part.parameters()])]


def saved_bytes(part: nn.Module) -> int:
    read, sizes = images(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = part(read)
    del output
    return sum(size for _, size in sizes.values())


CLIPS = [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 2.0), nn.Hardtanh(-0.5, 2.0, inplace=True)]


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_outputs_and_gradients_are_the_same_bits_and_one_tensor_less_is_kept(clip: nn.Module) -> None:
    part = network(clip)
    before, wanted = saved_bytes(part), gradients(part)
    with saved_results(part):
        less, found = saved_bytes(part), gradients(part)
    assert before - less == 5 * 4 * 6 * 6 * 4
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.nan_to_num(1e3), other.nan_to_num(1e3))
    assert "forward" not in clip.__dict__


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_gradient_at_the_ends_of_the_range_is_zero_as_without(clip: nn.Module) -> None:
    ends = torch.tensor([clip.min_val, clip.max_val, 1.0], requires_grad=True)  # type: ignore[list-item]
    with saved_results(clip):
        (gradient,) = torch.autograd.grad(clip(ends * 1).sum(), ends)
    assert gradient.tolist() == [0.0, 0.0, 1.0]


def test_without_gradients_it_is_the_layer_s_own_operation() -> None:
    part = network(nn.ReLU6(inplace=True))
    with torch.no_grad():
        wanted = part(images())
        with saved_results(part):
            assert torch.equal(part(images()).nan_to_num(9), wanted.nan_to_num(9))


class Coarse(TorchFunctionMode):
    """Rounds what functions called `hardtanh` return, straight through, as quantizers of operations do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + (result.round() - result).detach() if func.__name__ == "hardtanh" else result


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_who_replaces_functions_replaces_the_clip_and_not_its_inside(clip: nn.Module) -> None:
    part = network(clip)
    with Coarse():
        wanted = gradients(part)
        with saved_results(part):
            found = gradients(part)
    assert not torch.equal(wanted[0].nan_to_num(9), gradients(part)[0].nan_to_num(9))
    assert all(torch.equal(one.nan_to_num(9), other.nan_to_num(9)) for one, other in zip(found, wanted, strict=True))


def test_a_class_with_a_forward_of_its_own_and_an_instance_with_one_stay() -> None:
    own, patched = Shifted(), nn.ReLU6()
    patched.__dict__["forward"] = lambda x: x
    both = nn.Sequential(own, patched)
    with saved_results(both):
        assert both(torch.tensor([-1.5, 3.0])).tolist() == [0.0, 4.0]
    assert "forward" in patched.__dict__
