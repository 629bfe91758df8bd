"""What every synthesis method promises, whoever adds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import State

from synthquant.core.errors import InputError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.store import ImageSetWriter
from synthquant.methods import SYNTHESIZERS, Synthesizer
from synthquant.models.float_model import FloatModel
from synthquant.recipe import build_method, method_settings

# The least work that still is the method; a method without these fields gets its defaults.
SMALL = {"iterations": 2, "batch_size": 4, "latent_size": 8}


def small(name: str) -> Synthesizer:
    fields: dict[str, Any] = SYNTHESIZERS.get(name).model_fields  # type: ignore[attr-defined]
    return build_method(SYNTHESIZERS, name, {key: value for key, value in SMALL.items() if key in fields}, name)


def pixels(images: ImageSet) -> torch.Tensor:
    return torch.stack([images[index].image for index in range(len(images))])


@pytest.fixture(params=SYNTHESIZERS.names())
def method(request: pytest.FixtureRequest) -> Synthesizer:
    return small(request.param)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_makes_exactly_the_count_of_the_networks_size(method: Synthesizer, model: FloatModel, count: int) -> None:
    images = method.synthesize(model, count, Rng(0))
    assert len(images) == count
    assert pixels(images).shape == (count, 3, *model.preprocess.input_size)
    assert torch.isfinite(pixels(images).float()).all()


def test_refuses_to_make_none(method: Synthesizer, model: FloatModel) -> None:
    with pytest.raises(InputError):
        method.synthesize(model, 0, Rng(0))


def test_leaves_the_network_as_it_was(method: Synthesizer, model: FloatModel, state: Callable[[], State]) -> None:
    before = state()
    method.synthesize(model, 5, Rng(0))
    assert state() == before


def test_the_same_seed_gives_the_same_images_and_another_seed_others(method: Synthesizer, model: FloatModel) -> None:
    first, second, other = (pixels(method.synthesize(model, 6, Rng(seed))) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_leaves_the_global_random_state_alone(method: Synthesizer, model: FloatModel) -> None:
    before = torch.random.get_rng_state()
    method.synthesize(model, 5, Rng(0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", SYNTHESIZERS.names())
def test_finished_parts_are_skipped_and_the_rest_is_the_same(name: str, model: FloatModel, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    class Writer(ImageSetWriter):
        def append(self, *args: Any, **kwargs: Any) -> None:
            super().append(*args, **kwargs)
            if self.finished_parts == 1:
                raise Stop

    def writer(folder: str, kind: type[ImageSetWriter] = ImageSetWriter) -> ImageSetWriter:
        return kind(
            tmp_path / folder,
            method=name,
            settings=method_settings(small(name)),
            seed=0,
            model_fingerprint=model.fingerprint,
            image_size=model.preprocess.input_size,
            target_count=10,
        )

    whole = small(name).synthesize(model, 10, Rng(0), writer=writer("whole"))
    with pytest.raises(Stop):
        small(name).synthesize(model, 10, Rng(0), writer=writer("killed", Writer))
    resumed = small(name).synthesize(model, 10, Rng(0), writer=writer("killed"))
    assert resumed.manifest == whole.manifest
    assert [part.count for part in whole.manifest.parts] == [4, 4, 2]
    assert torch.equal(pixels(whole), pixels(small(name).synthesize(model, 10, Rng(0))))
