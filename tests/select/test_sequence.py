"""Filters one after another: what each sees, what it costs, and what is written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.select.networks import Plain, Tokens, float_model
from tests.small_networks import CLASSES, small_float_model, small_images
from torch.utils.data import TensorDataset

from synthquant.core.errors import DataError, InputError, UnsupportedModelError
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.select import BatchNormDistance, BatchNormSensitivity, Energy, PatchSimilarity, run_filters
from synthquant.select.batch_norm import BatchNormProbe, set_sensitivity
from synthquant.select.filter import Filter
from synthquant.select.scan import scan
from synthquant.select.sequence import require_supported


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


class Listen(Progress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)


def test_each_filter_chooses_from_what_the_one_before_kept_in_one_pass(model: FloatModel) -> None:
    images = small_images(30)
    calls: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    filters = [Energy(keep=0.5), BatchNormSensitivity(keep=6), BatchNormDistance(keep=3)]
    selection = run_filters(filters, images, model, Rng(0), batch_size=8)
    handle.remove()
    assert sum(calls) == 30
    assert [(len(step.entered), int(step.stayed.sum())) for step in selection.steps] == [(30, 15), (15, 6), (6, 3)]
    first, second, third = selection.steps
    assert second.entered.tolist() == first.entered[first.stayed].tolist()
    assert third.entered.tolist() == second.entered[second.stayed].tolist()
    assert len(selection.kept) == 3 and selection.unusable == 0
    # The sensitivity is that of the set that energy kept, not of the whole pool.
    probe = BatchNormProbe(model.module)
    table = scan(images, model, [probe]).tables[probe.name]
    within, of_all = set_sensitivity(table[second.entered], probe.norms), set_sensitivity(table, probe.norms)
    assert torch.allclose(second.scores, within, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(second.scores, of_all[second.entered], rtol=1e-3, atol=1e-5)


def test_a_pool_is_whatever_open_images_takes(model: FloatModel) -> None:
    pool = small_images(12)
    pixels = torch.stack([pool[index].image for index in range(12)])
    wanted = run_filters([Energy(keep=4)], ImageSet.from_tensors(pixels), model, Rng(0))
    for given in (pixels, TensorDataset(pixels), [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]):
        found = run_filters([Energy(keep=4)], given, model, Rng(0))
        assert found.positions.tolist() == wanted.positions.tolist()
        assert found.pool.column_names == wanted.pool.column_names


def test_scores_are_columns_that_name_the_network(model: FloatModel) -> None:
    selection = run_filters([Energy(keep=0.5), Energy(keep=4, temperature=3.0)], small_images(12), model, Rng(0))
    tag = f"Network-{model.fingerprint[:8]}"
    assert selection.kept.column_names == (f"energy.2@{tag}", f"energy@{tag}")
    first, second = selection.pool.column(f"energy@{tag}"), selection.pool.column(f"energy.2@{tag}")
    assert all(score is not None for score in first)
    assert sum(score is None for score in second) == 6
    assert selection.kept.column(f"energy.2@{tag}") == [second[place] for place in selection.positions.tolist()]


def test_one_pool_is_scored_by_networks_of_other_sizes_and_kinds(model: FloatModel, tmp_path: Path) -> None:
    pool = small_images(10)
    for_a = run_filters([Energy(keep=8)], pool, model, Rng(0)).kept
    other = float_model(Tokens("fused"), "tokens")
    for_b = run_filters([PatchSimilarity(keep=5)], for_a, other, Rng(0)).kept
    larger = float_model(Plain(), "plain", size=24)
    for_c = run_filters([Energy(keep=2)], for_b, larger, Rng(0)).kept
    assert [name.partition("@")[2].rpartition("-")[0] for name in for_c.column_names] == ["Network", "plain", "tokens"]
    saved = for_c.save(tmp_path / "set")
    for name in for_c.column_names:
        assert saved.column(name) == for_c.column(name)
    assert torch.equal(saved[0].image, for_c[0].image)


def test_filters_of_high_scores_keep_the_highest() -> None:
    model = float_model(Tokens("fused"), "tokens")
    step = run_filters([PatchSimilarity(keep=3)], small_images(9), model, Rng(0)).steps[0]
    assert step.scores[step.stayed].min() >= step.scores[~step.stayed].max()


def test_per_class_keeps_as_many_of_each(model: FloatModel) -> None:
    images = small_images(4 * CLASSES)
    kept = run_filters([Energy(keep=2, per_class=True)], images, model, Rng(0)).kept
    assert kept.labels is not None
    assert torch.bincount(kept.labels).tolist() == [2] * CLASSES
    everywhere = run_filters([Energy(keep=2 * CLASSES)], images, model, Rng(0)).kept
    assert everywhere.labels is not None and torch.bincount(everywhere.labels).tolist() != [2] * CLASSES


def test_per_class_without_labels_is_said_before_the_pass(model: FloatModel) -> None:
    images = ImageSet.from_tensors(torch.rand(5, 3, 16, 16))
    with pytest.raises(DataError, match="5 of 5 images have no label, which energy needs to keep images of each class"):
        run_filters([Energy(per_class=True)], images, model, Rng(0))
    some = ImageSet.from_tensors(torch.rand(5, 3, 16, 16), labels=torch.tensor([0, 1, -1, 1, 0]))
    with pytest.raises(DataError, match="1 of 5 images have no label"):
        run_filters([Energy(per_class=True)], some, model, Rng(0))


def test_a_filter_that_is_to_keep_too_many_is_named_before_the_pass(model: FloatModel) -> None:
    model.module.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    pool = small_images(9)
    for filters, message in (
        ([Energy(keep=10)], "energy: 10 images are to stay but there are 9"),
        ([Energy(keep=4), BatchNormSensitivity(keep=5)], "bn_sensitivity: 5 images are to stay but there are 4"),
        ([Energy(keep=0.5), BatchNormDistance(keep=6)], "bn_distance: 6 images are to stay but there are 5"),
        ([Energy(keep=2, per_class=True)], "energy: 2 images of class 2 are to stay but there are 1"),
    ):
        with pytest.raises(DataError, match=message):
            run_filters(filters, pool, model, Rng(0))


def test_what_is_too_few_after_the_pass_is_named(model: FloatModel) -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    pool = ImageSet.from_tensors(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), labels=labels)
    # Three images are not two of both classes, whichever they are; one is not even one of both.
    for left, message in ((3, r"2 images of class [01] .* there are [01];"), (1, r"2 images of class [01] .* are 0;")):
        filters = [Energy(keep=left), BatchNormDistance(keep=2, per_class=True)]
        with pytest.raises(DataError, match=f"bn_distance: {message}"):
            run_filters(filters, pool, model, Rng(0))
    share = run_filters([Energy(keep=1), BatchNormDistance(keep=0.5, per_class=True)], pool, model, Rng(0))
    assert len(share.kept) == 1  # a share of none is none
    with pytest.raises(DataError, match="1 is too few"):
        run_filters([Energy(keep=1), BatchNormSensitivity(keep=1)], pool, model, Rng(0))


def test_images_that_are_not_finite_are_left_out_and_told(model: FloatModel) -> None:
    pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels[2, 0, 0, 0] = torch.nan
    listen = Listen()
    images = ImageSet.from_tensors(pixels, dtype="float16")
    selection = run_filters([BatchNormSensitivity(keep=1.0)], images, model, Rng(0), progress=listen)
    assert selection.positions.tolist() == [0, 1, 3, 4, 5] and selection.unusable == 1
    assert listen.told == ["1 images give numbers that are not finite and are left out: 2"]
    with pytest.raises(DataError, match="none of the 1 images gives finite numbers"):
        run_filters([Energy()], images.subset([2]), model, Rng(0))


def test_the_worst_are_taken_from_every_filter(model: FloatModel) -> None:
    selection = run_filters([Energy(keep=10), BatchNormDistance(keep=5)], small_images(20), model, Rng(0))
    worst = selection.worst(6).tolist()
    assert len(set(worst)) == 6 and not set(worst) & set(selection.positions.tolist())
    first, second = selection.steps
    assert worst[0] == first.entered[first.scores.argmax()] and worst[3] == second.entered[second.scores.argmax()]


def test_networks_that_lack_what_a_filter_needs_are_told_what_works() -> None:
    tokens = float_model(Tokens("manual"), "tokens")
    for filter_ in (BatchNormDistance(), BatchNormSensitivity()):
        with pytest.raises(UnsupportedModelError, match=r"tokens has no batch norm .*: energy, patch_similarity$"):
            require_supported([Energy(), filter_], tokens)


def test_filters_must_be_there_and_be_registered(model: FloatModel) -> None:
    class Mine(Energy):
        """Not registered."""

    with pytest.raises(InputError, match="no filter to select with"):
        run_filters([], small_images(3), model, Rng(0))
    with pytest.raises(InputError, match="Mine is not registered"):
        run_filters([Mine()], small_images(3), model, Rng(0))
    assert issubclass(Mine, Filter)


@pytest.mark.parametrize(
    ("filter_", "most"),
    [(Energy(keep=80), 0.3), (BatchNormDistance(keep=80), 0.1), (BatchNormSensitivity(keep=80), 0.05)],
    ids=["energy", "bn_distance", "bn_sensitivity"],
)
def test_noise_among_photographs_is_taken_out(filter_: Filter, most: float) -> None:
    """By chance two thirds of the noise would stay."""
    photographs = open_images("bundled/cifar10-test").subset(range(80))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pixels = torch.cat([torch.stack([photographs[index].image for index in range(80)]), noise])
    pool = ImageSet.from_tensors(pixels, labels=(torch.arange(120) >= 80).long())
    kept = run_filters([filter_], pool, open_model("zoo/cifar10-resnet20"), Rng(0)).kept
    assert kept.labels is not None and int(kept.labels.sum()) <= most * 40
