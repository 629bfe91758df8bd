from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from synthquant.models.batch_norm import fold_batch_norms
from synthquant.models.blocks import Unit, block_inputs, find_units, shared_inputs
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.trace import trace
from synthquant.models.zoo.mobilenet_cifar import mobilenetv2
from synthquant.models.zoo.resnet_cifar import resnet20
from synthquant.models.zoo.vit_cifar import vit


def quantizable(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if isinstance(part, QUANTIZABLE)}


def numbered(prefix: str, *counts: int, start: int = 0, middle: str = ".") -> Iterator[str]:
    """`prefix0.0, prefix0.1, ...` with so many entries for each number."""
    for number, count in enumerate(counts, start):
        yield from (f"{prefix}{number}{middle}{index}" for index in range(count))


def torchvision_regnet() -> list[str]:
    return [f"trunk_output.block{s}.block{s}-{i}" for s, count in enumerate((1, 3, 6, 6), 1) for i in range(count)]


def convnext() -> Iterator[str]:
    yield "stem.0"
    for stage, count in enumerate((2, 2, 6, 2)):
        if stage:
            yield f"stages.{stage}.downsample.1"
        yield from (f"stages.{stage}.blocks.{index}" for index in range(count))
    yield "head.fc"


def swin() -> Iterator[str]:
    yield "patch_embed.proj"
    for stage, count in enumerate((2, 1, 2)):
        if stage:
            yield f"layers.{stage}.downsample.reduction"
        yield from (f"layers.{stage}.blocks.{index}" for index in range(count))
    yield "head.fc"


def densenet() -> Iterator[str]:
    yield "features.conv0"
    for stage, count in enumerate((6, 12, 24, 16), 1):
        yield from (f"features.denseblock{stage}.denselayer{index}" for index in range(1, count + 1))
        if stage < 4:
            yield f"features.transition{stage}.conv"
    yield "classifier"


# name: (network, input size, units)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "zoo resnet20": (resnet20, 32, ["conv1", *numbered("layer", 3, 3, 3, start=1), "fc"]),
    "zoo mobilenetv2": (
        mobilenetv2,
        32,
        ["features.0.0", *(f"features.{index}" for index in range(1, 18)), "features.18.0", "classifier"],
    ),
    "zoo vit": (vit, 32, ["patch_embed.proj", *(f"blocks.{index}" for index in range(6)), "head"]),
    "torchvision resnet18": (models.resnet18, 32, ["conv1", *numbered("layer", 2, 2, 2, 2, start=1), "fc"]),
    "torchvision mobilenet_v2": (
        models.mobilenet_v2,
        32,
        ["features.0.0", *(f"features.{index}" for index in range(1, 18)), "features.18.0", "classifier.1"],
    ),
    "torchvision regnet_y_400mf": (models.regnet_y_400mf, 32, ["stem.0", *torchvision_regnet(), "fc"]),
    "torchvision mnasnet0_5": (
        models.mnasnet0_5,
        32,
        [
            *(f"layers.{i}" for i in (0, 3, 6)),
            *numbered("layers.", 3, 3, 3, 2, 4, 1, start=8),
            "layers.14",
            "classifier.1",
        ],
    ),
    "timm efficientnet_lite0": (
        lambda: timm.create_model("efficientnet_lite0"),
        32,
        ["conv_stem", *numbered("blocks.", 1, 2, 2, 3, 3, 4, 1), "conv_head", "classifier"],
    ),
    "timm resnet18": (
        lambda: timm.create_model("resnet18"),
        32,
        ["conv1", *numbered("layer", 2, 2, 2, 2, start=1), "fc"],
    ),
    "timm regnetx_002": (
        lambda: timm.create_model("regnetx_002"),
        32,
        ["stem.conv", *(f"s{s}.b{i + 1}" for s, count in enumerate((1, 1, 4, 7), 1) for i in range(count)), "head.fc"],
    ),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto"), 32, list(convnext())),
    "timm vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32),
        32,
        ["patch_embed.proj", *(f"blocks.{index}" for index in range(12)), "head"],
    ),
    "timm swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(2, 1, 2), num_heads=(1, 2, 4)
        ),
        56,
        list(swin()),
    ),
    "timm densenet121": (lambda: timm.create_model("densenet121"), 32, list(densenet())),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_units_of_real_networks(name: str) -> None:
    build, size, expected = NETWORKS[name]
    torch.manual_seed(0)
    module, example = build().eval(), torch.randn(2, 3, size, size)
    layers, seen = quantizable(module), trace(module, example)
    units = find_units(module, example, "block", layers, seen)
    assert [unit.name for unit in units] == expected
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(layers)
    for unit in units:
        assert all(layer == unit.name or layer.startswith(f"{unit.name}.") for layer in unit.layers)
        assert list(unit.layers) == sorted(unit.layers, key=seen.order.index)
    fold_batch_norms(module, example)
    assert find_units(module, example, "block", layers) == units


def test_wrapping_a_network_changes_nothing_but_the_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x) + 1

    network, example = timm.create_model("efficientnet_lite0").eval(), torch.randn(2, 3, 32, 32)
    plain = find_units(network, example, "block", quantizable(network))
    for wrapped, prefix in (
        (Wrapper(network), "network."),
        (nn.Sequential(nn.Identity(), Wrapper(network)), "1.network."),
    ):
        units = find_units(wrapped.eval(), example, "block", quantizable(wrapped))
        assert [unit.name for unit in units] == [prefix + unit.name for unit in plain]


def test_layer_and_network_granularity() -> None:
    module, example = resnet20().eval(), torch.randn(2, 3, 32, 32)
    layers = quantizable(module)
    order = [name for name in trace(module, example).order if name in layers]
    assert find_units(module, example, "layer", layers) == [Unit(name, (name,)) for name in order]
    assert find_units(module, example, "network", layers) == [Unit("", tuple(order))]
    assert find_units(module, example, "network", set()) == []
    # The shortcut is called before the first convolution of its block.
    assert order.index("layer2.0.downsample.0") < order.index("layer2.0.conv1")


def test_layers_that_are_left_out_are_in_no_unit() -> None:
    module, example = resnet20().eval(), torch.randn(2, 3, 32, 32)
    some = quantizable(module) - {"conv1", "layer1.1.conv1", "layer1.2.conv1", "layer1.2.conv2"}
    units = {unit.name: unit.layers for unit in find_units(module, example, "block", some)}
    assert units["layer1.1"] == ("layer1.1.conv2",)
    assert "conv1" not in units
    assert "layer1.2" not in units


class Residual(nn.Module):
    """Adds what its body computes, where `add` is set."""

    def __init__(self, *body: nn.Module, add: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.add else y


class Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResidualSequential(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


class Net(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 1)


EXAMPLE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def unit_names(module: nn.Module) -> list[str]:
    layers = quantizable(module)
    units = find_units(module.eval(), EXAMPLE, "block", layers)
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(layers)
    return [unit.name for unit in units]


def test_a_stage_that_holds_one_block_is_still_a_stage() -> None:
    module = Net(stem=conv(), one=Stage(Residual(conv(), conv())), two=Stage(Residual(conv()), Residual(conv())))
    assert unit_names(module) == ["stem", "one.blocks.0", "two.blocks.0", "two.blocks.1"]


def test_a_block_without_shortcut_is_a_block_by_its_class() -> None:
    module = Net(
        stem=conv(), body=Stage(Residual(conv(), conv()), Residual(conv(), conv(), add=False), Residual(conv()))
    )
    assert unit_names(module) == ["stem", "body.blocks.0", "body.blocks.1", "body.blocks.2"]


def test_a_composite_beside_blocks_is_a_block_by_its_place() -> None:
    # Two layers of another class without a merge, as a depthwise-separable block; one layer alone stays a layer.
    pair, single = Net(first=conv(), second=conv()), Net(first=conv())
    module = Net(
        stem=Net(a=conv(), b=conv()), body=nn.Sequential(pair, Residual(conv(), conv()), single, Residual(conv()))
    )
    assert unit_names(module) == ["stem.a", "stem.b", "body.0", "body.1", "body.2.first", "body.3"]


def test_parts_of_a_block_are_no_blocks_although_another_block_lies_as_deep() -> None:
    deep = nn.Sequential(Residual(conv()), Residual(conv()))
    module = Net(stem=conv(), body=nn.Sequential(Residual(Net(a=conv(), b=conv()), conv()), nn.Sequential(deep)))
    assert unit_names(module) == ["stem", "body.0", "body.1.0.0", "body.1.0.1"]


def test_nested_residuals_the_outer_one_wins_unless_it_is_made_of_several() -> None:
    single = Net(stem=conv(), body=nn.Sequential(Residual(conv(), Residual(conv())), Residual(conv())))
    assert unit_names(single) == ["stem", "body.0", "body.1"]
    several = Net(
        stem=conv(), body=nn.Sequential(Residual(Residual(conv(), conv()), Residual(conv())), Residual(conv()))
    )
    assert unit_names(several) == ["stem", "body.0.body.0", "body.0.body.1", "body.1"]


def test_a_container_with_its_own_forward_can_be_a_block() -> None:
    module = Net(stem=conv(), body=nn.Sequential(ResidualSequential(conv(), conv()), ResidualSequential(conv())))
    assert unit_names(module) == ["stem", "body.0", "body.1"]


def test_a_gate_makes_no_block_and_norms_with_subtractions_make_no_stage() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = conv(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True))).sigmoid()

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(dim=1, keepdim=True)

    assert unit_names(Net(stem=conv(), gate=Gate())) == ["stem", "gate.fc1", "gate.fc2"]
    block = Residual(Centred(), conv(), Centred(), Gate())
    assert unit_names(Net(stem=conv(), body=nn.Sequential(block, Residual(conv())))) == ["stem", "body.0", "body.1"]


def test_a_layer_used_twice_belongs_to_its_first_unit_and_an_unused_one_to_none() -> None:
    shared = conv()
    module = Net(stem=conv(), body=nn.Sequential(Residual(shared, conv()), Residual(shared, conv())))
    layers = quantizable(module)
    units = find_units(module.eval(), EXAMPLE, "block", layers)
    assert [unit.layers for unit in units] == [("stem",), ("body.0.body.0", "body.0.body.1"), ("body.1.body.1",)]
    module.stem.register_module("unused", conv())
    again = find_units(module, EXAMPLE, "block", quantizable(module))
    assert again == units


def test_layers_that_read_the_same_tensor() -> None:
    module, example = resnet20().eval(), torch.randn(2, 3, 32, 32)
    seen = trace(module, example)
    order = [name for name in seen.order if name in quantizable(module)]
    groups = [(f"layer{stage}.0.downsample.0", f"layer{stage}.0.conv1") for stage in (2, 3)]
    assert shared_inputs(seen, order) == groups
    assert shared_inputs(seen, ["layer2.0.conv1", "fc"]) == []


class Branches(nn.Module):
    def __init__(self, run: Callable[[Branches, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


SHARED: dict[str, tuple[Callable[[Branches, Tensor], Tensor], list[tuple[str, ...]]]] = {
    "all three": (lambda net, x: net.c(x) + net.b(x) + net.a(x), [("c", "b", "a")]),
    "through identity": (lambda net, x: net.a(net.same(x)) + net.b(x), [("a", "b")]),
    "changed in place between": (lambda net, x: net.a(x) + net.b(net.relu(x)), []),
    "changed in place before": (lambda net, x: net.a(y := net.relu(x)) + net.b(y), [("a", "b")]),
    "equal copies": (lambda net, x: net.a(x) + net.b(x.clone()), []),
    "two calls join two groups": (lambda net, x: net.a(x) + net.b(net.a(y := net.c(x))) + net.b(y), [("a", "c", "b")]),
}


@pytest.mark.parametrize("case", SHARED)
def test_sharing_goes_by_the_very_tensor(case: str) -> None:
    run, expected = SHARED[case]
    assert shared_inputs(trace(Branches(run), EXAMPLE), ["a", "b", "c"]) == expected


def test_block_inputs_of_identity_shortcuts() -> None:
    module, example = resnet20().eval(), torch.randn(2, 3, 32, 32)
    fold_batch_norms(module, example)
    layers = quantizable(module)
    units = find_units(module, example, "block", layers)
    seen = trace(module, example)
    found = block_inputs(seen, units, [name for name in seen.order if name in layers])
    with_identity = [name for name in numbered("layer", 3, 3, 3, start=1) if name not in ("layer2.0", "layer3.0")]
    assert found == {name: (f"{name}.conv1",) for name in with_identity}


BLOCKS: dict[str, tuple[Callable[[Branches, Tensor], Tensor], tuple[str, ...] | None]] = {
    "shortcut": (lambda net, x: net.b(net.a(x)) + x, ("a",)),
    "shortcut in place": (lambda net, x: x.add_(net.b(net.a(x))), ("a",)),
    "two readers and a shortcut": (lambda net, x: net.a(x) + net.b(x) + x, ("a", "b")),
    "only layers": (lambda net, x: net.a(x) + net.b(x), None),
    "no layer reads it": (lambda net, x: net.b(net.a(x * 2)) + x, None),
    "another value after relu": (lambda net, x: net.b(net.a(y := net.relu(x))) + y, None),
    "a norm": (lambda net, x: net.b(F.group_norm(x, 1)) + net.a(x), None),
    "a norm and a shortcut": (lambda net, x: net.b(F.group_norm(x, 1)) + net.a(x) + x, ("a",)),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_block_inputs(case: str) -> None:
    run, expected = BLOCKS[case]
    module = Net(stem=conv(), body=Branches(run))
    layers = ["stem", "body.a", "body.b", "body.c"]
    units = [Unit("stem", ("stem",)), Unit("body", ("body.a", "body.b", "body.c"))]
    found = block_inputs(trace(module, EXAMPLE), units, layers)
    assert found == ({} if expected is None else {"body": tuple(f"body.{name}" for name in expected)})


DENOISER_BLOCKS = {
    "unet": ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "down_blocks.1.attentions.0"],
    "conditional": ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "down_blocks.1.attentions.0"],
}


@pytest.mark.parametrize("kind", ["unet", "conditional"])
def test_residual_blocks_and_attentions_of_a_unet_are_units_also_where_each_level_has_one(kind: str) -> None:
    from tests.denoisers import denoiser

    model = denoiser(kind, 3).model
    names = [unit.name for unit in find_units(model.module, model.example(3), "block", quantizable(model.module))]
    down = [name for name in names if name.startswith("down") and "downsamplers" not in name]
    assert down == DENOISER_BLOCKS[kind]
    assert [name for name in names if name.startswith("mid")] == [
        f"mid_block.{name}" for name in ("resnets.0", "attentions.0", "resnets.1")
    ]
    ways_up = ["resnets.0", "attentions.0", "resnets.1", "attentions.1", "upsamplers.0.conv"]
    assert [name.removeprefix("up_blocks.0.") for name in names if name.startswith("up_blocks.0")] == ways_up


def test_blocks_of_a_diffusion_transformer() -> None:
    from tests.denoisers import denoiser

    model = denoiser("transformer", 3).model
    names = [unit.name for unit in find_units(model.module, model.example(3), "block", quantizable(model.module))]
    assert names == ["pos_embed.proj", "transformer_blocks.0", "transformer_blocks.1", "proj_out_1", "proj_out_2"]


def test_a_stage_of_another_class_that_holds_one_block_is_a_stage_unless_it_joins_something_itself() -> None:
    class Lone(nn.Module):
        def __init__(self, add: bool) -> None:
            super().__init__()
            self.block, self.last, self.add = Residual(conv(), conv()), conv(), add

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.block(x))
            return x + y if self.add else y

    several = Stage(Residual(conv()), Residual(conv()))
    for add, expected in ((False, ["lone.block", "lone.last"]), (True, ["lone"])):
        module = Net(stem=conv(), lone=Lone(add), several=several)
        assert unit_names(module) == ["stem", *expected, "several.blocks.0", "several.blocks.1"]
    # nobody holds several of it: what surrounds it is the block
    assert unit_names(Net(stem=conv(), lone=Lone(False), other=Stage(conv()))) == ["stem", "lone", "other.blocks.0"]
