"""Contact sheets: which images are picked and how they look."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.report.sheet import make_sheet


def numbered(count: int, labels: Tensor | None = None, side: int = 4) -> ImageSet:
    """Grey images whose value is their number."""
    values = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet.from_tensors(values.expand(-1, 3, side, side).contiguous(), labels=labels)


def pictures(sheet_uris: list[str]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))) for uri in sheet_uris]


def numbers(images: ImageSet, **options: object) -> list[int]:
    sheet = make_sheet(images, None, **options)  # type: ignore[arg-type]  # options by name
    return [picture.getpixel((0, 0))[0] for picture in pictures([thumbnail.uri for thumbnail in sheet.thumbnails])]


def test_without_labels_they_are_evenly_spaced() -> None:
    assert numbers(numbered(10), count=5) == [0, 2, 4, 6, 8]
    assert numbers(numbered(3), count=5) == [0, 1, 2]


def test_classes_take_turns_and_stand_in_order() -> None:
    labels = torch.tensor([2, 2, 2, 0, 1, 1, 0, 2])
    assert numbers(numbered(8, labels), count=5) == [3, 6, 4, 5, 0]
    assert numbers(numbered(8, labels), count=20) == [3, 6, 4, 5, 0, 1, 2, 7]


def test_many_classes_give_one_image_each_and_can_be_chosen() -> None:
    labels = torch.arange(50) % 25
    assert numbers(numbered(50, labels), count=5) == [0, 5, 10, 15, 20]
    assert numbers(numbered(50, labels), count=4, classes=(7, 3)) == [3, 28, 7, 32]
    assert numbers(numbered(50, labels), count=6, classes=(24, 99)) == [0, 6, 12, 18, 24, 49]


def test_captions_are_class_names() -> None:
    sheet = make_sheet(numbered(3, torch.tensor([0, 1, 5])), None, ("apple, fruit", "ball"))
    assert [thumbnail.caption for thumbnail in sheet.thumbnails] == ["apple", "ball", "class 5"]
    assert sheet.classes == (0, 1, 5) and sheet.total == 3 and sheet.clipped == 0.0


def test_values_outside_the_range_are_cut_off_and_counted() -> None:
    images = torch.full((2, 3, 2, 2), 0.5)
    images[0, 0] = 1.5
    images[1, 2] = -0.25
    sheet = make_sheet(ImageSet.from_tensors(images, dtype="float16"), None)
    first, second = pictures([thumbnail.uri for thumbnail in sheet.thumbnails])
    assert first.getpixel((0, 0)) == (255, 128, 128) and second.getpixel((0, 0)) == (128, 128, 0)
    assert sheet.clipped == pytest.approx(8 / 24)


def test_small_images_stay_exact_and_large_ones_shrink() -> None:
    small = make_sheet(numbered(1, side=32), None).thumbnails[0]
    large = make_sheet(numbered(1, side=300), None).thumbnails[0]
    assert small.pixelated and small.uri.startswith("data:image/png")
    assert not large.pixelated and large.uri.startswith("data:image/jpeg")
    assert pictures([small.uri, large.uri])[0].size == (32, 32)
    assert pictures([small.uri, large.uri])[1].size == (128, 128)


def test_raw_images_are_shown_as_the_network_sees_them() -> None:
    images = torch.zeros(1, 3, 20, 40, dtype=torch.uint8)
    images[..., :10] = 255  # cropped away
    preprocess = Preprocess(input_size=(20, 20), resize=20, mean=(0.5,) * 3, std=(0.5,) * 3)
    sheet = make_sheet(ImageSet.from_tensors(images, framing="raw"), preprocess)
    (picture,) = pictures([thumbnail.uri for thumbnail in sheet.thumbnails])
    assert picture.size == (20, 20) and picture.getextrema() == ((0, 0),) * 3


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 0 images could be read"):
        make_sheet(ImageSet.from_tensors(torch.zeros(0, 3, 4, 4, dtype=torch.uint8)), None)


@pytest.mark.parametrize(
    ("channels", "size", "said"),
    [
        (1, (2, 2), ""),
        (2, (4, 2), "2 channels: each in grey"),
        (3, (2, 2), ""),
        (4, (4, 2), "4 channels: the first three as colours, then each further one in grey"),
        (5, (4, 4), "5 channels: the first three as colours, then each further one in grey"),
    ],
)
def test_images_of_other_channels_show_all_of_them(channels: int, size: tuple[int, int], said: str) -> None:
    images = (torch.arange(channels).view(1, -1, 1, 1) * 50).expand(1, -1, 2, 2).to(torch.uint8)
    sheet = make_sheet(ImageSet.from_tensors(images), None)
    (picture,) = pictures([thumbnail.uri for thumbnail in sheet.thumbnails])
    assert picture.size == size and sheet.channels == said
    panels = [picture.getpixel((x, y)) for y in range(0, size[1], 2) for x in range(0, size[0], 2)]
    assert (
        panels
        == {
            1: [(0, 0, 0)],
            2: [(0, 0, 0), (50, 50, 50)],
            3: [(0, 50, 100)],
            4: [(0, 50, 100), (150, 150, 150)],
            5: [(0, 50, 100), (150, 150, 150), (200, 200, 200), (255,) * 3],
        }[channels]
    )
