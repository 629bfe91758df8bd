from __future__ import annotations

import torch

from synthquant.finetune.augment import flip, shift


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_about_half_of_the_images_are_mirrored() -> None:
    images = torch.rand(200, 1, 2, 4, generator=source())
    found = flip(images, source(1))
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    assert ((found == images).flatten(1).all(1) | mirrored).all() and 70 < mirrored.sum() < 130


def test_images_move_by_whole_pixels_each_on_its_own_and_borders_are_mirrored() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8).repeat(300, 2, 1, 1)
    found = shift(image, 0.25, source())
    moves = (found[:, 0, 4, 4] - 36).round()
    assert len(set(moves.tolist())) == 25 and moves.abs().max() == 18
    still = found[(moves == 0)]
    assert len(still) and torch.equal(still, image[: len(still)])
    down = found[moves == 16][0, 0]  # two rows further: the last two rows are mirrored
    assert torch.equal(down[:6], image[0, 0, 2:]) and torch.equal(down[6], image[0, 0, 6])
    assert torch.equal(shift(image, 0.01, source()), image)
