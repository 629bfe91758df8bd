"""What the measures of diversity say of images that are all alike, all different, and anything between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images
from torch import Tensor

from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.evaluate.diversity import effective_rank, features, mean_distance, measure_diversity
from synthquant.models.float_model import FloatModel


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_equal_vectors_span_one_direction_at_no_distance() -> None:
    for vector in (seeded(1, 5), torch.zeros(1, 5) + 1e-3):
        assert mean_distance(vector.repeat(7, 1)) == 0
        assert effective_rank(vector.repeat(7, 1)) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4, 5)) == 1.0
    assert effective_rank(seeded(1, 5) * torch.tensor([[1.0], [3.0], [-2.0]])) == pytest.approx(1.0), "one direction"


def test_orthogonal_vectors_span_as_many_directions_as_they_are() -> None:
    vectors = 2 * torch.eye(6, 9)
    assert effective_rank(vectors) == pytest.approx(6.0)
    assert mean_distance(vectors) == pytest.approx(8**0.5)
    assert effective_rank(torch.cat([vectors[:3]] * 2)) == pytest.approx(3.0), "each twice"


def test_measures_follow_their_equations() -> None:
    vectors = seeded(5, 4)
    pairs = [float((vectors[i] - vectors[j]).norm()) for i in range(5) for j in range(i)]
    assert mean_distance(vectors) == pytest.approx(sum(pairs) / 10, rel=1e-5)
    rows = (vectors / vectors.norm(dim=1, keepdim=True)).double()
    share = torch.linalg.svdvals(rows) ** 2 / 5
    assert effective_rank(vectors) == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)


def test_what_cannot_be_measured_is_none() -> None:
    assert mean_distance(seeded(1, 4)) is None and effective_rank(seeded(1, 4)) == pytest.approx(1.0)
    broken = seeded(3, 4)
    broken[0, 0] = float("nan")
    assert mean_distance(broken) is None and effective_rank(broken) is None
    assert mean_distance(seeded(0, 4)) is None and effective_rank(seeded(0, 4)) is None


def test_features_are_what_the_classifier_reads(model: FloatModel) -> None:
    images = model.example_images(3)
    fc = model.module.get_submodule("fc")
    found = features(model, images)
    assert found.shape == (3, 6)
    torch.testing.assert_close(fc(found), model.logits(images))


def test_a_set_is_measured_evenly_and_pixels_stand_in_for_features(model: FloatModel) -> None:
    images = small_images(20)
    found = measure_diversity(model, images, most=10, batch_size=4)
    chosen = model_inputs(images, model.preprocess, range(0, 20, 2))
    assert (found.of, found.count) == ("features", 10)
    assert found.distance == pytest.approx(mean_distance(features(model, chosen)), rel=1e-4)
    assert found.effective_rank == pytest.approx(effective_rank(features(model, chosen)), rel=1e-4)
    of_pixels = measure_diversity(replace(model, task="other"), images, most=10)
    assert of_pixels.of == "pixels"
    assert of_pixels.distance == pytest.approx(mean_distance(chosen.flatten(1)), rel=1e-5)
    alike = ImageSet.from_tensors(images[0].image[None].repeat(4, 1, 1, 1))
    same = measure_diversity(model, alike)
    assert same.distance == pytest.approx(0.0, abs=1e-5) and same.effective_rank == pytest.approx(1.0)
