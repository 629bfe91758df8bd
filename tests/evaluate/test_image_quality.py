"""Image sets beside each other: which images are pairs, what is measured of them, and what is said where nothing is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.small_networks import CLASSES, small_float_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from synthquant.core.errors import DataError, MissingExtraError, ModelError, UnknownNameError
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.seed_pairs import same_seed_pairs
from synthquant.evaluate import torch_metrics
from synthquant.evaluate.diversity import features
from synthquant.evaluate.feature_distances import frechet_distance
from synthquant.evaluate.image_features import ClassifierFeatures, InceptionFeatures, open_features
from synthquant.evaluate.image_quality import QualitySettings, compare_images
from synthquant.evaluate.same_seed import compare_pairs
from synthquant.evaluate.torch_metrics import inception_weights, open_inception, structural_similarity
from synthquant.models.float_model import FloatModel

FEW = QualitySettings(resamples=10, subsets=3, subset_size=8, batch_size=7)


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


def pixels(count: int, seed: int = 0, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def drawn(images: Tensor, *, first_seed: int = 100, labels: Tensor | None = None, **columns: Any) -> ImageSet:
    seeds = list(range(first_seed, first_seed + len(images)))
    return ImageSet.from_tensors(images, labels, columns={"seed": seeds, **columns})


def noisy(images: Tensor, levels: int, seed: int = 5) -> Tensor:
    noise = torch.randint(-levels, levels + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def test_pairs_have_the_same_seed_prompt_and_label() -> None:
    one = drawn(pixels(5), first_seed=0, prompt=["a", "b", "c", "d", "e"])
    two = drawn(pixels(5), first_seed=2, prompt=["c", "x", "e", "f", "g"])
    pairs = same_seed_pairs(one, two)
    assert pairs is not None
    assert pairs.first.tolist() == [2, 4] and pairs.second.tolist() == [0, 2]
    without = same_seed_pairs(one, drawn(pixels(5), first_seed=2))
    assert without is not None and without.first.tolist() == [2, 3, 4] and without.second.tolist() == [0, 1, 2]
    labelled = [drawn(pixels(3), labels=torch.tensor(labels)) for labels in ([0, 1, 2], [0, 2, 2])]
    pairs = same_seed_pairs(labelled[0], labelled[1])
    assert pairs is not None and pairs.first.tolist() == [0, 2]
    twice = one.subset([0, 0, 1])
    pairs = same_seed_pairs(twice, one)
    assert pairs is not None and pairs.first.tolist() == [2] and pairs.second.tolist() == [1]
    assert same_seed_pairs(one, drawn(pixels(2), first_seed=50)) is None
    assert same_seed_pairs(one, ImageSet.from_tensors(pixels(5))) is None


def slow_similarity(first: Tensor, second: Tensor) -> float:
    """Wang et al. 2004, eq. 13, window by window: 11x11 Gaussian weights with a standard deviation of 1.5.

    At the edges images are mirrored.
    """
    axis = np.arange(11) - 5.0
    weights = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for x, y in zip(first.double().numpy(), second.double().numpy(), strict=True):
        wide = [np.pad(one, 5, mode="reflect") for one in (x, y)]
        for top in range(x.shape[0]):
            for left in range(x.shape[1]):
                a, b = (one[top : top + 11, left : left + 11] for one in wide)
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                variances = (weights * ((a - mean_a) ** 2 + (b - mean_b) ** 2)).sum()
                mixed = (weights * (a - mean_a) * (b - mean_b)).sum()
                above = (2 * mean_a * mean_b + 0.01**2) * (2 * mixed + 0.03**2)
                found.append(above / ((mean_a**2 + mean_b**2 + 0.01**2) * (variances + 0.03**2)))
    return float(np.mean(found))


def test_structural_similarity_is_that_of_the_paper() -> None:
    first = pixels(2, size=12).float() / 255
    second = noisy(pixels(2, size=12), 60).float() / 255
    found = structural_similarity(first, second)
    expected = [slow_similarity(a, b) for a, b in zip(first, second, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    assert structural_similarity(first, first).tolist() == pytest.approx([1, 1])


def test_distances_of_pairs_are_those_of_their_images(model: FloatModel) -> None:
    images = pixels(9)
    changed = noisy(images, 20)
    changed[4] = images[4]
    order = torch.tensor([3, 1, 0, 2, 5, 4, 8, 7, 6])
    one, two = drawn(changed), drawn(images).subset(order)
    extractor = ClassifierFeatures(model)
    found = [extractor.features(each, "x", batch_size=4) for each in (one, two)]
    pairs = same_seed_pairs(one, two)
    assert pairs is not None
    row = compare_pairs(one, two, pairs, (found[0], found[1]), batch_size=4)
    assert row.pairs == 9 and row.identical == 1
    mse = (changed.double() - images.double()).div(255).square().flatten(1).mean(1)
    psnr = [10 * math.log10(1 / value) for value in mse.tolist() if value > 0]
    assert row.psnr is not None and row.ssim is not None and row.same_class is not None
    assert row.psnr.value == pytest.approx(sum(psnr) / 8, rel=1e-6) and row.psnr.low < row.psnr.value < row.psnr.high
    similar = structural_similarity(changed.float() / 255, images.float() / 255)
    assert row.ssim.value == pytest.approx(float(similar.mean()), rel=1e-5)
    inputs = [model.preprocess(each, "cropped") for each in (changed, images)]
    vectors = [features(model, each).double() for each in inputs]
    scale = torch.cdist(vectors[1], vectors[1]).square().sum().div(9 * 8).sqrt()
    assert row.feature_distance.value == pytest.approx(
        float((vectors[0] - vectors[1]).norm(dim=1).mean() / scale), rel=1e-4
    )
    tops = [model.logits(each).argmax(1) for each in inputs]
    assert row.same_class.value == float((tops[0] == tops[1]).double().mean())


def test_equal_and_small_images_have_no_ratio_and_no_similarity(model: FloatModel) -> None:
    images = pixels(6, size=8)
    found = compare_images(drawn(images), drawn(images), ClassifierFeatures(model), settings=FEW)
    assert found.same_seed is not None and found.same_seed.identical == 6
    assert found.same_seed.psnr is None and found.same_seed.ssim is None
    assert found.same_seed.feature_distance.value == 0 and found.frechet.value == pytest.approx(0, abs=1e-6)
    assert found.precision.value == found.recall.value == 1


def test_sets_are_whatever_open_images_takes(model: FloatModel, tmp_path: Path) -> None:
    base, other, third = pixels(12), noisy(pixels(12), 9), pixels(12, seed=2)
    drawn(base).save(tmp_path / "base")
    extractor = ClassifierFeatures(model)
    wanted = compare_images(other, ImageSet.from_tensors(base), extractor, baseline=drawn(third), settings=FEW)
    found = compare_images(
        DataLoader(TensorDataset(other), 5), tmp_path / "base", extractor, baseline=third, settings=FEW
    )
    assert found == wanted


def test_broken_images_are_left_out_of_pairs(model: FloatModel, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    drawn(pixels(8)).save(tmp_path / "whole")
    images = ImageSet.open(tmp_path / "whole")
    from PIL import Image

    folder.mkdir()
    for number, image in enumerate(pixels(8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"none")
    from synthquant.data.sources import open_images

    broken = open_images(folder).with_columns(seed=list(range(100, 108)))
    found = compare_images(broken, images, ClassifierFeatures(model), settings=FEW)
    assert found.count == 7 and found.reference_count == 8
    assert found.same_seed is not None and found.same_seed.pairs == found.same_seed.identical == 7
    assert found.same_seed.feature_distance.value == 0


def test_a_comparison_names_its_features_and_repeats_itself(model: FloatModel) -> None:
    one, two = ImageSet.from_tensors(pixels(20)), ImageSet.from_tensors(pixels(30, seed=1))
    extractor = ClassifierFeatures(model)
    found = compare_images(one, two, extractor, settings=FEW, rng=Rng(3))
    assert found == compare_images(one, two, extractor, settings=FEW, rng=Rng(3))
    assert found.features == f"{model.source.source}, input of the last layer with weights (6 numbers)"
    assert (found.count, found.reference_count) == (20, 30)
    assert found.same_seed is None and found.class_agreement is None and found.relative is None
    vectors = [features(model, model.preprocess(each, "cropped")) for each in (pixels(20), pixels(30, seed=1))]
    assert found.frechet.value == pytest.approx(frechet_distance(*vectors), rel=1e-4)
    other = compare_images(one, two, extractor, settings=FEW, rng=Rng(4))
    assert other.frechet.value == found.frechet.value and other.frechet.high != found.frechet.high
    assert other.kernel.value != found.kernel.value
    assert found.row()["kernel"]["subset_size"] == 8


def test_a_baseline_is_what_the_distance_is_put_in_relation_to(model: FloatModel) -> None:
    real, base = ImageSet.from_tensors(pixels(30, seed=1)), pixels(24)
    extractor = ClassifierFeatures(model)
    found = compare_images(drawn(noisy(base, 9)), real, extractor, baseline=drawn(base), settings=FEW)
    alone = compare_images(drawn(base), real, extractor, settings=FEW)
    assert found.relative is not None and found.relative.paired
    assert found.relative.baseline.value == alone.frechet.value
    assert found.relative.ratio.value == pytest.approx(found.frechet.value / alone.frechet.value)
    assert found.same_seed is not None and found.same_seed.pairs == 24, "pairs are with the baseline"
    some = compare_images(drawn(noisy(base, 9)), real, extractor, baseline=drawn(base[:20]), settings=FEW)
    assert some.relative is not None and not some.relative.paired
    assert some.same_seed is not None and some.same_seed.pairs == 20


def test_class_agreement_is_the_share_of_images_in_their_class(model: FloatModel) -> None:
    images = pixels(12)
    tops = model.logits(model.preprocess(images, "cropped")).argmax(1)
    labels = tops.clone()
    labels[:3] = (labels[:3] + 1) % CLASSES
    labels[3] = -1
    changed = noisy(images, 200)
    found = compare_images(
        drawn(changed, labels=labels), drawn(images, labels=labels), ClassifierFeatures(model), settings=FEW
    ).class_agreement
    assert found is not None and found.images is not None and found.reference is not None
    known = labels >= 0
    hits = (model.logits(model.preprocess(changed, "cropped")).argmax(1) == labels)[known]
    assert found.reference.value == pytest.approx(8 / 11) and found.images.value == float(hits.double().mean())
    assert found.difference is not None
    only = compare_images(
        ImageSet.from_tensors(images), drawn(images, labels=labels), ClassifierFeatures(model), settings=FEW
    )
    assert only.class_agreement is not None
    assert only.class_agreement.images is None and only.class_agreement.difference is None


class Warnings(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, message: str) -> None:
        self.lines.append(message)


def test_images_far_larger_than_what_the_network_sees_are_warned_of(model: FloatModel) -> None:
    said = Warnings()
    large = ImageSet.from_tensors(pixels(5, size=40))
    ClassifierFeatures(model).features(large, "mine", batch_size=4, progress=said)
    assert len(said.lines) == 1 and said.lines[0].startswith("mine: images of 40x40 are seen at 16x16 by ")
    ClassifierFeatures(model).features(ImageSet.from_tensors(pixels(5, size=32)), "mine", batch_size=4, progress=said)
    assert len(said.lines) == 1


def test_what_cannot_be_compared_is_one_line(model: FloatModel) -> None:
    extractor = ClassifierFeatures(model)
    with pytest.raises(DataError, match="3 images are too few to be compared; give 4 or more"):
        compare_images(drawn(pixels(3)), drawn(pixels(9)), extractor, settings=FEW)
    with pytest.raises(DataError, match=r"same seed are \[3, 16, 16\] and \[3, 12, 12\]; draw both in one size"):
        compare_images(drawn(pixels(9)), drawn(pixels(9, size=12)), extractor, settings=FEW)
    with pytest.raises(UnknownNameError, match="nix"):
        open_features("zoo/nix", torch.device("cpu"))


def test_inception_is_named_where_its_weights_are_and_one_line_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"weights of Inception are not on this machine; download https://\S+ to \S+pth"
    ):
        open_features("inception", torch.device("cpu"))
    with monkeypatch.context() as patched:  # random weights in its layout
        patched.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        made = inception.FeatureExtractorInceptionV3("x", ["2048"])
    inception_weights().parent.mkdir(parents=True)
    inception_weights().write_bytes(b"none")
    with pytest.raises(ModelError, match="is damaged or holds more than tensors"):
        open_inception("cpu")
    torch.save({"a": torch.zeros(3)}, inception_weights())
    with pytest.raises(ModelError, match="does not hold the weights of Inception"):
        open_inception("cpu")
    torch.save(made.state_dict(), inception_weights())
    extractor = open_features("inception", torch.device("cpu"))
    assert isinstance(extractor, InceptionFeatures) and extractor.name.startswith("inception (torchmetrics'")
    mixed = [pixels(1, size=24)[0], pixels(1, size=40)[0], pixels(1, seed=2, size=24)[0]]
    found = extractor.features(_of_any_size(mixed), "x", batch_size=8)
    assert found.vectors.shape == (3, 2048) and found.indices.tolist() == [0, 1, 2] and found.classes is None
    for place, image in enumerate(mixed):
        alone = extractor.features(ImageSet.from_tensors(image[None]), "x", batch_size=8)
        assert torch.allclose(alone.vectors[0], found.vectors[place], rtol=1e-3, atol=1e-5)


def _of_any_size(images: list[Tensor]) -> Any:
    class Sized(ImageSet):
        def batches(self, batch_size: int, indices: Any = None, transform: Any = None) -> Any:
            from synthquant.data.image_set import Batch

            yield Batch(images, None, list(range(len(images))))

    return Sized.from_tensors(torch.stack([images[0]] * len(images)))


def test_without_torchmetrics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("torchmetrics.functional.image", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"synthquant\[quality\]"):
        torch_metrics.structural_similarity(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(MissingExtraError, match=r"synthquant\[quality\]"):
        open_inception("cpu")
