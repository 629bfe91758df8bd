from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.errors import UnsupportedModelError
from synthquant.finetune.losses import (
    LastFeatures,
    attention_map,
    cross_entropy,
    distillation,
    feature_distance,
    trusted_labels,
)


def logits(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * 3


def test_distillation_is_the_mean_divergence_times_the_temperature_squared() -> None:
    teacher, student = logits(0), logits(1)
    p, q = F.softmax(teacher / 4, 1), F.softmax(student / 4, 1)
    expected = (p * (p.log() - q.log())).sum(1).mean() * 16
    torch.testing.assert_close(distillation(teacher, student, 4.0), expected)
    assert float(distillation(teacher, teacher, 4.0)) == pytest.approx(0, abs=1e-6)


def test_gradients_of_distillation_hardly_depend_on_a_high_temperature() -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    found = [torch.autograd.grad(distillation(teacher, student, heat), student)[0].norm() for heat in (20.0, 200.0)]
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0)


def test_labels_count_only_where_the_teacher_agrees() -> None:
    teacher = torch.tensor([[4.0, 0, 0], [0.1, 0, 0], [0, 4.0, 0]])
    labels = torch.tensor([0, 0, 0])
    assert trusted_labels(teacher, labels, 0.5).tolist() == [True, False, False]
    assert trusted_labels(teacher, labels, 1.0).all()
    student = logits(2, 3)[:, :3].requires_grad_()
    cross_entropy(student, labels, trusted_labels(teacher, labels, 0.5)).backward()
    assert student.grad is not None and student.grad[1:].abs().sum() == 0 < student.grad[0].abs().sum()


def test_attention_maps_weigh_channels_by_the_gradient_of_the_label() -> None:
    features = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.tensor([[1.0, -1, 0], [0, 0, 2.0]])
    found = attention_map(features, features.mean((2, 3)) @ weights.T, torch.tensor([0, 1]), create_graph=True)
    expected = torch.stack([F.relu(features[0, 0] - features[0, 1]), features[1, 2]])
    torch.testing.assert_close(found, expected / expected.flatten(1).norm(dim=1)[:, None, None])
    assert torch.autograd.grad(found.sum(), features)[0].abs().sum() > 0


def test_the_distance_of_features_does_not_see_their_length() -> None:
    one, other = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert float(feature_distance(one, one * 7)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(feature_distance(one, other), feature_distance(one * 3, other))
    assert float(feature_distance(one, other)) > 0.1


def test_the_last_feature_map_is_found_and_watched_in_both_networks() -> None:
    def network() -> nn.Sequential:
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    teacher, student = network(), network()
    found = LastFeatures(teacher, student, torch.zeros(2, 3, 6, 6))
    assert found.name == "0"  # the whole body, its ReLU included
    images = torch.rand(2, 3, 6, 6)
    with found.watched():
        teacher(images), student(images)
    torch.testing.assert_close(found.of_teacher, teacher[0](images))
    torch.testing.assert_close(found.of_student, student[0](images))
    teacher[0].append(nn.Identity())  # a body that ends, before what works in place on its maps
    after = nn.Sequential(teacher[0], nn.ReLU(inplace=True), nn.Flatten()).requires_grad_(False)
    maps = LastFeatures(teacher, student, torch.zeros(2, 3, 6, 6))
    with maps.watched():
        out = after(images).sum()
    assert torch.autograd.grad(out, maps.of_teacher)[0].shape == maps.of_teacher.shape
    with pytest.raises(UnsupportedModelError, match="no feature map in common"):
        LastFeatures(nn.Flatten(), nn.Flatten(), torch.zeros(2, 3, 6, 6))
