from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.synthesize.swing import SwingOffsets, swing

OFFSETS = [(dy, dx) for dy in range(3) for dx in range(3)]


def padded_and_cropped(images: Tensor, dy: int, dx: int) -> Tensor:
    height, width = images.shape[2:]
    return F.pad(images, (1, 1, 1, 1), mode="reflect")[:, :, dy : dy + height, dx : dx + width]


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (2, 3)])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_swing_equals_pad_and_crop(size: tuple[int, int], offset: tuple[int, int], channels_last: bool) -> None:
    images = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    found, expected = swing(images, torch.tensor(offset)), padded_and_cropped(images, *offset)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * weight).sum(), images)
    (slow_gradient,) = torch.autograd.grad((expected * weight).sum(), images)
    torch.testing.assert_close(gradient, slow_gradient)


@pytest.mark.parametrize("offset", OFFSETS)
def test_axis_of_length_one_stays(offset: tuple[int, int]) -> None:
    images = torch.randn(2, 4, 1, 5).requires_grad_()
    found = swing(images, torch.tensor(offset))
    torch.testing.assert_close(found, swing(images, torch.tensor((1, offset[1]))))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert float(gradient.sum()) == pytest.approx(found.numel())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1, 2))


def test_only_strided_convolutions_swing_each_by_its_own_offset() -> None:
    plain, swung = network(), network()
    offsets = SwingOffsets(swung, torch.device("cpu"))
    assert offsets.offsets.shape == (2, 2)
    images = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(swung(images), plain(images))  # the middle offset is the plain convolution
    offsets.offsets.copy_(torch.tensor([[0, 2], [2, 1]]))
    x = plain[1](padded_and_cropped(plain[0](images), 0, 2))
    torch.testing.assert_close(swung(images), plain[2](padded_and_cropped(x, 2, 1)))


def test_offsets_are_drawn_from_the_generator_and_cover_all() -> None:
    one, other = (SwingOffsets(network(), torch.device("cpu")) for _ in range(2))
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    seen = set()
    for _ in range(100):
        one.draw(first)
        other.draw(second)
        assert torch.equal(one.offsets, other.offsets)
        seen.update((dy, dx) for dy, dx in one.offsets.tolist())
    assert seen == set(OFFSETS)
