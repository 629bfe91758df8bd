"""Genie-D (arXiv:2212.04780) against the authors' algorithm in plain PyTorch: generator, and every step of a batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.rng import Rng
from synthquant.data.preprocess import model_inputs
from synthquant.models.float_model import FloatModel
from synthquant.synthesize.generator import GENIE_WIDTHS, LIGHT_WIDTHS, Generator
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.inversion import InvertedNetwork, Objective
from synthquant.synthesize.swing import SwingOffsets

MakeModel = Callable[..., FloatModel]

LATENT, BATCH, ITERATIONS = 8, 6, 14


class PlainGenerator(nn.Module):
    """Layer after layer as the paper's appendix and its code have them, and a crop for sizes that do not divide.

    Without a latent size it begins behind the linear layer.
    """

    def __init__(self, latent_size: int | None, size: tuple[int, int], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.start, self.linear = size, widths[0], latent_size is not None
        step = 2 ** len(widths)
        height, width = -(-size[0] // step), -(-size[1] // step)
        layers: list[nn.Module] = []
        if latent_size is not None:
            layers += [nn.Linear(latent_size, self.start * height * width)]
            layers += [nn.Unflatten(1, (self.start, height, width))]
        layers += [nn.BatchNorm2d(self.start)]
        for inner, outer in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inner, outer, 3, padding=1)]
            layers += [nn.BatchNorm2d(outer), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Upsample(scale_factor=2), nn.Conv2d(widths[-1], 3, 3, padding=1))
        self.norm = nn.BatchNorm2d(3, affine=False)

    def forward(self, latents: Tensor) -> Tensor:
        images = self.layers(latents)
        top, left = ((have - want) // 2 for have, want in zip(images.shape[2:], self.size, strict=True))
        return self.norm(torch.tanh(images[:, :, top : top + self.size[0], left : left + self.size[1]]))

    def pairs(self, generator: Generator) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Its parameters beside the package's."""
        others: list[nn.Module] = [] if generator.linear is None else [generator.linear]
        for norm, conv in zip(generator.norms, generator.convs, strict=True):
            others += [norm, conv]
        layers = [layer for layer in self.layers if next(layer.parameters(), None) is not None]
        both = zip(layers, others, strict=True)
        return [(layer.get_parameter(n), other.get_parameter(n)) for layer, other in both for n in ("weight", "bias")]

    def take(self, generator: Generator) -> None:
        """Its values; the linear layer's outputs are ordered channels-last there."""
        _, height, width = generator.start_shape
        with torch.no_grad():
            for index, (mine, theirs) in enumerate(self.pairs(generator)):
                mine.copy_(self.renamed(theirs, height, width) if self.linear and index < 2 else theirs)

    def renamed(self, values: Tensor, height: int, width: int) -> Tensor:
        return values.view(height, width, self.start, -1).permute(2, 0, 1, 3).reshape(values.shape)


@pytest.mark.parametrize(("latent_size", "widths"), [(LATENT, GENIE_WIDTHS), (None, LIGHT_WIDTHS)])
@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_generator_equals_its_layers_in_plain_torch(
    size: tuple[int, int], latent_size: int | None, widths: tuple[int, ...]
) -> None:
    generator = Generator(latent_size, (3, *size), widths, torch.device("cpu"))
    plain = PlainGenerator(latent_size, size, widths)
    generator.reset(torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source) * 0.2)
    plain.take(generator)
    latents = torch.randn(5, *generator.latent_shape, generator=source).requires_grad_()
    found, wanted = generator(latents), plain(latents)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    weight = torch.randn(found.shape, generator=source)
    pairs = plain.pairs(generator)
    gradients = torch.autograd.grad((found * weight).sum(), [latents, *(theirs for _, theirs in pairs)])
    slow = torch.autograd.grad((wanted * weight).sum(), [latents, *(mine for mine, _ in pairs)])
    for gradient, expected in zip(gradients, slow, strict=True):
        if generator.linear is not None and len(gradient) == generator.linear.out_features:
            gradient = plain.renamed(gradient, *generator.start_shape[1:])
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()) + 1e-4)


class Strided(nn.Module):
    """A strided convolution and a strided shortcut, each behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.short, self.bn3 = nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        return (self.bn2(self.conv2(x)) + self.bn3(self.short(x))).mean((2, 3))


def swung(x: Tensor, offset: Tensor) -> Tensor:
    """Swing convolution, section 3.1: reflect-pad by 1, crop back at an offset."""
    (dy, dx), (height, width) = offset.tolist(), x.shape[2:]
    return F.pad(x, (1, 1, 1, 1), mode="reflect")[:, :, dy : dy + height, dx : dx + width]


def slow_loss(net: Strided, images: Tensor, offsets: Tensor) -> Tensor:
    """Batch statistics at the input of each batch norm, averaged over channels, and each image's own."""
    x1 = net.conv1(images)
    inner = net.bn1(x1).relu()
    x2, x3 = net.conv2(swung(inner, offsets[0])), net.short(swung(inner, offsets[1]))
    loss = torch.zeros(())
    for x, norm in ((x1, net.bn1), (x2, net.bn2), (x3, net.bn3)):
        assert norm.running_mean is not None and norm.running_var is not None
        of_means = (x.mean((0, 2, 3)) - norm.running_mean) ** 2
        of_deviations = (x.std((0, 2, 3)) - (norm.running_var + 1e-6).sqrt()) ** 2
        loss = loss + of_means.mean() + of_deviations.mean()
    of_images = images.mean((2, 3)).norm(dim=1) ** 2 + (images.std((2, 3)) - 1).norm(dim=1) ** 2
    return loss + of_images.mean()


def test_every_step_of_a_batch_is_the_paper_s(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = make_model(Strided(), (8, 8))
    net = model.module
    assert isinstance(net, Strided)
    losses: list[float] = []
    offsets: list[Tensor] = []
    loss_of, draw = InvertedNetwork.loss, SwingOffsets.draw

    def kept_loss(self: InvertedNetwork, images: Tensor, objective: Objective) -> Tensor:
        loss = loss_of(self, images, objective)
        losses.append(float(loss.detach()))
        return loss

    def kept_offsets(self: SwingOffsets, generator: torch.Generator) -> None:
        draw(self, generator)
        offsets.append(self.offsets.clone())

    monkeypatch.setattr(InvertedNetwork, "loss", kept_loss)
    monkeypatch.setattr(SwingOffsets, "draw", kept_offsets)
    # Both rates fall within these iterations.
    method = GenieD(untrained=True,
        batch_size=BATCH, iterations=ITERATIONS, latent_size=LATENT, latent_lr=0.8, latent_patience=1,
        generator_lr=0.03, generator_decay=0.5, generator_decay_every=4,
    )  # fmt: skip
    found = model_inputs(method.synthesize(model, BATCH, Rng(0)), model.preprocess)
    assert len(offsets) == ITERATIONS and len({tuple(one.flatten().tolist()) for one in offsets}) > 5

    source = Rng(0).child("batch-0")
    start = Generator(LATENT, (3, 8, 8), GENIE_WIDTHS, torch.device("cpu"))
    start.reset(source.generator("generator"))
    generator = PlainGenerator(LATENT, (8, 8), GENIE_WIDTHS)
    generator.take(start)
    latents = torch.randn(BATCH, LATENT, generator=source.generator("latents")).requires_grad_()
    of_latents, of_generator = torch.optim.Adam([latents], lr=0.8), torch.optim.Adam(generator.parameters(), lr=0.03)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(of_latents, patience=1, factor=0.1, min_lr=1e-4)
    decay = torch.optim.lr_scheduler.StepLR(of_generator, step_size=4, gamma=0.5)
    slow: list[float] = []
    for offset in offsets:
        images = generator(latents)
        loss = slow_loss(net, images, offset)
        of_latents.zero_grad()
        of_generator.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        of_latents.step()
        of_generator.step()
        plateau.step(loss.item())
        decay.step()
        slow.append(loss.item())
    assert of_latents.param_groups[0]["lr"] < 0.1, "the rate of the latents fell"
    assert losses == pytest.approx(slow, rel=2e-3)
    torch.testing.assert_close(found, images.detach(), rtol=0, atol=0.05)
