import pytest
import torch

from synthquant.core.errors import InputError
from synthquant.core.rng import Rng
from synthquant.evaluate.accuracy import compare_logits
from synthquant.evaluate.paired import Estimate, PerImage, mean_difference, mean_over, share, share_difference


def draws(count: int, chance: float, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=Rng(seed).generator("test")) < chance


def test_what_each_image_did_adds_up_to_the_evaluation_and_survives_packing() -> None:
    generator = Rng(0).generator("logits")
    reference = torch.randn(37, 5, generator=generator)
    logits = reference + 0.5 * torch.randn(37, 5, generator=generator)
    labels = torch.randint(5, (37,), generator=generator)
    logits[3, 2] = float("nan")
    whole, images = compare_logits(logits, labels, reference), PerImage.of(logits, labels, reference)
    assert whole.top1 == pytest.approx(images.correct.float().mean().item())
    assert whole.agreement == pytest.approx(images.agrees.float().mean().item())
    assert whole.kl == pytest.approx(images.kl.nanmean().item())
    assert not images.correct[3] and images.kl[3].isnan()
    again = PerImage.unpacked(images.packed())
    assert again.correct.equal(images.correct) and again.agrees.equal(images.agrees)
    torch.testing.assert_close(again.kl, images.kl, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_the_interval_of_two_shares_is_newcombes() -> None:
    # 36 both, 12 only the first, 2 only the second, none neither; by hand: Wilson's intervals are 0.8654 to 0.9890 and
    # 0.6259 to 0.8570, phi is -24 / sqrt(48 * 2 * 38 * 12) = -0.1147
    first = torch.tensor([True] * 48 + [False] * 2)
    second = torch.tensor([True] * 36 + [False] * 12 + [True] * 2)
    found = share_difference(first, second)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_the_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    covered = {"shares": 0, "means": 0}
    for seed in range(60):
        common, flip, back = draws(300, 0.8, 3 * seed), draws(300, 0.09, 3 * seed + 1), draws(300, 0.05, 3 * seed + 2)
        first, second = common & ~back, common & ~flip
        covered["shares"] += (found := share_difference(first, second)).low <= 0.8 * 0.04 <= found.high
        covered["means"] += (found := mean_difference(first.float(), second.float())).low <= 0.8 * 0.04 <= found.high
    assert all(54 <= count < 60 for count in covered.values()), covered


def test_pairs_tell_apart_what_separate_intervals_do_not() -> None:
    first = draws(436, 0.8, 0)
    second = first.clone()
    second[first.nonzero().flatten()[:10]] = False
    assert share(second).high > share(first).low
    assert share_difference(first, second).low > 0
    assert share_difference(first, first).verdict(-0.015) == "met"


def test_verdicts_wait_for_the_whole_interval() -> None:
    found = Estimate(0.0, -0.01, 0.01)
    assert [found.verdict(bound) for bound in (-0.01, 0.0, 0.02)] == ["met", "not decided", "missed"]


def test_runs_are_averaged_image_by_image_and_other_images_are_no_pairs() -> None:
    runs = [torch.tensor([True, False, True]), torch.tensor([True, True, False])]
    assert mean_over(runs).tolist() == [1.0, 0.5, 0.5]
    for first, second in ((torch.ones(3), torch.ones(4)), (torch.ones(0), torch.ones(0))):
        with pytest.raises(InputError, match="no pairs"):
            mean_difference(first, second)
    with pytest.raises(InputError, match="no image has finite values"):
        mean_difference(torch.tensor([torch.nan]), torch.ones(1))
