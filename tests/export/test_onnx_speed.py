import itertools

import torch

from synthquant.export.onnx.speed import in_turns


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
