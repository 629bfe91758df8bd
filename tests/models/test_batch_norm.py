from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from synthquant.models.batch_norm import batch_norm_layers, batch_norm_targets, fold_batch_norms
from synthquant.models.open import open_model

EXAMPLE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def randomize(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training, some scales negative."""
    generator = torch.Generator().manual_seed(1)
    for norm in batch_norm_layers(module).values():
        norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        if norm.affine:
            nn.init.uniform_(norm.weight, -0.5, 1.5, generator=generator)
            nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
    return module.eval()


def folded(module: nn.Module, example: Tensor) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Fold a copy, check that outputs are the same, and return it with the pairs."""
    randomize(module)
    result = copy.deepcopy(module)
    pairs = fold_batch_norms(result, example)
    with torch.no_grad():
        expected, found = module(example), result(example)
    # Relative to the largest output: float32 rounding, summed over the layers.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    return result, pairs


# name, input size, batch norms, folded ones
NETWORKS = [
    ("torchvision/resnet18", 32, 20, 20),
    ("torchvision/mobilenet_v2", 32, 52, 52),
    ("torchvision/regnet_y_400mf", 32, 53, 53),
    ("torchvision/mnasnet0_5", 32, 52, 52),
    ("torchvision/densenet121", 32, 121, 59),
    ("timm/efficientnet_lite0", 32, 49, 49),
    ("timm/tf_efficientnet_lite0", 32, 49, 49),
    ("timm/resnet18", 32, 20, 20),
    ("timm/regnetx_002", 32, 44, 44),
    ("timm/repvgg_a0", 32, 61, 44),
    ("timm/convnext_atto", 32, 0, 0),
    ("zoo/cifar10-resnet20", 32, 21, 21),
]


@pytest.mark.parametrize(("source", "size", "count", "expected"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_outputs_of_real_networks_stay_the_same(source: str, size: int, count: int, expected: int) -> None:
    model = open_model(source, pretrained=False, input_size=size)
    assert len(batch_norm_layers(model.module)) == count
    result, pairs = folded(model.module, model.example_images())
    assert len(pairs) == expected
    assert len(batch_norm_layers(result)) == count - expected


def test_only_what_normalises_a_layers_output_is_folded_in_densenet() -> None:
    model = open_model("torchvision/densenet121", pretrained=False, input_size=32)
    result, pairs = folded(model.module, model.example_images())
    assert ("features.norm0", "features.conv0") in pairs
    assert ("features.denseblock1.denselayer1.norm2", "features.denseblock1.denselayer1.conv1") in pairs
    kept = {name.rpartition(".")[2] for name in batch_norm_layers(result)}
    assert kept == {"norm", "norm1", "norm5"}


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2), lambda: nn.BatchNorm2d(4), (2, 4, 6, 6)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), lambda: nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), lambda: nn.BatchNorm3d(6), (2, 4, 4, 5, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2), lambda: nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, bias=False), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), lambda: nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (5, 4)),
    "without affine": (lambda: nn.Conv2d(4, 6, 1), lambda: nn.BatchNorm2d(6, affine=False), (2, 4, 6, 6)),
    "large epsilon": (lambda: nn.Conv2d(4, 6, 1), lambda: nn.BatchNorm2d(6, eps=0.3), (2, 4, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str) -> None:
    layer, norm, shape = LAYERS[kind]
    torch.manual_seed(0)
    result, pairs = folded(nn.Sequential(layer(), norm(), nn.ReLU(inplace=True)), torch.randn(shape))
    assert pairs == [("1", "0")]
    assert isinstance(result[1], nn.Identity)
    assert result[0].bias is not None


class Net(nn.Module):
    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _in_view(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, :1].mul_(2)
    return net.norm(y)


def _without_call(net: Net, x: Tensor) -> Tensor:
    return net.norm(functional.conv2d(x, net.conv.weight, net.conv.bias, padding=1))


def _read_later(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y


FOLDABLE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "relu after": lambda net, x: net.relu(net.norm(net.conv(x))),
    "identity between": lambda net, x: net.norm(net.same(net.conv(x))),
    "own operations after": lambda net, x: net.norm(net.conv(x)).mul_(2) + x,
}
NOT_FOLDABLE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "in-place relu between": lambda net, x: net.norm(net.relu(net.conv(x))),
    "another reader": _read_later,
    "two batch norms": lambda net, x: net.norm(y := net.conv(x)) + net.other(y),
    "batch norm first": lambda net, x: net.conv(net.norm(x)),
    "batch norm called twice": lambda net, x: net.norm(net.norm(net.conv(x))),
    "layer called twice": lambda net, x: net.norm(net.conv(net.conv(x))),
    "changed through a view": _in_view,
    "layer never called": _without_call,
    "view between": lambda net, x: net.norm(net.conv(x).transpose(2, 3)),
    "weights used elsewhere": lambda net, x: net.norm(net.conv(x)) * net.conv.weight.mean(),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_folded(case: str) -> None:
    assert folded(Net(FOLDABLE[case]), EXAMPLE)[1] == [("norm", "conv")]


@pytest.mark.parametrize("case", NOT_FOLDABLE)
def test_not_folded(case: str) -> None:
    result, pairs = folded(Net(NOT_FOLDABLE[case]), EXAMPLE)
    assert pairs == []
    assert isinstance(result.get_submodule("norm"), nn.BatchNorm2d)


def test_an_output_of_the_network_is_not_folded_away() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, self.norm(y)

    assert fold_batch_norms(Both().eval(), EXAMPLE) == []


class ScaledConv(nn.Conv2d):
    """Standardises its weight in each call."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True), self.bias)


class ActivatedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class SamePaddedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (0, 1, 0, 1)))


def test_only_plain_use_of_weights_is_folded() -> None:
    for layer, expected in (
        (SamePaddedConv(4, 4, 3), [("1", "0")]),
        (ScaledConv(4, 4, 3), []),
        (ActivatedConv(4, 4, 3), []),
        (parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), []),
    ):
        assert folded(nn.Sequential(layer, nn.BatchNorm2d(4)), EXAMPLE)[1] == expected


def test_tied_weights_are_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    network[2].weight = network[0].weight
    assert folded(network, EXAMPLE)[1] == []


def test_linear_on_tokens_is_not_folded() -> None:
    # There batch norm takes the tokens for channels.
    assert folded(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), torch.randn(2, 6, 6))[1] == []


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: normalise, then drop and activation modules."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class BatchNormTanh(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def test_a_built_in_activation_stays_behind_under_its_name() -> None:
    result, pairs = folded(nn.Sequential(nn.Conv2d(4, 4, 3), BatchNormAct(4), nn.Conv2d(4, 4, 3)), EXAMPLE)
    assert pairs == [("1", "0")]
    assert [name for name, _ in result.named_modules()] == ["", "0", "1", "1.drop", "1.act", "2"]
    assert isinstance(result[1].act, nn.ReLU)
    assert folded(nn.Sequential(nn.Conv2d(4, 4, 3), BatchNormTanh(4)), EXAMPLE)[1] == []


def test_statistics_of_the_batch_are_not_folded() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batch_norms(network, EXAMPLE) == []


def test_targets_are_the_running_statistics_by_name() -> None:
    network = randomize(
        nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(BatchNormAct(4), nn.GroupNorm(2, 4)), nn.BatchNorm2d(4))
    )
    network.append(nn.BatchNorm2d(4, track_running_stats=False))
    targets = batch_norm_targets(network)
    assert list(targets) == ["0", "1.0", "2"]
    assert torch.equal(targets["1.0"].mean, network[1][0].running_mean)
    assert torch.equal(targets["1.0"].variance, network[1][0].running_var)
    assert list(batch_norm_layers(network)) == ["0", "1.0", "2", "3"]
