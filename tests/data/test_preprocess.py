from __future__ import annotations

import pytest
import timm.data
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from synthquant.core.errors import DataError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Interpolation, Preprocess, input_batches, model_inputs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    small = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0]
    noisy = smooth + 0.1 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed + 1))
    return noisy.clamp(0, 1).mul(255).to(torch.uint8)


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy().copy())


SIZES = [(292, 389), (389, 292), (300, 301), (224, 224), (256, 256), (97, 500), (31, 33)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_equals_torchvision(size: tuple[int, int], interpolation: Interpolation) -> None:
    reference = transforms.Compose(
        [
            transforms.Resize(256, InterpolationMode(interpolation)),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    preprocess = Preprocess(input_size=(224, 224), resize=256, mean=MEAN, std=STD, interpolation=interpolation)
    image = _image(*size)
    assert torch.equal(preprocess([image], "raw")[0], reference(_picture(image)))


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize(("crop_pct", "interpolation"), [(0.875, "bicubic"), (0.95, "bilinear"), (1.0, "bicubic")])
def test_equals_timm(size: tuple[int, int], crop_pct: float, interpolation: Interpolation) -> None:
    reference = timm.data.create_transform(
        (3, 224, 224), interpolation=interpolation, crop_pct=crop_pct, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    preprocess = Preprocess(
        input_size=(224, 224),
        resize=int(224 / crop_pct),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation=interpolation,
    )
    image = _image(*size)
    assert torch.equal(preprocess([image], "raw")[0], reference(_picture(image)))


@pytest.mark.parametrize("size", [(20, 50), (50, 20), (20, 21), (64, 64), (33, 40)])
def test_crop_without_resize_pads_and_rounds_as_torchvision(size: tuple[int, int]) -> None:
    preprocess = Preprocess(input_size=(32, 33), mean=(0.0,) * 3, std=(1.0,) * 3)
    reference = transforms.Compose([transforms.CenterCrop((32, 33)), transforms.ToTensor()])
    image = _image(*size)
    assert torch.equal(preprocess([image], "raw")[0], reference(_picture(image)))


def test_exact_resize_squashes() -> None:
    preprocess = Preprocess(input_size=(24, 48), resize=(24, 48), mean=(0.0,) * 3, std=(1.0,) * 3, crop=False)
    reference = transforms.Compose([transforms.Resize((24, 48)), transforms.ToTensor()])
    image = _image(70, 90)
    assert torch.equal(preprocess([image], "raw")[0], reference(_picture(image)))


def test_without_crop_the_input_size_is_met_anyway() -> None:
    preprocess = Preprocess(input_size=(24, 48), mean=(0.0,) * 3, std=(1.0,) * 3, crop=False)
    assert preprocess([_image(70, 90)], "raw").shape == (1, 3, 24, 48)


def test_cropped_images_of_the_right_size_are_only_normalised() -> None:
    preprocess = Preprocess(input_size=(8, 8), resize=16, mean=MEAN, std=STD)
    image = _image(8, 8)
    expected = (image.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(preprocess([image], "cropped")[0], expected)
    floats = torch.randn(2, 3, 8, 8).half()
    assert torch.equal(preprocess(floats, "cropped"), preprocess.normalize(floats.float()))


def test_cropped_images_of_another_size_are_resized_whole() -> None:
    preprocess = Preprocess(input_size=(16, 16), resize=20, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = _image(64, 64)
    reference = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    assert torch.equal(preprocess([image], "cropped")[0], reference(_picture(image)))


def test_floats_are_resized_like_bytes_and_keep_their_range() -> None:
    preprocess = Preprocess(input_size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    image = _image(64, 64)
    floats = preprocess([(image.float() / 255).half()], "cropped")
    # Half a step of 1/255 from the rounding of bytes, and float16's own rounding.
    assert (floats - preprocess([image], "cropped")).abs().max() < 0.5 / 255 + 1e-3
    wide = preprocess([torch.full((3, 64, 64), 3.5).half()], "cropped")
    assert torch.allclose(wide, torch.full((1, 3, 16, 16), 3.5))


def test_normalize_and_pixels_are_inverse_and_differentiable() -> None:
    preprocess = Preprocess(input_size=(4, 4), mean=MEAN, std=STD)
    with torch.inference_mode():
        preprocess.normalize(torch.rand(1, 3, 4, 4))  # must not leave inference tensors behind in the cache
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    back = preprocess.pixels(preprocess.normalize(pixels))
    assert torch.allclose(back, pixels, atol=1e-6)
    preprocess.normalize(pixels).sum().backward()
    assert pixels.grad is not None
    assert torch.allclose(pixels.grad[0, :, 0, 0], 1 / torch.tensor(STD))
    assert preprocess.normalize(pixels.double()).dtype == torch.float64


def test_batches_of_a_set() -> None:
    images = torch.stack([_image(8, 8, seed) for seed in range(5)])
    image_set = ImageSet.from_tensors(images, torch.arange(5))
    preprocess = Preprocess(input_size=(8, 8), mean=MEAN, std=STD)
    expected = preprocess(images, "cropped")
    assert torch.equal(model_inputs(image_set, preprocess, batch_size=2), expected)
    assert torch.equal(model_inputs(image_set, preprocess, indices=[4, 1]), expected[[4, 1]])
    batches = list(input_batches(image_set, preprocess, 2))
    assert [len(batch.inputs) for batch in batches] == [2, 2, 1]
    assert [batch.indices for batch in batches] == [[0, 1], [2, 3], [4]]
    assert all(batch.labels is not None and batch.labels.tolist() == batch.indices for batch in batches)


def test_no_usable_image_is_an_error() -> None:
    image_set = ImageSet.from_tensors(_image(8, 8)[None])
    with pytest.raises(DataError, match="no usable image among 0"):
        model_inputs(image_set, Preprocess(input_size=(8, 8), mean=MEAN, std=STD), indices=[])


def test_empty_batch_has_the_right_shape() -> None:
    assert Preprocess(input_size=(8, 9), mean=MEAN, std=STD)([], "raw").shape == (0, 3, 8, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"std": (0.2, 0.0, 0.2)}, "greater than or equal to 0.0001"),
        ({"input_size": (0, 8)}, "greater than or equal to 1"),
        ({"resize": 0}, "greater than or equal to 1"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"interpolation": "magic"}, "interpolation"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Preprocess.model_validate({"input_size": (8, 8), "mean": MEAN, "std": STD, **fields})


def test_survives_json() -> None:
    preprocess = Preprocess(input_size=(8, 8), resize=(9, 10), mean=MEAN, std=STD)
    assert Preprocess.model_validate_json(preprocess.model_dump_json()) == preprocess


def test_limits_are_black_and_white_of_the_widest_channel() -> None:
    preprocess = Preprocess(input_size=(4, 4), mean=(0.5, 0.4, 0.5), std=(0.5, 0.2, 0.25))
    black, white = preprocess.normalize(torch.zeros(3, 1, 1)), preprocess.normalize(torch.ones(3, 1, 1))
    assert preprocess.limits == pytest.approx((float(black.min()), float(white.max())))


def test_what_no_picture_holds_is_cut_off_channel_by_channel() -> None:
    preprocess = Preprocess(input_size=(1, 3), mean=MEAN, std=STD)
    pixels = torch.tensor([-0.5, 0.3, 1.5]).expand(2, 3, 1, 3)
    found = preprocess.cut_off(preprocess.normalize(pixels))
    assert torch.allclose(found, preprocess.normalize(pixels.clamp(0, 1)), atol=1e-6)
    picture = preprocess.normalize(torch.tensor([0.0, 77 / 255, 1.0]).expand(2, 3, 1, 3))
    assert torch.equal(preprocess.cut_off(picture), picture)


def test_long_and_narrow_images_are_no_bombs() -> None:
    """A million pixels in a row, resized to 256 at the short side, would be 65 thousand million."""
    preprocess = Preprocess(input_size=(224, 224), resize=256, mean=MEAN, std=STD)
    images = torch.zeros(1, 3, 1, 10**6, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"^too long and narrow: 1000000x1 would be resized to 256000000x256$"):
        preprocess.fit(images[0], "raw")
    narrow = ImageSet.from_tensors(images, framing="raw")
    assert list(input_batches(narrow, preprocess)) == []
    assert [entry.reason[:19] for entry in narrow.set_aside] == ["too long and narrow"]
