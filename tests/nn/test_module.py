"""A quantized network is a module like others: state, pickles, copies, dtypes, gradients, a line of text."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.toy_denoiser import TIMES, Rows, denoiser, inputs, trajectory
from tests.small_networks import small_float_model, small_images
from tests.toy_networks import toy
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import synthquant as sq
from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.models.signature import Inputs
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS, new_quantizer
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantArgs
from synthquant.quantize.difference_ranges import calibrate_differences
from synthquant.quantize.rtn import Rtn

QUIET = {"progress": sq.Progress()}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"scheme": "W4A4"},
    "full": {"scheme": {"preset": "W8A8", "deploy": "full"}},
    "bias": {"scheme": "W3A4", "bias_correction": True},
    "equalized": {"scheme": "W8A8", "equalize": "weights"},
    "rotated": {"scheme": "W4A8", "method": "rotation", "block": 4},
}


def small(folder: Path, way: str) -> QuantModel:
    settings = {"method": "rtn", **WAYS[way]}
    return sq.quantize(small_float_model(folder), small_images(), **settings, **QUIET)


def of_toy(name: str) -> tuple[QuantModel, Inputs]:
    one = toy(name)
    return sq.quantize(one.model, one.samples, "W4A4", "rtn", **QUIET), one.samples.inputs.rows(0, 3)


@torch.no_grad()
def run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(inputs.clone().call(network)) if isinstance(leaf, Tensor)]


def require_same(first: QuantModel, second: QuantModel, inputs: Inputs) -> None:
    """Quantized and, unless it is gone, float outputs alike."""
    assert all(map(torch.equal, run(first, inputs), run(second, inputs)))
    assert first.loaded is second.loaded
    if not first.loaded:
        with first.mode(weights=False, activations=False), second.mode(weights=False, activations=False):
            assert all(map(torch.equal, run(first, inputs), run(second, inputs)))


def stored(value: Any, **settings: Any) -> Any:
    """What `torch.save` and `torch.load` make of it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_a_state_dict_is_the_whole_network(way: str, tmp_path: Path) -> None:
    quant_model = small(tmp_path, way)
    inputs = quant_model.float_model.example(3)
    other = QuantModel.build(quant_model.float_model, quant_model.scheme, fold=quant_model.fold)
    other.load_state_dict(stored(quant_model.state_dict(), weights_only=True))
    require_same(quant_model, other, inputs)
    assert all(torch.equal(value, other.state()[name]) for name, value in quant_model.state().items())
    first, second = quant_model.save(tmp_path / "first"), other.save(tmp_path / "second")
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize("name", ["detector", "tokens"])
def test_networks_of_any_kind_are_copied_pickled_and_loaded(name: str) -> None:
    quant_model, inputs = of_toy(name)
    other = QuantModel.build(quant_model.float_model, quant_model.scheme)
    other.load_state_dict(quant_model.state_dict())
    for twin in (
        other,
        copy.deepcopy(quant_model),
        pickle.loads(pickle.dumps(quant_model)),
        stored(quant_model, weights_only=False),
    ):
        require_same(quant_model, twin, inputs)
        assert repr(twin) == repr(quant_model)


def test_a_network_without_float_weights_has_a_state_too(tmp_path: Path) -> None:
    quant_model = small(tmp_path, "bias")
    loaded = sq.load(quant_model.save(tmp_path / "model"), quant_model.float_model)
    inputs = quant_model.float_model.example(3)
    other = QuantModel.build(quant_model.float_model, quant_model.scheme)
    other.load_state_dict(loaded.state_dict())
    require_same(loaded, other, inputs)
    require_same(loaded, pickle.loads(pickle.dumps(loaded)), inputs)
    with pytest.raises(ModelError, match="holds no float weights"), other.mode(weights=False, activations=False):
        pass
    other.load_state_dict(quant_model.state_dict())  # and gets them back
    require_same(quant_model, other, inputs)


def test_inside_of_another_module(tmp_path: Path) -> None:
    quant_model = small(tmp_path, "bias")
    other = nn.ModuleDict({"net": QuantModel.build(quant_model.float_model, quant_model.scheme)})
    other.load_state_dict(nn.ModuleDict({"net": quant_model}).state_dict())
    inputs = quant_model.float_model.example(3)
    require_same(quant_model, other["net"], inputs)  # type: ignore[arg-type]


def test_a_modulated_network_keeps_its_ranges() -> None:
    scheme = {"preset": "W4A4", "modulation": {"ranges": "static"}}
    quant_model = QuantModel.build(denoiser(), scheme)  # type: ignore[arg-type]
    Rtn().apply(quant_model, Rows(trajectory()), sq.Rng(0))
    calibrate_differences(quant_model, Rows(trajectory()), observer="minmax")
    other = QuantModel.build(quant_model.float_model, quant_model.scheme)
    other.load_state_dict(quant_model.state_dict())
    steps = [inputs(sample, time) for sample, time in zip(trajectory(), TIMES, strict=True)]
    for network in (other, copy.deepcopy(quant_model), pickle.loads(pickle.dumps(quant_model))):
        with quant_model.sampling(), network.sampling():
            for step in steps:
                assert all(map(torch.equal, run(quant_model, step), run(network, step)))
    asking = inputs(trajectory()[0].requires_grad_(), TIMES[0])
    with quant_model.sampling(), pytest.raises(UnsupportedModelError, match=r"sample under torch.no_grad\(\)"):
        asking.call(quant_model)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    quant_model = small(tmp_path, "plain")
    state = quant_model.state_dict()
    model = quant_model.float_model
    with pytest.raises(ModelError, match="quantized otherwise than this one"):
        QuantModel.build(model, "W8A8").load_state_dict(state)
    equalized = small(tmp_path, "equalized")
    with pytest.raises(ModelError, match="equalised otherwise"):
        equalized.load_state_dict(QuantModel.build(model, "W8A8").state_dict())
    name = next(name for name in state if name.endswith("input_quantizer.scale"))
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        QuantModel.build(model, "W4A4").load_state_dict({key: value for key, value in state.items() if key != name})
    blank = QuantModel.build(model, "W4A4")
    blank.load_state_dict(blank.state_dict())
    assert not blank.calibrated and "not calibrated yet" in repr(blank)


def test_half_precision_keeps_the_grids(tmp_path: Path) -> None:
    quant_model = small(tmp_path, "plain")
    half = copy.deepcopy(quant_model).half()
    images = quant_model.float_model.example_images(4)
    found, wanted = half(images.half()), quant_model(images)
    assert found.dtype == torch.float16 and half.layers["fc"].weight.dtype == torch.float16
    assert float((found.float() - wanted).abs().mean()) < 0.05 * float(wanted.std())
    for name, quantizer in half.quantizers.items():
        assert all(map(torch.equal, quantizer.grid().values(), quant_model.quantizers[name].grid().values()))
    back = half.float()
    assert back(images).dtype == torch.float32
    assert all(torch.equal(layer.weight, quant_model.layers[name].weight) for name, layer in back.layers.items())


def test_gradients_reach_the_input(tmp_path: Path) -> None:
    quant_model = small(tmp_path, "plain")
    images = quant_model.float_model.example_images(4).requires_grad_()
    logits = quant_model(images)
    assert torch.equal(logits, quant_model(images.detach()))
    (found,) = torch.autograd.grad(logits.square().sum(), images)
    with quant_model.mode(weights=True, activations=False):
        (wanted,) = torch.autograd.grad(quant_model(images).square().sum(), images)
    assert float(torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)) > 0.5


@pytest.mark.parametrize("kind", QUANTIZER_KINDS.names())
def test_every_kind_passes_gradients_and_the_same_values(kind: str) -> None:
    quantizer = new_quantizer(QuantArgs(num_bits=4, kind=kind, symmetric=False))
    quantizer.cover(0.0 if quantizer.non_negative else -1.0, 1.0)
    quantizer.calibrated = True
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = quantizer(x)
    assert torch.equal(y, quantizer(x.detach()))
    y.sum().backward()
    assert x.grad is not None and float(x.grad.abs().mean()) > 0.3


def test_the_line_of_text_is_short(tmp_path: Path) -> None:
    assert repr(small(tmp_path, "plain")) == (
        "QuantModel(Network, W4A4, ends w8a8; quantized: 8 of 8 layers, 100.0% of weights, 100.0% of multiply-adds)"
    )
