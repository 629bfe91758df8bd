from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from synthquant.core.errors import ModelError
from synthquant.models.weights import load_weights, read_weights


def network(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, classes))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_half_precision_comes_back_as_float32(tmp_path: Path, suffix: str) -> None:
    source, target, path = network(), network(), tmp_path / f"weights{suffix}"
    half = {name: value.half() if value.is_floating_point() else value for name, value in source.state_dict().items()}
    safetensors.torch.save_file(half, path) if suffix == ".safetensors" else torch.save(half, path)
    load_weights(target, path)
    for name, value in target.state_dict().items():
        assert value.dtype == source.state_dict()[name].dtype
        assert torch.equal(value, half[name].to(value.dtype))


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["net"], ["ema"], ["params"], ["network", "state_dict"]])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.module."]
)
def test_usual_wrappings_are_taken_off(tmp_path: Path, keys: list[str], prefix: str) -> None:
    source, target, path = network(), network(), tmp_path / "weights.pt"
    content: dict[str, object] = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    content |= {f"{prefix}total_ops": torch.zeros(1), f"{prefix}0.total_params": torch.zeros(1)}
    for key in keys:
        content = {key: content, "epoch": 3}
    torch.save(content, path)
    load_weights(target, path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_a_prefix_that_the_network_has_stays(tmp_path: Path) -> None:
    source, target = (nn.ModuleDict({"model": network()}) for _ in range(2))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    part = {name.replace("model.0.", "model.0._orig_mod."): value for name, value in source.state_dict().items()}
    torch.save(part, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target["model"][0].weight, source["model"][0].weight)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(state | {"3.weight": (state["3.weight"] * 100).int()}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"holds whole numbers \(torch\.int32\) for 3\.weight"):
        load_weights(network(), tmp_path / "w.pt")


def test_the_batch_counter_may_be_missing(tmp_path: Path) -> None:
    source, target, path = network(), network(), tmp_path / "weights.safetensors"
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, path)
    load_weights(target, path)
    assert torch.equal(target[0].weight, source[0].weight)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    target, path = network(), tmp_path / "weights.safetensors"
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = {"0.weight": torch.zeros(6, 3, 3, 3), "3.weight": torch.zeros(5, 6), "extra": torch.zeros(1)}
    safetensors.torch.save_file(state, path)
    with pytest.raises(ModelError) as error:
        load_weights(target, path)
    assert str(error.value) == (
        f"weights file {path} does not fit the model;"
        " missing: 0.bias, 1.weight, 1.bias, 1.running_mean, 1.running_var and 1 more; unexpected: extra;"
        " wrong shape: 3.weight is [5, 6] in the file and [4, 6] in the model"
    )
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="does not exist; give the path"):
        read_weights(tmp_path / "none.safetensors")
    for name in ("cut.safetensors", "cut.pth", "empty.pth"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"not weights at all")
        with pytest.raises(ModelError, match=f"weights file .*{name} is damaged or"):
            read_weights(tmp_path / name)
    torch.save(network().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:700])
    with pytest.raises(ModelError, match=r"half\.pth is damaged"):
        read_weights(tmp_path / "half.pth")
    torch.save(Payload(), tmp_path / "code.pth")
    with pytest.raises(ModelError, match="holds more than tensors"):
        read_weights(tmp_path / "code.pth")
    assert "executed" not in capsys.readouterr().out
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="does not hold a state dict"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(ModelError) as error:
        read_weights(tmp_path / "code.pth")
    assert "\n" not in str(error.value)
