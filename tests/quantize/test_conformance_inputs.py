"""What a unit learns from is what it will read: the quantized network's own tensors, and the float network's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.nn.networks import Keywords, Network, Upsampling, float_model
from tests.quantize.phases import a_phase
from torch import nn

from synthquant.core.modules import hooked
from synthquant.core.progress import QUIET
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import MemoryBudget
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.reconstruct import Reconstruction
from synthquant.quantize.rtn import Rtn
from synthquant.quantize.unit_fit import UnitFit


def arguments(model: QuantModel, names: list[str], x: torch.Tensor) -> list[list[torch.Tensor]]:
    """The tensors with a row for each image that modules are called with in a forward pass of the whole network."""
    seen: dict[int, list[torch.Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor)]
        seen[id(module)] = [leaf.clone() for leaf in leaves if len(leaf) == len(x)]

    modules = [model.module.get_submodule(name) for name in names]
    with torch.no_grad(), hooked(pre=[(module, keep) for module in modules], with_kwargs=True):
        model(x)
    return [seen[id(module)] for module in modules]


@pytest.mark.parametrize("network", [Network, Upsampling, Keywords])
@pytest.mark.parametrize("deploy", ["papers", "full"])
@pytest.mark.parametrize("activations", [True, False])
def test_cached_inputs_are_those_of_whole_forward_passes(
    monkeypatch: pytest.MonkeyPatch, network: type[nn.Module], deploy: str, activations: bool
) -> None:
    model = QuantModel.build(float_model(network()), {"preset": "W3A3", "deploy": deploy})  # type: ignore[arg-type]
    pixels = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = ImageSet.from_tensors(pixels, dtype="float16")
    Rtn(observer="minmax").apply(model, data, Rng(0))
    calibration = CalibrationSet(model, data)
    engine = Reconstruction(model, calibration, "layer", MemoryBudget(host_gib=1), None)
    cached: list[tuple[Any, Any]] = []
    fit = UnitFit.fit

    def kept(self: UnitFit, *rest: Any) -> Any:
        assert self.student is not None and self.teacher is not None
        cached.append((self.student.read(0, 5), self.teacher.read(0, 5)))
        return fit(self, *rest)

    monkeypatch.setattr(UnitFit, "fit", kept)
    # Nothing is learned, so that the network stays the one that is run below.
    engine.run(
        a_phase(iterations=0, batch_size=5, inputs="mixed", activations=activations, rounding_lr=0.0), Rng(0), QUIET
    )
    names = [unit.name for unit in engine.units]
    (x,) = next(calibration.batches()).tensors
    for place, options in ((0, {"weights": True, "activations": activations}), (1, {"weights": False})):
        with model.mode(**{"activations": False, **options}):
            wanted = arguments(model, names, x)
        for name, found, expected in zip(names, cached, wanted, strict=True):
            assert len(found[place]) == len(expected) > 0
            for one, other in zip(found[place], expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=f"{name}, {options}")
