"""Layers that read concatenations, split into one layer for each of the joined tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.denoisers import denoiser
from tests.toy_networks import InMemory, toy
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.errors import ModelError, SchemeError
from synthquant.core.rng import Rng
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs
from synthquant.models.trace import trace
from synthquant.nn.equalization import Equalization
from synthquant.nn.functional import quantize
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.nn.split_shortcuts import SplitLayer, joined_inputs
from synthquant.nn.weight_quantizers import WeightQuantizer
from synthquant.quantize.adaround import AdaRound
from synthquant.quantize.rtn import Rtn

X = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Joining(nn.Module):
    """Two stems, one with a hundredth of the range of the other, and what reads both; `run` says how."""

    def __init__(self, read: nn.Module, run: Callable[[Joining, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.norm, self.read, self.run = nn.GroupNorm(2, 12), read, run
        with torch.no_grad():
            self.small.weight.mul_(0.01)
            self.small.bias.mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.large(x), self.small(x))


def joining(read: nn.Module, run: Callable[[Joining, Tensor, Tensor], Tensor], x: Tensor = X) -> FloatModel:
    torch.manual_seed(1)
    module = Joining(read, run).eval().requires_grad_(False)
    return FloatModel(module, Inputs((x,)), "joining", ModelSource(source="toy/joining"), "other")


def plain(net: Joining, large: Tensor, small: Tensor) -> Tensor:
    return net.read(torch.cat([large, small], 1))


def split(model: FloatModel, mode: str | None = "skip", **scheme: Any) -> QuantModel:
    return QuantModel.build(model, QuantScheme.parse({"preset": "W8A8", "split_shortcuts": mode, **scheme}))


def conv(kernel: int = 1, **settings: Any) -> nn.Conv2d:
    torch.manual_seed(2)
    return nn.Conv2d(12, 6, kernel, padding=kernel // 2, **settings)


def in_float(model: QuantModel, inputs: Inputs) -> Tensor:
    with model.mode(weights=False, activations=False), torch.no_grad():
        output = inputs.clone().call(model)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("deploy", ["papers", "full"])
def test_three_by_three_convolutions_of_a_unet_of_ones_own(deploy: str) -> None:
    one = toy("unet")
    quantized, inputs = split(one.model, "skip", deploy=deploy), one.samples.inputs
    assert set(quantized.splits) == {"up.conv1", "up.skip"}
    wanted = inputs.call(one.model.module)
    assert torch.allclose(in_float(quantized, inputs), wanted, rtol=0, atol=1e-5)
    Rtn(observer="minmax").apply(quantized, one.samples, Rng(0))
    assert float((inputs.call(quantized) - wanted).norm() / wanted.norm()) < 0.1


@torch.no_grad()
def test_equal_to_the_whole_layer_where_both_halves_share_a_scale() -> None:
    model = joining(conv(3), plain)
    whole, halves = split(model, None), split(model)
    for one in (whole, halves):
        Rtn(observer="minmax").apply(one, InMemory(Inputs((X,))), Rng(0))
    for part in halves.splits["read"]:
        halves.quantizers[f"{part}.input_quantizer"].load_grid(whole.quantizers["read.input_quantizer"].grid())
        mine, theirs = (net.layers[name].weight_quantizer for net, name in ((halves, part), (whole, "read")))
        assert isinstance(mine, WeightQuantizer) and isinstance(theirs, WeightQuantizer)
        mine.scale.copy_(theirs.scale)
        mine.zero_point.copy_(theirs.zero_point)
        grouped = mine.grouped(halves.layers[part].float_weight)
        mine.set_codes(quantize(grouped, mine.scale, mine.zero_point, mine.args.quant_max))
    wanted = whole(X)
    assert torch.allclose(halves(X), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(wanted, model.module(X), rtol=0, atol=1e-5)


@pytest.mark.parametrize("deploy", ["papers", "full"])
@torch.no_grad()
def test_a_small_half_keeps_its_codes(deploy: str) -> None:
    """Weights that read the small half are large, so that both halves count alike (section 3.3 of the paper)."""
    read = conv()
    read.weight[:, 4:].mul_(100)
    model, errors = joining(read, plain), {}
    for mode in (None, "skip"):
        quantized = split(model, mode, deploy=deploy)
        Rtn(observer="minmax").apply(quantized, InMemory(Inputs((X,))), Rng(0))
        errors[mode] = float((quantized(X) - model.module(X)).norm() / model.module(X).norm())
    assert errors["skip"] < 0.02 < 0.2 < errors[None]


def test_each_half_has_the_range_of_its_own_tensor_and_weights() -> None:
    model = split(joining(conv(), plain))
    Rtn(observer="minmax").apply(model, InMemory(Inputs((X,))), Rng(0))
    with torch.no_grad():
        large, small = model.float_model.module.large(X), model.float_model.module.small(X)
    for part, made in zip(model.splits["read"], (large, small), strict=True):
        grid = model.quantizers[f"{part}.input_quantizer"].affine_grid()
        span = float(made.max()) - float(made.min())
        assert float(grid.scale) * 255 == pytest.approx(span, rel=0.05)
    weights = [model.layers[part].float_weight for part in model.splits["read"]]
    assert torch.equal(torch.cat(weights, 1), model.float_model.module.read.weight)
    biases = [model.layers[part].bias for part in model.splits["read"]]
    assert torch.equal(biases[0], model.float_model.module.read.bias) and biases[1] is None


def through(function: Callable[[Joining, Tensor], Tensor]) -> Callable[[Joining, Tensor, Tensor], Tensor]:
    return lambda net, large, small: net.read(function(net, torch.cat([large, small], 1)))


# What a layer reads: as it is split by `skip` and by `all`.
READS: dict[str, tuple[nn.Module, Callable[[Joining, Tensor, Tensor], Tensor], Any, Any]] = {
    "raw": (conv(), plain, (4, 8), (4, 8)),
    "contiguous": (conv(), through(lambda net, x: x.clone().contiguous()), (4, 8), (4, 8)),
    "dropout": (conv(), through(lambda net, x: F.dropout(x, 0.5, net.training)), (4, 8), (4, 8)),
    "norm and activation": (conv(), through(lambda net, x: F.silu(net.norm(x))), None, (4, 8)),
    "resized": (conv(), through(lambda net, x: F.interpolate(x, scale_factor=2.0)), None, (4, 8)),
    "scaled by time": (conv(), through(lambda net, x: x * x.mean((2, 3), keepdim=True)), None, (4, 8)),
    "flipped channels": (conv(), through(lambda net, x: x.flip(1)), None, None),
    "a sum of two": (conv(), through(lambda net, x: x + x.roll(1, 1)), None, None),
    "three": (conv(), lambda net, a, b: net.read(torch.cat([a, b[:, :3], b[:, 3:]], 1)), (4, 3, 5), (4, 3, 5)),
    "once alone": (conv(), lambda net, a, b: net.read(torch.cat([a.repeat(1, 3, 1, 1)], 1) * b.mean()), None, None),
    "along the rows": (
        nn.Conv2d(4, 6, 1),
        lambda net, a, b: net.read(torch.cat([a, b[:, :4]], 2)),
        None,
        None,
    ),
    "along the batch": (nn.Conv2d(4, 6, 1), lambda net, a, b: net.read(torch.cat([a, b[:, :4]], 0)), None, None),
    "transposed": (nn.ConvTranspose2d(12, 6, 2, stride=2), plain, (4, 8), (4, 8)),
    "grouped": (conv(groups=2), plain, None, None),
    "tokens": (
        nn.Linear(12, 5),
        lambda net, a, b: net.read(torch.cat([a.flatten(2).mT, b.flatten(2).mT], -1)),
        (4, 8),
        (4, 8),
    ),
    "sizes that change": (
        conv(),
        lambda net, a, b: net.read(torch.cat([a, b], 1)) + net.read(torch.cat([b, a], 1)),
        None,
        None,
    ),
}


@pytest.mark.parametrize("case", READS)
def test_what_is_split(case: str) -> None:
    read, run, *expected = READS[case]
    model = joining(read, run)
    wanted = model.module(X)
    for mode, sizes in zip(("skip", "all"), expected, strict=True):
        quantized = split(model, mode)
        found = quantized.module.get_submodule("read")
        assert (found.sizes if isinstance(found, SplitLayer) else None) == sizes, mode
        assert torch.allclose(in_float(quantized, Inputs((X,))), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_sines_beside_cosines_are_no_shortcut() -> None:
    model = denoiser("unet", 3).model
    seen = trace(model.module, model.example(2))
    assert "time_embedding.linear_1" not in joined_inputs(model.module, seen, "all")
    read = conv()
    beside_input = joining(read, lambda net, a, b: net.read(torch.cat([X[:, :4] * 2, X, X], 1)) + a.mean() + b.mean())
    assert not split(beside_input).splits


def test_a_layer_that_is_no_linear_function_stays_whole() -> None:
    class Squared(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 2

    model = joining(Squared(12, 6, 1), plain)
    assert not split(model).splits and "read" in split(model).layers


def test_code_that_looks_at_the_weight_still_can() -> None:
    model = joining(conv(), lambda net, a, b: net.read(torch.cat([a, b], 1).to(net.read.weight.dtype)))
    quantized = split(model)
    assert quantized.splits and quantized.module.read.weight.shape == (6, 12, 1, 1)


def test_patterns_reach_both_halves_or_one_or_keep_a_layer_whole() -> None:
    model = joining(conv(), plain)
    both = split(model, overrides={"read": {"weights": {"num_bits": 4}}}, ends="same")
    assert [both.layers[name].weight_quantizer.num_bits for name in both.splits["read"]] == [4, 4]  # type: ignore[union-attr]
    one = split(model, overrides={"*.part_1": {"weights": {"num_bits": 4}}}, ends="same")
    assert [one.layers[name].weight_quantizer.num_bits for name in one.splits["read"]] == [8, 4]  # type: ignore[union-attr]
    left = split(model, ignore=["read"])
    assert not left.splits and "read" not in left.layers
    with pytest.raises(SchemeError, match=r"pattern '\*.part_7' matches no layer"):
        split(model, ignore=["*.part_7"])


def test_both_halves_of_an_end_have_the_bits_of_an_end() -> None:
    model = split(joining(conv(), plain), preset="W4A4")
    bits = {name: layer.weight_quantizer.num_bits for name, layer in model.layers.items() if layer.weight_quantizer}
    assert bits == {"large": 8, "small": 8, "read.part_0": 8, "read.part_1": 8}, "both read the image"


def test_what_nobody_asked_for_is_in_no_file() -> None:
    assert "split_shortcuts" not in QuantScheme.parse("W4A8").model_dump()
    scheme = QuantScheme.parse({"preset": "W4A8", "split_shortcuts": "skip"})
    assert scheme.model_dump()["split_shortcuts"] == "skip" and "shortcuts split" in scheme.describe()
    assert QuantScheme.parse(scheme.model_dump()) == scheme


def test_a_split_layer_is_one_unit_or_part_of_one() -> None:
    model = split(denoiser("unet", 3).model)
    blocks = {unit.name: unit.layers for unit in model.units("block")}
    name = "up_blocks.1.resnets.0"
    assert blocks[name][-2:] == (f"{name}.conv_shortcut.part_0", f"{name}.conv_shortcut.part_1")
    layers = {unit.name: unit.layers for unit in model.units("layer")}
    assert layers[f"{name}.conv_shortcut"] == blocks[name][-2:]
    assert sum(map(len, layers.values())) == sum(map(len, blocks.values())) == len(model.layers)


def test_a_split_layer_is_reconstructed_as_one() -> None:
    model = split(joining(conv(), plain), preset="W3A8", ends="same")
    report = AdaRound(iterations=40, batch_size=4).apply(model, InMemory(Inputs((X,))), Rng(0))
    (unit,) = [unit for unit in report.units if unit.name == "read"]
    assert unit.layers == ("read.part_0", "read.part_1") and not unit.diverged
    assert unit.loss_end is not None and unit.loss_start is not None and unit.loss_end < unit.loss_start


@pytest.mark.parametrize("deploy", ["papers", "full"])
def test_checkpoints_and_coverage(tmp_path: Path, deploy: str) -> None:
    one = denoiser("unet", 6)
    model, whole = (split(one.model, mode, deploy=deploy) for mode in ("all", None))
    Rtn(observer="minmax").apply(model, one.samples, Rng(0))
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "model"), float_model=one.model)
    assert torch.equal(one.outputs(loaded), one.outputs(model)) and loaded.splits == model.splits
    rows = {row.name: row for row in model.coverage()}
    for name, parts in model.splits.items():
        before = next(row for row in whole.coverage() if row.name == name)
        assert name not in rows and all(rows[part].kind == "Conv2d" for part in parts)
        assert all((rows[part].weight_bits, rows[part].input_bits, rows[part].reason) == (8, 8, "") for part in parts)
        assert sum(rows[part].parameters for part in parts) == before.parameters
        assert sum(rows[part].macs for part in parts) == before.macs


def test_concatenations_are_undone_for_integer_kernels_unless_another_needs_them() -> None:
    def norm_beside(net: Joining, large: Tensor, small: Tensor) -> Tensor:
        joined = torch.cat([large, small], 1)
        return net.read(joined) + net.norm(joined)[:, :6]

    undone = split(joining(conv(), norm_beside), deploy="full")
    assert [undone.reads[part] for part in undone.splits["read"]] == [
        "large.output_quantizer",
        "small.output_quantizer",
    ]
    assert "cat_0" not in undone.quantizers

    def layer_beside(net: Joining, large: Tensor, small: Tensor) -> Tensor:
        joined = torch.cat([large, small], 1)
        return net.read(joined) + torch.sigmoid(joined)[:, :6]

    kept = split(joining(conv(), layer_beside), deploy="full")
    assert [kept.reads[part] for part in kept.splits["read"]] == [f"read.part_{n}.input_quantizer" for n in (0, 1)]
    assert "cat_0" in kept.quantizers

    behind = split(joining(conv(), through(lambda net, x: F.silu(net.norm(x)))), "all", deploy="full")
    assert [behind.reads[part] for part in behind.splits["read"]] == [f"read.part_{n}.input_quantizer" for n in (0, 1)]
    assert "mul_0" not in behind.quantizers


def test_channels_are_scaled_before_the_split_and_not_behind_it() -> None:
    model = joining(conv(), plain)
    factors = Equalization(rows={"large": torch.full((4,), 0.5)}, columns={"read": torch.tensor([2.0] * 4 + [1.0] * 8)})
    scheme = QuantScheme.parse({"preset": "W8A8", "split_shortcuts": "skip"})
    quantized = QuantModel.build(model, scheme, factors)
    assert quantized.splits and torch.allclose(in_float(quantized, Inputs((X,))), model.module(X), atol=1e-5)
    with pytest.raises(ModelError, match=r"layer read is split, so its channels cannot be scaled any more; leave"):
        split(model).equalize(factors)


@pytest.mark.parametrize("deploy", ["papers", "full"])
@pytest.mark.parametrize("mode", ["skip", "all"])
@pytest.mark.parametrize("kind", ["unet", "conditional"])
def test_denoisers_compute_the_same_and_are_split_where_they_go_up(kind: str, mode: str, deploy: str) -> None:
    one = denoiser(kind, 3)
    before = one.model.fingerprint
    model = split(one.model, mode, deploy=deploy)
    ends = ("conv_shortcut",) if mode == "skip" else ("conv1", "conv_shortcut")
    assert set(model.splits) == {f"up_blocks.{a}.resnets.{b}.{end}" for a in (0, 1) for b in (0, 1) for end in ends}
    for name, parts in model.splits.items():
        assert parts == (f"{name}.part_0", f"{name}.part_1") and set(parts) <= set(model.layers)
        assert len({model.reads[part] for part in parts}) == 2
    wanted = one.outputs(one.model.module)
    assert torch.allclose(in_float(model, one.inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert one.model.fingerprint == before
