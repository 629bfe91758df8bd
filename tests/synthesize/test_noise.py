from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from synthquant.core.errors import InputError
from synthquant.core.rng import Rng
from synthquant.data.preprocess import model_inputs
from synthquant.models.float_model import FloatModel
from synthquant.synthesize.noise import Noise

MakeModel = Callable[..., FloatModel]


def test_noise_is_normal_after_normalisation(tiny: FloatModel) -> None:
    images = Noise(batch_size=30).synthesize(tiny, 100, Rng(0))
    assert len(images) == 100 and images.manifest.dtype == "float16"
    normalized = model_inputs(images, tiny.preprocess)
    deviation, mean = torch.std_mean(normalized, [0, 2, 3])
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=0.03)
    torch.testing.assert_close(deviation, torch.ones(3), rtol=0, atol=0.03)


def test_same_seed_same_images(tiny: FloatModel) -> None:
    first, second, other = (Noise(batch_size=4).synthesize(tiny, 6, Rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[i].image, second[i].image) for i in range(6))
    assert not torch.equal(first[0].image, other[0].image)
    assert not torch.equal(first[0].image, first[4].image)


def test_needs_no_batch_norm(make_model: MakeModel) -> None:
    assert not Noise.needs_batch_norm
    assert len(Noise().synthesize(make_model(nn.Conv2d(3, 2, 1), (5, 7)), 2, Rng(0))) == 2


def test_no_images_is_an_error(tiny: FloatModel) -> None:
    with pytest.raises(InputError, match="count is 0"):
        Noise().synthesize(tiny, 0, Rng(0))
