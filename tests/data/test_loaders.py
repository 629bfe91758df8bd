"""Loaders of a user are read once, and what they give is checked, not guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from synthquant.core.errors import DataError
from synthquant.data.loaders import read_loader
from synthquant.data.preprocess import Preprocess

PIXELS = torch.randint(0, 256, (10, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(10) % 4
PREPROCESS = Preprocess(input_size=(6, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


class Pictures(Dataset[Any]):
    """Pillow's images with whole numbers, as torchvision's sets without a transform."""

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(PIXELS[index].permute(1, 2, 0).numpy())), int(LABELS[index])


def floats(images: torch.Tensor = PIXELS) -> torch.Tensor:
    return images.float() / 255


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4),
        DataLoader(TensorDataset(floats(), LABELS), batch_size=3),
        TensorDataset(floats(), LABELS),
        Pictures(),
        [{"pixel_values": PIXELS[:7], "labels": LABELS[:7]}, {"image": PIXELS[7:], "label": LABELS[7:]}],
    ],
    ids=["uint8", "floats", "dataset", "pictures", "dictionaries"],
)
def test_the_same_images_whatever_gives_them(loader: Any) -> None:
    images = read_loader(loader)
    assert torch.equal(torch.stack([images[index].image for index in range(10)]), PIXELS)
    assert images.labels is not None and torch.equal(images.labels, LABELS)
    assert images.fingerprint == read_loader([(PIXELS, LABELS)]).fingerprint
    assert images.fingerprint != read_loader([(PIXELS.flip(0), LABELS)]).fingerprint
    assert len(read_loader(loader, count=5)) == 5


def test_a_loader_that_draws_anew_is_read_once() -> None:
    images = read_loader(DataLoader(TensorDataset(PIXELS), batch_size=4, shuffle=True))
    (first,), (second,) = images.batches(10), images.batches(10)
    assert images.labels is None and torch.equal(torch.stack(first.images), torch.stack(second.images))


def test_normalisation_is_undone_where_it_is_named() -> None:
    images = read_loader([(PREPROCESS.normalize(floats()), LABELS, "more")], preprocess=PREPROCESS)
    assert torch.equal(torch.stack([images[index].image for index in range(10)]), PIXELS)


@pytest.mark.parametrize(
    ("loader", "settings", "said"),
    [
        ([PREPROCESS.normalize(floats())], {}, r"item 0 of the loader has values from -2 to .* give preprocess"),
        ([floats(), PIXELS.float()], {}, r"item 1 of the loader has values from 0 to 255, .*: divide them by 255"),
        ([floats() * torch.nan], {}, "has values from nan to nan"),
        ([floats()], {"preprocess": PREPROCESS}, "no image of the loader has a value below 0"),
        ([PIXELS], {"preprocess": PREPROCESS}, "no image of the loader has a value below 0"),
        ([-floats() * 9], {"preprocess": PREPROCESS}, "not normalised by that preprocess"),
        ([floats()[:, :1]], {"preprocess": PREPROCESS}, "images of 1 channels, and preprocess is for 3"),
        ([PIXELS.permute(0, 2, 3, 1)], {}, r"images of shape \[10, 6, 8, 3\] with the channels last"),
        ([(PIXELS[:, 0], LABELS)], {}, r"item 0 of the loader has 10 labels and one image"),
        ([PIXELS[0, 0]], {}, r"images of shape \[6, 8\]; give \[B, channels, H, W\]"),
        ([PIXELS.long()], {}, r"torch.int64 images; give uint8"),
        ([(PIXELS, LABELS[:4])], {}, "has 4 labels for 10 images"),
        ([PIXELS, PIXELS[..., :4]], {}, r"item 1 of the loader has images \[3, 6, 4\], those before \[3, 6, 8\]"),
        ([{"pixels": PIXELS}], {}, "item 0 of the loader has a NoneType where images are expected"),
        ([], {}, "the loader gives no images"),
        (PIXELS[:, 0], {}, r"a Tensor of shape \[10, 6, 8\] is no set of images; .* unsqueeze\(1\)"),
        ([PIXELS[0].numpy()], {}, r"an array of shape \[3, 6, 8\]; give .* or a tensor"),
        ("images/", {}, "a str is no loader; .* open_images"),
        (3, {}, "a int is no loader"),
    ],
)  # fmt: skip
def test_what_is_no_batch_of_images_is_said(loader: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_loader(loader, **settings)


def test_pictures_of_several_sizes_are_framed_as_files_are() -> None:
    wide = np.ascontiguousarray(PIXELS[0].permute(1, 2, 0).numpy())
    images = read_loader([Image.fromarray(wide), (wide[:, :4], np.int64(2)), (wide[..., 0], 1)])
    assert images.manifest.framing == "raw" and images.labels is not None and images.labels.tolist() == [-1, 2, 1]
    assert [list(images[index].image.shape) for index in range(3)] == [[3, 6, 8], [3, 6, 4], [1, 6, 8]]
    assert torch.equal(images[1].image, PIXELS[0, :, :, :4])
    (batch,) = images.batches(3)
    assert PREPROCESS(batch.images, "raw").shape == (3, 3, 6, 8)
    assert images.fingerprint != read_loader([Image.fromarray(wide), wide[:, :4], wide[..., 1]]).fingerprint


def test_one_tensor_or_array_is_a_set() -> None:
    for whole in (PIXELS, floats(), PIXELS.permute(0, 2, 3, 1).numpy(), (PIXELS, LABELS)):
        images = read_loader(whole)
        assert torch.equal(torch.stack([images[index].image for index in range(10)]), PIXELS)
        assert (images.labels is None) is not isinstance(whole, tuple)
