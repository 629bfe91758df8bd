"""Images of other than three channels: kept as they are, and turned where a network asks for colours or grey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from synthquant.core.errors import DataError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess, model_inputs
from synthquant.data.sources import open_images


def noise(channels: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (count, channels, 6, 5), generator=generator, dtype=torch.uint8)


def preprocess(channels: int, size: tuple[int, int] = (6, 5)) -> Preprocess:
    return Preprocess(input_size=size, mean=tuple(0.1 * (c + 1) for c in range(channels)), std=(0.5,) * channels)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_a_set_keeps_its_channels(channels: int, dtype: str, tmp_path: Path) -> None:
    images = ImageSet.from_tensors(noise(channels), dtype=dtype)  # type: ignore[arg-type]
    saved = images.save(tmp_path / "set")
    assert all(torch.equal(saved[index].image, images[index].image) for index in range(3))
    statistics = saved.manifest.statistics
    assert statistics is not None and len(statistics.mean) == channels
    assert statistics.mean[-1] == pytest.approx(float(noise(channels)[:, -1].float().mean()) / 255, abs=1e-3)
    inputs = model_inputs(saved, preprocess(channels))
    wanted = noise(channels).float() / 255
    wanted = (wanted - 0.1 * torch.arange(1, channels + 1).view(-1, 1, 1)) / 0.5
    assert torch.allclose(inputs, wanted, atol=2e-3)
    limits = preprocess(channels).limits
    assert preprocess(channels).cut_off(wanted * 9).amin() == pytest.approx(limits[0])


def test_sizes_are_fitted_channel_by_channel() -> None:
    image = noise(4, 1)[0]
    fitted = preprocess(4, (3, 4)).fit(image, "cropped")
    for channel, found in zip(image, fitted, strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(channel.numpy()).resize((4, 3), 2)), found.numpy())


def test_colours_and_grey_are_turned_where_a_network_asks(tmp_path: Path) -> None:
    colours = noise(3, 1)[0]
    picture = Image.fromarray(colours.permute(1, 2, 0).numpy())
    (grey,) = preprocess(1).fit(colours, "cropped")
    assert np.array_equal(grey.numpy(), np.asarray(picture.convert("L")))
    assert torch.allclose(preprocess(1).fit(colours.half(), "cropped").float(), grey.float(), atol=0.6)
    Image.fromarray(grey.numpy()).save(tmp_path / "grey.png")
    inputs = model_inputs(open_images(tmp_path), preprocess(1))  # read as three equal channels
    assert torch.allclose(inputs[0, 0], (grey.float() / 255 - 0.1) / 0.5)
    assert torch.equal(preprocess(3).fit(grey[None], "cropped"), grey.expand(3, -1, -1))
    with pytest.raises(DataError, match="it has 3 channels, and the network takes 4"):
        preprocess(4).fit(colours, "cropped")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="mean has 1 values and std 2"):
        Preprocess(input_size=(2, 2), mean=(0.5,), std=(1, 1))
    with pytest.raises(DataError, match=r"must have shape \[N, channels, height, width\], got \[2, 0, 4, 4\]"):
        ImageSet.from_tensors(torch.zeros(2, 0, 4, 4))
