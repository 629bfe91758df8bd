from __future__ import annotations

import pytest
import torch
from torch import nn

from synthquant.core.errors import ModelError
from synthquant.core.modules import eval_mode, forwards_replaced, get_module, hooked, replace_module


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)))


def test_get_module() -> None:
    net = _net()
    assert get_module(net, "1.0") is net[1][0]
    assert get_module(net, "") is net
    with pytest.raises(ModelError, match=r"Sequential has no module '1\.00'; did you mean '1\.0'\?"):
        get_module(net, "1.00")


def test_replace_module_wherever_it_is_used() -> None:
    shared = nn.ReLU()
    net = nn.Sequential(shared, nn.Sequential(nn.Linear(2, 2), shared))
    new = nn.GELU()
    replace_module(net, "0", new)
    assert net[0] is new
    assert net[1][1] is new
    assert [type(part).__name__ for part in net] == ["GELU", "Sequential"]


def test_a_replacement_may_hold_the_old_module() -> None:
    net = _net()
    old = net[0]
    replace_module(net, "0", nn.Sequential(old, nn.ReLU()))
    assert net[0][0] is old
    assert net(torch.randn(4, 2)).shape == (4, 3)


def test_the_root_cannot_be_replaced() -> None:
    with pytest.raises(ModelError, match="root"):
        replace_module(_net(), "", nn.ReLU())


def test_eval_mode_restores_each_module_even_after_an_error() -> None:
    net = _net()
    net[1][0].eval()
    before = [part.training for part in net.modules()]
    with pytest.raises(RuntimeError), eval_mode(net):
        assert not any(part.training for part in net.modules())
        raise RuntimeError
    assert [part.training for part in net.modules()] == before
    assert len(set(before)) == 2


def test_other_forwards_run_for_a_while_with_hooks_around_them() -> None:
    net, seen, x = _net().eval(), [], torch.randn(4, 2)
    own = net[1]
    own.forward = lambda value: value * 2  # type: ignore[method-assign]
    before = net(x)
    watched = hooked([(net[0], lambda module, args, output: seen.append(output))])
    with watched, forwards_replaced([(net[0], torch.zeros_like), (own, torch.neg), (own, torch.exp)]):
        assert torch.equal(net(x), torch.ones(4, 2))
    assert [float(output.sum()) for output in seen] == [0.0]
    assert torch.equal(net(x), before) and "forward" not in net[0].__dict__
    with pytest.raises(RuntimeError, match="stop"), forwards_replaced([(net[0], torch.neg)]):
        raise RuntimeError("stop")
    assert torch.equal(net(x), before)


def test_hooks_run_in_place_and_are_always_removed() -> None:
    net = _net().eval()
    seen: list[tuple[str, torch.Size]] = []
    forward = [(net[0], lambda module, args, output: seen.append(("out", output.shape)))]
    pre = [(net[0], lambda module, args: seen.append(("in", args[0].shape)))]
    with hooked(forward, pre=pre):
        net(torch.zeros(4, 2))
    with pytest.raises(RuntimeError), hooked(forward, pre=pre):
        raise RuntimeError
    net(torch.zeros(4, 2))
    assert seen == [("in", torch.Size([4, 2])), ("out", torch.Size([4, 3]))]


def test_hooks_with_keyword_arguments() -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, *, factor: float) -> torch.Tensor:
            return x * factor

    scale = Scale()
    seen: list[float] = []
    with hooked([(scale, lambda module, args, kwargs, output: seen.append(kwargs["factor"]))], with_kwargs=True):
        scale(torch.ones(1), factor=3.0)
    assert seen == [3.0]
