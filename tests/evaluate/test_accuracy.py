"""Accuracy, confidence interval and agreement against plain loops and known values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from synthquant.core.errors import DataError, InputError
from synthquant.core.ranking import top_classes
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.evaluate.accuracy import compare_logits, evaluate_model, wilson_interval
from synthquant.export.compare import difference


def random_logits(count: int, classes: int, seed: int) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def test_top1_and_top5_match_a_plain_loop() -> None:
    logits, labels = random_logits(97, 12, 0), torch.arange(97) % 12
    ranked = [sorted(range(12), key=lambda c, row=row: -float(row[c])) for row in logits]
    evaluation = compare_logits(logits, labels)
    assert evaluation.top1 == sum(r[0] == int(y) for r, y in zip(ranked, labels, strict=True)) / 97
    assert evaluation.top5 == sum(int(y) in r[:5] for r, y in zip(ranked, labels, strict=True)) / 97
    assert evaluation.agreement is None and evaluation.kl is None and evaluation.recovery is None


def test_top5_of_three_classes_is_one() -> None:
    assert compare_logits(random_logits(8, 3, 1), torch.zeros(8, dtype=torch.int64)).top5 == 1.0


def test_agreement_and_kl_match_a_plain_loop() -> None:
    reference, logits = random_logits(20, 6, 2), random_logits(20, 6, 3)
    total = 0.0
    for p_row, q_row in zip(reference.double().softmax(1), logits.double().softmax(1), strict=True):
        total += sum(float(p) * math.log(float(p) / float(q)) for p, q in zip(p_row, q_row, strict=True))
    evaluation = compare_logits(logits, None, reference)
    assert evaluation.kl == pytest.approx(total / 20, rel=1e-9)
    assert evaluation.agreement == int((reference.argmax(1) == logits.argmax(1)).sum()) / 20
    assert evaluation.top1 is None and evaluation.interval is None and evaluation.recovery is None


def test_a_network_agrees_with_itself() -> None:
    logits, labels = random_logits(30, 10, 4), torch.arange(30) % 10
    evaluation = compare_logits(logits, labels, logits)
    assert evaluation.agreement == 1.0 and evaluation.kl == 0.0 and evaluation.recovery == 1.0


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_tied_logits_agree_with_themselves(classes: int) -> None:
    """Integer logits, as integer kernels give them: agreement and accuracy follow one rule."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(-3, 4, (20000, classes), generator=generator).float()
    answers = top_classes(logits)[:, 0]
    evaluation = compare_logits(logits, answers, logits)
    assert evaluation.agreement == evaluation.top1 == evaluation.top5 == evaluation.recovery == 1.0
    flipped = compare_logits(logits.flip(1), answers, logits)
    assert flipped.agreement == flipped.top1 == int((top_classes(logits.flip(1))[:, 0] == answers).sum()) / 20000
    found = difference(logits, logits)
    assert found.agreement == 1.0 and difference(logits.flip(1), logits).agreement == flipped.agreement


def test_recovery_is_quantized_over_float() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    reference = torch.eye(3)[labels]
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 1])]
    evaluation = compare_logits(logits, labels, reference)
    assert evaluation.top1 == 0.75 and evaluation.recovery == 0.75
    assert compare_logits(logits, labels, torch.eye(3)[(labels + 1) % 3]).recovery is None


def test_non_finite_logits_count_as_wrong() -> None:
    labels = torch.tensor([0, 1])
    reference = torch.eye(2)
    broken = torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])
    evaluation = compare_logits(broken, labels, reference)
    assert evaluation.non_finite == 1
    assert evaluation.top1 == 0.5 and evaluation.top5 == 0.5 and evaluation.agreement == 0.5
    assert evaluation.kl == 0.0
    assert compare_logits(torch.full((2, 2), float("inf")), labels, reference).kl is None


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_known_values(successes: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_its_equation() -> None:
    for bound in wilson_interval(37, 120):
        assert (37 / 120 - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / 120, rel=1e-9)


def test_wilson_interval_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="5 of 4 is not a share"):
        wilson_interval(5, 4)


def test_labels_outside_the_classes_are_named() -> None:
    with pytest.raises(DataError, match=r"labels run from 0 to 99 but the network has 10 classes \(0 to 9\): 1 of 3"):
        compare_logits(random_logits(3, 10, 5), torch.tensor([0, 9, 99]))


def test_something_to_compare_with_is_needed() -> None:
    with pytest.raises(DataError, match="no labels and there is no reference"):
        compare_logits(random_logits(3, 10, 6), None)
    with pytest.raises(InputError, match=r"reference logits are \(4, 10\) but the network gave \(3, 10\)"):
        compare_logits(random_logits(3, 10, 6), None, random_logits(4, 10, 6))
    with pytest.raises(InputError, match="one label per image"):
        compare_logits(random_logits(3, 10, 6), torch.zeros(4, dtype=torch.int64))


class MeanColour(nn.Module):
    """Logits are the mean of each colour channel, so a purely red image is class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.scale * x.mean(dim=(2, 3))


def coloured(labels: list[int]) -> ImageSet:
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    for index, label in enumerate(labels):
        images[index, label] = 255
    return ImageSet.from_tensors(images, labels=torch.tensor(labels))


def preprocess() -> Preprocess:
    return Preprocess(
        input_size=(8, 8), resize=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop=True
    )


def test_evaluate_model_end_to_end() -> None:
    model = MeanColour().train()
    evaluation = evaluate_model(model, preprocess(), coloured([0, 1, 2, 2, 1]), batch_size=2)
    assert evaluation.count == 5 and evaluation.top1 == 1.0 and evaluation.top5 == 1.0
    assert evaluation.logits.shape == (5, 3) and evaluation.logits.dtype == torch.float32
    assert torch.allclose(evaluation.logits[0], torch.tensor([1.0, -1.0, -1.0]))
    assert evaluation.seconds > 0 and evaluation.set_aside == ()
    assert model.modes == [False] * 3 and model.training
    again = evaluate_model(
        lambda x: -model(x), preprocess(), coloured([0, 1, 2, 2, 1]), reference_logits=evaluation.logits
    )
    assert again.agreement == 0.0 and again.recovery == 0.0
    assert again.row("x")["interval"] == list(wilson_interval(0, 5))


def test_evaluate_model_takes_what_open_images_takes() -> None:
    images = coloured([0, 1, 2, 2, 1])
    tensor, labels = torch.stack([images[index].image for index in range(5)]), images.labels
    assert labels is not None
    wanted = evaluate_model(MeanColour(), preprocess(), images).logits
    dataset = TensorDataset(tensor, labels)
    for given in (dataset, DataLoader(dataset, batch_size=2), (tensor, labels)):
        found = evaluate_model(MeanColour(), preprocess(), given)
        assert torch.equal(found.logits, wanted) and found.top1 == 1.0
    with pytest.raises(DataError, match="no images at"):
        evaluate_model(MeanColour(), preprocess(), "nowhere/at/all")


def test_evaluate_model_refuses_what_is_not_a_classifier() -> None:
    with pytest.raises(InputError, match=r"the network returned \(5, 3, 8, 8\) for 5 images"):
        evaluate_model(lambda x: x, preprocess(), coloured([0, 1, 2, 2, 1]))
    with pytest.raises(InputError, match="batch_size is 0"):
        evaluate_model(lambda x: x, preprocess(), coloured([0]), batch_size=0)
