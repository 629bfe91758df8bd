import itertools
from pathlib import Path

import torch
from tests.nn.networks import Network, float_model

from synthquant.export.onnx.runtime import session
from synthquant.export.onnx.speed import export_float, in_turns


def test_networks_are_timed_in_turns_by_the_clock_given() -> None:
    called: list[str] = []

    def network(name: str, inputs: torch.Tensor) -> torch.Tensor:
        called.append(name)
        return inputs

    ticks = itertools.count()
    networks = {name: lambda inputs, name=name: network(name, inputs) for name in ("float", "quantized")}
    times = in_turns(networks, torch.zeros(1), seconds=0.1, clock=lambda: float(next(ticks)))
    turns = [name for name, _ in itertools.groupby(called)]
    assert turns[:2] == ["float", "quantized"]
    assert all(set(values) == {1.0} for values in times.values())


def test_the_float_file_has_the_ends_of_the_quantized_one(tmp_path: Path) -> None:
    loaded = session(export_float(float_model(Network()), tmp_path / "float.onnx"))
    assert [value.name for value in loaded.get_inputs()] == ["images"]
    assert [value.name for value in loaded.get_outputs()] == ["logits"]
