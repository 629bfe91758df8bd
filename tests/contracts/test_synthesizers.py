"""What every synthesis method promises, whoever adds it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import State
from tests.select.networks import Tokens, float_model
from tests.small_networks import small_float_model

from synthquant.core.errors import InputError
from synthquant.core.method_settings import build_method
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.store import ImageSetWriter
from synthquant.methods import SYNTHESIZERS, Synthesizer
from synthquant.models.float_model import FloatModel
from synthquant.synthesize.batches import makes_images, open_writer
from synthquant.synthesize.low_pass import low_passed

# The least work that still is the method; a method without these fields gets its defaults.
SMALL: dict[str, Any] = {"iterations": 2, "batch_size": 4, "latent_size": 8, "steps": 1, "height": 16, "width": 16}
NAMES = tuple(
    name
    for name, method in SYNTHESIZERS.items()
    if makes_images(method) and (name != "text_to_image" or importlib.util.find_spec("diffusers"))
)


@pytest.fixture
def needs(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Settings that methods do not go without, by method."""
    if "text_to_image" not in NAMES:
        return {}
    names = ["cat", "dog", "frog", "ship", "deer", "bird", "truck"]
    return {"text_to_image": {"generator": str(request.getfixturevalue("generator_folder")), "classes": names}}


def small(name: str, needs: dict[str, dict[str, Any]]) -> Synthesizer:
    fields: dict[str, Any] = SYNTHESIZERS.get(name).model_fields  # type: ignore[attr-defined]
    values = {key: value for key, value in SMALL.items() if key in fields}
    if "slack" in fields and fields["slack"].default is not None:
        values["slack"] = {"samples": 4}
    return build_method(SYNTHESIZERS, name, values | needs.get(name, {}), name)


def pixels(images: ImageSet) -> torch.Tensor:
    return torch.stack([images[index].image for index in range(len(images))])


@pytest.fixture(params=NAMES)
def method(request: pytest.FixtureRequest, needs: dict[str, dict[str, Any]]) -> Synthesizer:
    return small(request.param, needs)


@pytest.fixture
def model(method: Synthesizer, tmp_path: Path) -> FloatModel:
    """With batch norms, or with attention for a method that needs it."""
    if getattr(method, "needs_attention", False):
        return float_model(Tokens("fused"), "attentive")
    return small_float_model(tmp_path)


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


def test_the_low_pass_filter_is_the_last_thing_that_is_done(method: Synthesizer, model: FloatModel) -> None:
    plain = method.synthesize(model, 5, Rng(0))
    filtered = method.model_copy(update={"low_pass": 0.2}).synthesize(model, 5, Rng(0))  # type: ignore[attr-defined]
    assert "low_pass" not in plain.manifest.settings, "sets without it are the bytes they were"
    assert filtered.manifest.settings["low_pass"] == 0.2
    expected = low_passed(pixels(plain), 0.2).float()
    assert not torch.equal(expected, pixels(plain).float())
    levels = 255 if pixels(plain).dtype == torch.uint8 else 1  # unfiltered ones are stored in float16
    torch.testing.assert_close(pixels(filtered).float() / levels, expected / levels, rtol=0, atol=2e-3)


def test_finished_parts_are_skipped_and_the_rest_is_the_same(
    method: Synthesizer, model: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = (name for name, cls in SYNTHESIZERS.items() if type(method) is cls)

    class Stop(BaseException):
        pass

    class Writer(ImageSetWriter):
        def append(self, *args: Any, **kwargs: Any) -> None:
            super().append(*args, **kwargs)
            if self.finished_parts == 1:
                raise Stop

    def writer(folder: str) -> ImageSetWriter:
        return open_writer(tmp_path / folder, name, method, 10, 0, model)

    whole = method.synthesize(model, 10, Rng(0), writer=writer("whole"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("synthquant.synthesize.batches.ImageSetWriter", Writer)
        method.synthesize(model, 10, Rng(0), writer=writer("killed"))
    resumed = method.synthesize(model, 10, Rng(0), writer=writer("killed"))
    assert resumed.manifest == whole.manifest
    assert [part.count for part in whole.manifest.parts] == [4, 4, 2]
    assert torch.equal(pixels(whole), pixels(method.synthesize(model, 10, Rng(0))))
    for number in (0, 1):
        part = tmp_path / f"killed/part-0000{number}.parquet"
        part.write_bytes(part.read_bytes()[:-9])
    mended = method.synthesize(model, 10, Rng(0), writer=writer("killed"))
    assert mended.manifest == whole.manifest, "parts before those that are there are made as if those were not"
