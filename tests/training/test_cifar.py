from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cifar import crop_and_flip, cut_out, load, mix, recolour, warp


def test_halves_share_nothing_and_make_the_whole(images: Path) -> None:
    whole, labels = load(images)
    first, second = load(images, "first"), load(images, "second")
    assert whole.dtype == torch.uint8 and whole.shape == (40, 3, 32, 32)
    assert torch.equal(torch.cat([first[0], second[0]]), whole)
    assert torch.equal(torch.cat([first[1], second[1]]), labels)
    assert len(load(images, "second", limit=10)[0]) == 5


def test_crop_and_flip_takes_windows_of_the_padded_image() -> None:
    torch.manual_seed(0)
    images = torch.rand(20, 3, 8, 8)
    padded = torch.nn.functional.pad(images, (2,) * 4, mode="reflect")
    for number, crop in enumerate(crop_and_flip(images, pad=2)):
        windows = [padded[number, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(torch.equal(crop, window) or torch.equal(crop, window.flip(2)) for window in windows)


def test_augmentation_changes_each_image_by_itself_and_stays_in_range() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16).expand(8, 3, 16, 16).contiguous()
    changed = recolour(warp(images, probability=1.0))
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1
    assert not any(torch.equal(changed[0], other) for other in changed[1:])
    torch.testing.assert_close(warp(images, probability=0.0), images)


def test_cut_out_paints_one_square() -> None:
    torch.manual_seed(0)
    painted = cut_out(torch.zeros(50, 3, 16, 16), 6, torch.ones(1, 3, 1, 1))
    areas = painted[:, 0].sum((1, 2))
    assert areas.max() == 36 and areas.min() >= 9


@pytest.mark.parametrize("seed", range(6))
def test_mix_weighs_labels_by_what_is_seen(seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.arange(1.0, 5.0)
    mixed, order, share = mix(values.view(4, 1, 1, 1).expand(4, 3, 32, 32).contiguous())
    expected = share * values + (1 - share) * values[order]
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)
