"""What every selection method promises, whoever adds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import State
from tests.select.networks import Plain, Tokens, float_model
from tests.small_networks import small_float_model, small_images

from synthquant.core.errors import DataError, UnsupportedModelError
from synthquant.core.method_settings import build_method
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import SELECTORS, Selector
from synthquant.models.float_model import FloatModel

COUNT = 23  # no multiple of any batch
SMALL = {"set_size": 6, "partitions": 2, "points": 128}


@pytest.fixture(params=SELECTORS.names())
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def make(name: str) -> Callable[..., Selector]:
    """The method with few settings changed."""

    def build(**settings: Any) -> Selector:
        fields: dict[str, Any] = SELECTORS.get(name).model_fields  # type: ignore[attr-defined]
        small = {key: value for key, value in SMALL.items() if key in fields}
        return build_method(SELECTORS, name, small | settings, name)

    return build


@pytest.fixture
def model(make: Callable[..., Selector], tmp_path: Path) -> FloatModel:
    """A network that the method works for: with batch norms, or with patches."""
    networks = (small_float_model(tmp_path), float_model(Tokens("fused"), "tokens"))
    return next(network for network in networks if make().supports(network))


def places(kept: ImageSet, pool: ImageSet) -> list[int]:
    """Where in the pool the kept images stand."""
    pixels = {pool[index].image.numpy().tobytes(): index for index in range(len(pool))}
    return [pixels[kept[index].image.numpy().tobytes()] for index in range(len(kept))]


@pytest.mark.parametrize(("keep", "count"), [(1, 1), (9, 9), (COUNT, COUNT), (0.5, 12), (1.0, COUNT), (0.001, 1)])
def test_keeps_exactly_the_count_in_the_order_of_the_pool(
    make: Callable[..., Selector], model: FloatModel, keep: int | float, count: int
) -> None:
    pool = small_images(COUNT)
    kept = make(keep=keep).select(pool, model, Rng(0), batch_size=5)
    found = places(kept, pool)
    assert len(kept) == count and found == sorted(found)
    assert kept.labels is not None and pool.labels is not None and torch.equal(kept.labels, pool.labels[found])


def test_the_kept_have_the_best_scores_and_these_are_a_column(
    name: str, make: Callable[..., Selector], model: FloatModel
) -> None:
    pool = small_images(COUNT)
    everything = make(keep=1.0).select(pool, model, Rng(0))
    (column,) = everything.column_names
    assert column == f"{name}@{model.name}-{model.fingerprint[:8]}"
    scores = everything.column(column)
    assert all(isinstance(score, float) for score in scores) and len(set(scores)) == COUNT
    best = sorted(range(COUNT), key=lambda index: scores[index], reverse=make().keeps_highest)[:7]
    kept = make(keep=7).select(pool, model, Rng(0))
    assert places(kept, pool) == sorted(best)
    assert kept.column(column) == [scores[index] for index in sorted(best)]


def test_batches_change_the_scores_by_rounding_only(make: Callable[..., Selector], model: FloatModel) -> None:
    pool = small_images(COUNT)
    whole, parts = (make(keep=1.0).select(pool, model, Rng(0), batch_size=size) for size in (64, 4))
    (column,) = whole.column_names
    assert parts.column(column) == pytest.approx(whole.column(column), rel=1e-3, abs=1e-3)


def test_the_same_seed_gives_the_same_choice(make: Callable[..., Selector], model: FloatModel) -> None:
    first, second = (make(keep=0.4).select(small_images(COUNT), model, Rng(3)) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_leaves_the_network_as_it_was(
    make: Callable[..., Selector], model: FloatModel, state: Callable[[], State]
) -> None:
    before = state()
    make().select(small_images(COUNT), model, Rng(0))
    assert state() == before


def test_leaves_the_pool_and_the_global_random_state_alone(make: Callable[..., Selector], model: FloatModel) -> None:
    pool = small_images(COUNT)
    before, random = pool.fingerprint, torch.random.get_rng_state()
    make().select(pool, model, Rng(0))
    assert pool.fingerprint == before and pool.column_names == ()
    assert torch.equal(torch.random.get_rng_state(), random)


def test_per_class_keeps_the_count_of_every_class(make: Callable[..., Selector], model: FloatModel) -> None:
    kept = make(keep=2, per_class=True).select(small_images(COUNT), model, Rng(0))
    assert kept.labels is not None and torch.bincount(kept.labels).tolist() == [2] * 7


def test_refuses_to_keep_more_than_there_are(name: str, make: Callable[..., Selector], model: FloatModel) -> None:
    with pytest.raises(DataError, match=f"{name}: {COUNT + 1} images are to stay but there are {COUNT}"):
        make(keep=COUNT + 1).select(small_images(COUNT), model, Rng(0))
    with pytest.raises(DataError, match="none of the 0 images"):
        make().select(small_images(3).subset([]), model, Rng(0))


def test_a_network_it_does_not_support_is_refused(name: str, make: Callable[..., Selector]) -> None:
    plain = float_model(Plain(), "plain")
    if make().supports(plain):
        assert len(make(keep=2).select(small_images(4), plain, Rng(0))) == 2
    else:
        with pytest.raises(UnsupportedModelError, match=f"plain has no .*, which {name} needs; .* for it: energy"):
            make().select(small_images(4), plain, Rng(0))
