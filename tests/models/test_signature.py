"""Inputs of a network as one value."""

from __future__ import annotations

import pytest
import torch

from synthquant.core.errors import DataError, UnsupportedModelError
from synthquant.models.signature import Inputs, joined, named_outputs


def inputs() -> Inputs:
    kwargs = {"cond": {"text": torch.arange(6).view(3, 2), "flag": True}, "table": torch.rand(3)}
    return Inputs((torch.rand(3, 4), 7), kwargs, constants={"table"})


def test_rows_are_those_of_what_varies() -> None:
    whole = inputs()
    assert len(whole) == 3 and [name for name, _ in whole.named()] == ["0", "cond.text"]
    part = whole.rows(1, 3)
    assert len(part) == 2 and torch.equal(part.args[0], whole.args[0][1:])
    assert part.kwargs["cond"]["text"].tolist() == [[2, 3], [4, 5]] and part.kwargs["cond"]["flag"] is True
    assert part.kwargs["table"] is whole.kwargs["table"] and part.args[1] == 7
    assert whole.cycled(5).kwargs["cond"]["text"][:, 0].tolist() == [0, 2, 4, 0, 2]
    again = joined([whole.rows(0, 1), whole.rows(1, 3)])
    assert all(torch.equal(one, other) for one, other in zip(again.tensors, whole.tensors, strict=True))


def test_a_call_has_all_arguments_and_a_clone_its_own_memory() -> None:
    def network(x: torch.Tensor, count: int, *, cond: dict[str, torch.Tensor], table: torch.Tensor) -> torch.Tensor:
        return x.add_(count) + cond["text"].sum(1, keepdim=True) + table.mul_(2).sum()

    whole = inputs()
    before = [tensor.clone() for tensor in (*whole.tensors, whole.kwargs["table"])]
    result = whole.clone().call(network)
    x, text, table = before
    assert torch.allclose(result, x + 7 + text.sum(1, keepdim=True) + 2 * table.sum())
    after = (*whole.tensors, whole.kwargs["table"])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_signature_is_the_same_for_any_number_of_samples() -> None:
    whole = inputs()
    assert whole.signature.specs == whole.rows(0, 1).signature.specs
    whole.rows(0, 2).require(whole.signature)
    assert [spec.shape for spec in whole.signature.varying] == [(4,), (2,)]
    args, kwargs = whole.signature.rebuild(whole.tensors)
    assert args[0] is whole.args[0] and args[1] == 7 and kwargs["table"] is whole.kwargs["table"]
    with pytest.raises(DataError, match=r"input 0 of a sample is torch.float32 \[5\], and the network takes"):
        Inputs((torch.rand(2, 5), 7), whole.kwargs | {"cond": {"text": torch.ones(2, 2).long(), "flag": True}},
               constants={"table"}).require(whole.signature)  # fmt: skip


def test_constants_are_those_of_the_example() -> None:
    whole = inputs()
    same = whole.kwargs | {"table": whole.kwargs["table"].clone()}
    Inputs(whole.args, same, constants={"table"}).require(whole.signature)
    other = whole.kwargs | {"table": whole.kwargs["table"] + 1}
    with pytest.raises(DataError, match="input table of a sample is constant and has another value"):
        Inputs(whole.args, other, constants={"table"}).require(whole.signature)
    with pytest.raises(DataError, match="input 1 of a sample is constant and has another value"):
        Inputs((whole.args[0], 8), whole.kwargs, constants={"table"}).require(whole.signature)
    with pytest.raises(DataError, match=r"input table of a sample is torch.float32 .*, and the network takes constant"):
        Inputs(whole.args, whole.kwargs | {"table": torch.rand(3, 2)}).require(whole.signature)


def test_what_is_no_input_is_refused() -> None:
    with pytest.raises(DataError, match="input 1 has 3 samples and input 0 2; name one constant"):
        Inputs((torch.rand(2, 4), torch.rand(3)))
    with pytest.raises(DataError, match="no dimension for the samples"):
        Inputs((torch.rand(2, 4), torch.tensor(3)))
    with pytest.raises(DataError, match="name 'scale' constant, which is none of their arguments"):
        Inputs((torch.rand(2, 4),), constants={"scale"})
    with pytest.raises(DataError, match="no tensor that varies"):
        Inputs((3,))


def test_outputs_are_named_by_their_way_in_the_tree() -> None:
    x = torch.rand(2)
    assert named_outputs(x) == {"": x}
    assert list(named_outputs({"a": [x, (x, x.long())], "b": x})) == ["a.0", "a.1.0", "b"]
    with pytest.raises(UnsupportedModelError, match="returns a dict in which no floating-point tensor is found"):
        named_outputs({"a": x.long()})
