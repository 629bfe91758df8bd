from __future__ import annotations

import torch

from synthquant.synthesize.flaws import SeenImages, black, constant, thumbnails


def test_black_and_plain_images_are_found_and_dark_ones_are_not() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    images[1] = 0
    images[2] = torch.tensor([200, 10, 90], dtype=torch.uint8).view(3, 1, 1)
    images[3] = images[3] // 8  # dark, up to 31
    images[4] = 120 + images[4] % 5  # of one colour but for noise
    assert black(images).tolist() == [False, True, False, False, False]
    assert constant(images).tolist() == [False, True, True, False, True]


def test_thumbnails_are_mean_colours() -> None:
    images = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).remainder(256).to(torch.uint8)
    small = thumbnails(images).view(2, 3, 8, 8)
    expected = images.float().view(2, 3, 8, 2, 8, 2).mean((3, 5)).round()
    assert torch.equal(small.float(), expected)


def test_nearly_the_same_image_of_a_class_is_known_again() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    seen = SeenImages()
    for row in thumbnails(images):
        assert not seen.holds(3, row)
        seen.add(3, row)
    nearly = (images[2].int() + torch.randint(-2, 3, images[2].shape)).clamp(0, 255).to(torch.uint8)
    assert seen.holds(3, thumbnails(nearly[None])[0])
    assert not seen.holds(4, thumbnails(nearly[None])[0])  # another class
    assert not seen.holds(3, thumbnails(images[2].flip(2)[None])[0])
