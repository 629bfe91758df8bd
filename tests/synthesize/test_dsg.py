"""DSG against its papers, part by part, each written down a second time in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.errors import RecipeError, UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.data.store import ImageSetWriter
from synthquant.models.batch_norm_loss import TARGET_EPSILON, image_loss
from synthquant.models.float_model import FloatModel
from synthquant.recipe import SynthesizeSection
from synthquant.synthesize.batches import open_writer
from synthquant.synthesize.correlation import Correlation, SampleCorrelation, correlation_loss, gram_spectrum
from synthquant.synthesize.diversity import Diversity
from synthquant.synthesize.dsg import DSG
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.inversion import InvertedNetwork, Objective
from synthquant.synthesize.pieces import Pieces
from synthquant.synthesize.priors import Smoothness, image_norm, total_variation
from synthquant.synthesize.slack import Slack, measure_slack
from synthquant.synthesize.zeroq import ZeroQ

MakeModel = Callable[..., FloatModel]
OFF: dict[str, Any] = {"slack": None, "layer_enhancement": False, "correlation": None}


def pixels(images: ImageSet) -> Tensor:
    return torch.stack([images[index].image for index in range(len(images))])


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inverted(model: FloatModel, statistics: Literal["batch", "image"] = "image") -> InvertedNetwork:
    network = InvertedNetwork(
        model,
        method="dsg",
        statistics=statistics,
        channel_weights="sum",
        swing=False,
        epsilon=TARGET_EPSILON,
        untrained=True,
    )
    network.need(model.example_images(2))
    return network


def slow_gaps(network: nn.Module, images: Tensor, per_image: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Gaps of means and deviations of each layer in the order in which they run, `[B, C]` or `[C]`."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(norm: nn.BatchNorm2d, args: tuple[Tensor, ...]) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        dims = [2, 3] if per_image else [0, 2, 3]
        deviation = (args[0].var(dims) + 1e-6).sqrt()
        found.append((args[0].mean(dims) - norm.running_mean, deviation - (norm.running_var + 1e-6).sqrt()))

    with hooked(pre=[(part, keep) for part in network.modules() if isinstance(part, nn.BatchNorm2d)]):
        network(images)
    return found


def slow_distances(
    network: nn.Module, images: Tensor, slack: list[Any] | None = None, per_image: bool = True
) -> Tensor:
    """`d_l` of each image, `[L, B]`, or of the batch, `[L]`."""
    rows = []
    for index, gaps in enumerate(slow_gaps(network, images, per_image)):
        of_layer = torch.zeros(len(images)) if per_image else torch.zeros(())
        for place, gap in zip(("mean", "deviation"), gaps, strict=True):
            room = 0.0 if slack is None else torch.tensor(slack[index][place])
            of_layer = of_layer + (torch.clamp(gap.abs() - room, min=0) ** 2).sum(-1)
        rows.append(of_layer)
    return torch.stack(rows)


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_slack_is_a_percentile_of_the_gaps_on_noise(
    tiny: FloatModel, statistics: Literal["batch", "image"], per: Literal["layer", "channel"]
) -> None:
    settings = Slack(percentile=0.7, per=per, samples=10)
    network = inverted(tiny, statistics)
    measured = measure_slack(network, settings, 4, (3, 12, 12), Rng(3), tiny.device)
    generator = Rng(3).generator("noise")
    # Statistics over a batch are those of whole batches.
    sizes = (4, 4, 2) if statistics == "image" else (4, 4, 4)
    batches = [torch.randn(size, 3, 12, 12, generator=generator) for size in sizes]
    gaps = [slow_gaps(tiny.module, batch, statistics == "image") for batch in batches]
    assert [one["layer"] for one in measured] == ["bn1", "bn2", "bn3", "again", "again"]
    wide = []
    for index, found in enumerate(measured):
        for which, place in enumerate(("mean", "deviation")):
            values = [gap[index][which].abs() for gap in gaps]
            rows = torch.cat(values) if statistics == "image" else torch.stack(values)
            expected = np.quantile(rows.numpy(), 0.7, axis=None if per == "layer" else 0)
            assert found[place] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
        wide.append(torch.stack([torch.tensor(found[place]).expand(rows.shape[1]) for place in ("mean", "deviation")]))
    assert network.slack is not None
    torch.testing.assert_close(network.slack, torch.cat(wide, 1))


@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_gaps_within_the_slack_cost_nothing(tiny: FloatModel, statistics: Literal["batch", "image"]) -> None:
    network, images = inverted(tiny, statistics), tiny.example_images(3)
    slack = measure_slack(network, Slack(samples=8), 4, (3, 12, 12), Rng(0), tiny.device)
    assert network.slack is not None
    distances = slow_distances(tiny.module, images, slack, statistics == "image")
    assert float(distances.sum()) > 0
    expected = distances.sum(0).mean() + image_loss(images, epsilon=TARGET_EPSILON)
    torch.testing.assert_close(network.loss(images), expected, rtol=1e-3, atol=1e-4)
    network.slack = network.slack * 1e6
    torch.testing.assert_close(network.loss(images), image_loss(images, epsilon=TARGET_EPSILON))


@pytest.mark.parametrize("batch", [2, 5, 7])
@pytest.mark.parametrize("first", [0, 3])
def test_each_image_enhances_one_layer(tiny: FloatModel, batch: int, first: int) -> None:
    network, images = inverted(tiny), tiny.example_images(batch)
    enhanced = torch.arange(first, first + batch) % 5
    distances = slow_distances(tiny.module, images)
    expected = (distances.sum(0) + distances[enhanced, torch.arange(batch)]).mean()
    found = network.loss(images, Objective(enhanced=enhanced)) - image_loss(images, epsilon=TARGET_EPSILON)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 2.0)])
def test_correlation_follows_its_equation(weights: tuple[float, float]) -> None:
    images, noise = seeded(6, 3, 4, 4) + 0.5, seeded(6, 3, 4, 4, seed=1)
    spectra = []
    for rows in (images.double().flatten(1), noise.double().flatten(1)):
        rows = rows / rows.norm(dim=1, keepdim=True)
        values, vectors = np.linalg.eigh((rows @ rows.T).numpy())
        spectra.append((values[::-1], vectors[:, ::-1]))
    (values, vectors), (wanted, directions) = spectra
    share = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    alike = [abs(float(vectors[:, k] @ directions[:, k])) for k in range(6)]
    expected = weights[0] * ((values - wanted) ** 2).mean() + weights[1] * (share * (1 - np.array(alike))).sum()
    settings = Correlation(eigenvalues=weights[0], eigenvectors=weights[1])
    assert float(correlation_loss(images, noise, settings)) == pytest.approx(float(expected), rel=1e-4)
    assert float(correlation_loss(images, images, settings)) == pytest.approx(0.0, abs=1e-5)


def test_gradients_of_the_spectrum_are_those_of_torch_where_eigenvalues_lie_apart() -> None:
    scales = torch.tensor([1.0, 0.3, 3.0, 0.1])[:, None]
    samples = (seeded(4, 5) + scales).requires_grad_()
    weight = seeded(4, 4, seed=2)
    values, vectors = gram_spectrum(samples)
    assert float((values[:-1] - values[1:]).detach().min()) > 0.1, "far from the broadening"
    (gradient,) = torch.autograd.grad((values * weight[0]).sum() + (vectors * weight).abs().sum(), samples)
    rows = F.normalize(samples, dim=1)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0), vectors.flip(1)
    (expected,) = torch.autograd.grad((values * weight[0]).sum() + (vectors * weight).abs().sum(), samples)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("alike", ["equal", "zero", "orthogonal"])
def test_images_whose_eigenvalues_are_equal_have_finite_gradients(alike: str) -> None:
    images = {
        "equal": seeded(1, 3, 4, 4).repeat(6, 1, 1, 1),
        "zero": torch.zeros(6, 3, 4, 4),
        "orthogonal": torch.eye(6, 48).reshape(6, 3, 4, 4),
    }[alike].requires_grad_()
    loss = correlation_loss(images, seeded(6, 3, 4, 4, seed=1), Correlation(eigenvalues=1, eigenvectors=1))
    (gradient,) = torch.autograd.grad(loss, images)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    if alike == "orthogonal":  # torch's own do not survive it
        rows = images.flatten(1)
        vectors = torch.linalg.eigh(rows @ rows.T)[1]
        (broken,) = torch.autograd.grad((vectors * seeded(6, 6)).sum(0).abs().sum(), images)
        assert not torch.isfinite(broken).all()


def test_noise_is_fresh_in_each_iteration_and_the_batch_s_own() -> None:
    images = seeded(4, 3, 4, 4)

    def losses() -> list[float]:
        term = SampleCorrelation(Correlation(), 3, torch.Generator().manual_seed(0))
        return [float(term(images)) for _ in range(2)]

    first, second = losses()
    assert first != second and losses() == [first, second]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert first == pytest.approx(float(correlation_loss(images, noise, Correlation())) / 3)


def effective_rank(images: ImageSet, model: FloatModel) -> float:
    share = gram_spectrum(model_inputs(images, model.preprocess))[0].clamp_min(1e-9) / len(images)
    return float(torch.exp(-(share * share.log()).sum()))


@pytest.mark.parametrize("method", [ZeroQ(batch_size=8, iterations=40), GenieD(batch_size=8, iterations=40)])
def test_correlation_keeps_the_images_of_a_batch_apart(tiny: FloatModel, method: Diversity) -> None:
    apart = method.model_copy(update={"correlation": Correlation(eigenvalues=100)})
    plain, kept = (effective_rank(one.synthesize(tiny, 8, Rng(0)), tiny) for one in (method, apart))  # type: ignore[attr-defined]
    assert kept > plain + 0.5


def test_total_variation_and_norm_follow_their_equations() -> None:
    image = seeded(1, 2, 5, 6)[0].double()
    pairs = [
        (image[c, y, x], image[c, y + down, x + right])
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))
        for c in range(2)
        for y in range(5 - down)
        for x in range(max(0, -right), 6 - max(0, right))
    ]
    counts = [2 * 5 * 5, 2 * 4 * 6, 2 * 4 * 5, 2 * 4 * 5]
    norms = [sum((a - b) ** 2 for a, b in pairs[sum(counts[:k]) : sum(counts[: k + 1])]) ** 0.5 for k in range(4)]
    both = torch.stack([image, 3 * image]).float()
    assert float(total_variation(both)) == pytest.approx(2 * float(sum(norms)), rel=1e-5)  # type: ignore[arg-type]
    assert float(image_norm(both)) == pytest.approx(2 * float(image.norm()), rel=1e-5)


def test_borders_lie_elsewhere_in_each_iteration() -> None:
    images, generator = seeded(2, 3, 8, 8), torch.Generator().manual_seed(4)
    term = Smoothness(0.5, 3, torch.Generator().manual_seed(4))
    offsets = [int(torch.randint(-3, 3, (), generator=generator)) for _ in range(4)]
    assert len(set(offsets)) > 1
    for offset in offsets:
        expected = 0.5 * total_variation(images.roll((offset, offset), (2, 3)))
        torch.testing.assert_close(term(images), expected)
    torch.testing.assert_close(Smoothness(1.0, 0, generator)(images), total_variation(images))


ALL = DSG(
    batch_size=4,
    iterations=6,
    pixel_lr=0.3,
    slack=Slack(samples=6),
    correlation=Correlation(eigenvalues=3, eigenvectors=1),
    cross_entropy=0.7,
    total_variation=0.2,
    jitter=4,
    image_norm=0.1,
    untrained=True,
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"slack": None},
        {"layer_enhancement": False},
        {"correlation": None},
        {"cross_entropy": 0.0},
        {"total_variation": 0.0},
        {"image_norm": 0.0},
    ],
)
def test_the_sum_of_the_parts_step_by_step(tiny: FloatModel, change: dict[str, Any]) -> None:
    """Two batches with PyTorch's own Adam from the same start; each part can be switched off by itself."""
    method = ALL.model_copy(update=change)
    images = method.synthesize(tiny, 7, Rng(0))
    slack = images.manifest.measured.get("slack")
    assert (slack is None) == (method.slack is None)
    assert (images.labels is None) == (method.cross_entropy == 0)
    made = []
    for index, size in enumerate((4, 3)):
        rng = Rng(0).child(f"batch-{index}")
        x = torch.randn(size, 3, 12, 12, generator=rng.generator("pixels")).requires_grad_()
        labels = torch.randint(5, (size,), generator=rng.generator("labels"))
        noises, offsets = rng.generator("correlation"), rng.generator("jitter")
        enhanced = torch.arange(4 * index, 4 * index + size) % 5
        optimizer = torch.optim.Adam([x], lr=0.3)
        for _ in range(6):
            distances = slow_distances(tiny.module, x, slack)
            of_each = distances.sum(0)
            if method.layer_enhancement:
                of_each = of_each + distances[enhanced, torch.arange(size)]
            loss = of_each.mean() + image_loss(x, epsilon=TARGET_EPSILON)
            if method.correlation is not None:
                noise = torch.randn(x.shape, generator=noises)
                loss = loss + correlation_loss(x, noise, method.correlation) / 5
            if method.cross_entropy:
                loss = loss + 0.7 * F.cross_entropy(tiny.module(x), labels)
                assert images.labels is not None
                assert torch.equal(images.labels[4 * index : 4 * index + size], labels)
            if method.total_variation:
                offset = int(torch.randint(-4, 4, (), generator=offsets))
                loss = loss + 0.2 * total_variation(x.roll((offset, offset), (2, 3)))
            if method.image_norm:
                loss = loss + 0.1 * image_norm(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made.append(x.detach())
    found = model_inputs(images, tiny.preprocess)
    close = (found - torch.cat(made)).abs() < 0.03
    assert float(close.float().mean()) > 0.97, "Adam's first steps take signs of gradients, some of which are nearly 0"


def test_with_all_parts_off_it_is_zeroq(tiny: FloatModel) -> None:
    common: dict[str, Any] = {"batch_size": 3, "iterations": 4, "pixel_lr": 0.5, "patience": 1}
    of_dsg = DSG(**OFF, **common).synthesize(tiny, 5, Rng(0))
    of_zeroq = ZeroQ(**common).synthesize(tiny, 5, Rng(0))
    assert torch.equal(pixels(of_dsg), pixels(of_zeroq))
    assert of_dsg.manifest.measured == {} and of_dsg.labels is None


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_in_pieces_the_loss_is_that_of_the_whole_batch(
    tiny: FloatModel, statistics: Literal["batch", "image"], size: int
) -> None:
    network, labels = inverted(tiny, statistics), torch.arange(7) % 5
    measure_slack(network, Slack(samples=7), 7, (3, 12, 12), Rng(0), tiny.device)

    def run(pieces: Pieces) -> tuple[Tensor, Tensor]:
        network.pieces = pieces
        term = SampleCorrelation(Correlation(eigenvectors=1), 5, torch.Generator().manual_seed(0))
        objective = Objective((term, image_norm), lambda logits: F.cross_entropy(logits, labels))
        if statistics == "image":
            objective = replace(objective, enhanced=torch.arange(7) % 5)
        images = tiny.example_images(7).requires_grad_()
        loss = network.backward(images * 1.5, objective)
        assert images.grad is not None
        return loss, images.grad

    for kept in (1, 2):
        for found, whole in zip(run(Pieces(size, kept)), run(Pieces()), strict=True):
            torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
    slack = network.slack
    measure_slack(network, Slack(samples=7), 7, (3, 12, 12), Rng(0), tiny.device)
    assert slack is not None and network.slack is not None
    torch.testing.assert_close(network.slack, slack, rtol=1e-4, atol=1e-5)


def test_a_resumed_set_is_made_with_the_same_slack(
    tiny: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writer(name: str) -> ImageSetWriter:
        return open_writer(tmp_path / name, "dsg", ALL, 7, 0, tiny)

    whole = ALL.synthesize(tiny, 7, Rng(0), writer=writer("whole"))
    assert len(whole.manifest.measured["slack"]) == 5
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        make = DSG._objective

        def die(self: DSG, network: Any, model: Any, batch: Any, labels: Any) -> Objective:
            if batch.index == 1:
                raise KeyboardInterrupt
            return make(self, network, model, batch, labels)

        patch.setattr(DSG, "_objective", die)
        ALL.synthesize(tiny, 7, Rng(0), writer=writer("killed"))
    assert (tmp_path / "killed" / "part-00000.parquet").exists()
    resumed = ALL.synthesize(tiny, 7, Rng(0), writer=writer("killed"))
    assert resumed.manifest == whole.manifest
    assert ImageSet.open(tmp_path / "killed").manifest.measured == whole.manifest.measured


@pytest.mark.parametrize("method", [ZeroQ(), GenieD()])
def test_what_is_off_leaves_no_trace(tiny: FloatModel, method: Diversity) -> None:
    """Image sets that were begun before these settings existed go on, and finished ones keep their bytes."""
    assert not {"slack", "correlation", "low_pass"} & method.model_dump(mode="json").keys()
    small = method.model_copy(update={"iterations": 1, "latent_size": 4, "batch_size": 2})
    images = small.synthesize(tiny, 2, Rng(0))  # type: ignore[attr-defined]
    assert "measured" not in images.manifest.model_dump(mode="json")
    used = small.model_copy(update={"slack": Slack(samples=2)}).synthesize(tiny, 2, Rng(0))  # type: ignore[attr-defined]
    assert len(used.manifest.measured["slack"]) == 5
    assert {"slack", "correlation"} <= DSG(**OFF).model_dump(mode="json").keys(), "where they are on, off is written"


def test_a_network_without_classes_has_no_cross_entropy(tiny: FloatModel) -> None:
    other = replace(tiny, task="other")
    with pytest.raises(UnsupportedModelError, match=r"tiny is no classifier.* leave them out"):
        DSG(iterations=1, cross_entropy=1).synthesize(other, 2, Rng(0))
    assert len(DSG(iterations=1, slack=Slack(samples=2)).synthesize(other, 2, Rng(0))) == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"slack": {"percentile": 1.5}}, r"slack.percentile = 1.5: .*less than or equal to 1"),
        ({"slack": {"percentle": 0.9}}, "unknown setting 'slack.percentle'; did you mean 'percentile'"),
        ({"slack": 0.9}, "slack = 0.9"),
        ({"correlation": {"eigenvalues": -1}}, r"correlation.eigenvalues = -1: .*greater than or equal to 0"),
        ({"cross_entropy": -1}, "cross_entropy = -1"),
    ],
)
def test_bad_settings_are_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        SynthesizeSection.parse({"method": "dsg", **values}, "recipe")
    assert "\n" not in str(error.value)
