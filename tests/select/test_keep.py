from __future__ import annotations

import pytest
import torch

from synthquant.core.errors import DataError, RecipeError
from synthquant.core.settings import parse_settings
from synthquant.select.energy import Energy
from synthquant.select.keep import keep_best

SCORES = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 0.0])


@pytest.mark.parametrize(
    ("keep", "highest", "stay"),
    [
        (2, False, [1, 5]),
        (2, True, [0, 4]),
        (3, False, [1, 3, 5]),
        (0.5, False, [1, 3, 5]),
        (1.0, False, [0, 1, 2, 3, 4, 5]),
        (0.01, False, [5]),
        (6, True, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_best_stay(keep: int | float, highest: bool, stay: list[int]) -> None:
    assert keep_best(SCORES, keep, highest=highest).nonzero().flatten().tolist() == stay


def test_of_equal_scores_the_first_stay() -> None:
    assert keep_best(torch.zeros(9), 4, highest=True).nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("highest", [False, True])
@pytest.mark.parametrize("keep", [1, 3, 0.3, 0.5, 0.9])
def test_per_class_is_the_same_as_each_class_alone(keep: int | float, highest: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(60, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator) * 3
    expected = torch.zeros(60, dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        expected[members] = keep_best(scores[members], keep, highest=highest)
    assert torch.equal(keep_best(scores, keep, highest=highest, labels=labels), expected)


def test_fewer_images_than_are_to_stay() -> None:
    with pytest.raises(DataError, match="7 images are to stay but there are 6"):
        keep_best(SCORES, 7, highest=False)
    labels = torch.tensor([4, 4, 4, 9, 9, 4])
    with pytest.raises(DataError, match="3 images of class 9 are to stay but there are 2"):
        keep_best(SCORES, 3, highest=False, labels=labels)


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.5, "many", None, True, float("nan")])
def test_what_is_no_share_and_no_count_is_refused(keep: object) -> None:
    with pytest.raises(RecipeError, match=r"give a share above 0 and up to 1, such as 0.7, or a count"):
        parse_settings(Energy, {"keep": keep}, "here")


def test_a_count_and_a_share_are_told_apart_through_writing_and_reading() -> None:
    for keep in (1, 1.0):
        again = Energy.model_validate_json(Energy(keep=keep).model_dump_json())
        assert again.keep == keep and type(again.keep) is type(keep)
