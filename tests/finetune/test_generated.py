from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.small_networks import CLASSES, calibrated_model, small_float_model, small_images
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.core.progress import QUIET
from synthquant.core.rng import Rng
from synthquant.core.tensor_file import digest_of
from synthquant.finetune import DSGQAT, GDFQ, AdaDFQ, Distill
from synthquant.finetune import fine_tuning as loop
from synthquant.finetune.adadfq import agreement_of, game_loss
from synthquant.finetune.generated import GeneratedFineTuning, GeneratedImages
from synthquant.finetune.generator import ClassGenerator
from synthquant.finetune.renewal import Renewal
from synthquant.finetune.student import Student
from synthquant.nn.quant_model import QuantModel
from synthquant.recipe import FineTuneSection
from synthquant.run_stages import FineTuneStage

SMALL: dict[str, Any] = {"iterations": 6, "batch_size": 8, "evaluations": 3, "generator_warm_up": 4, "latent_size": 6}
METHODS = [GDFQ, DSGQAT, AdaDFQ]


@pytest.fixture(scope="module")
def quant_model(tmp_path_factory: pytest.TempPathFactory) -> QuantModel:
    return calibrated_model(small_float_model(tmp_path_factory.mktemp("network")), "W3A3")


def source_of(settings: GeneratedFineTuning, quant_model: QuantModel) -> GeneratedImages:
    student = Student(quant_model, "offsets", lsq_gradient_scale=True)
    return GeneratedImages(settings, student, Rng(0))


def state(model: QuantModel) -> str:
    return digest_of(model.state())


def test_images_depend_on_noise_and_class_and_mixed_classes_lie_between() -> None:
    generator = ClassGenerator(3, 5, (3, 10, 14), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for norm in generator.norms:
            norm.scale.normal_(1, 0.5, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    own = [F.one_hot(torch.full((4,), index), 3).float() for index in range(3)]
    first, second = generator(latents, own[0]), generator(latents, own[1])
    assert first.shape == (4, 3, 10, 14) and not torch.allclose(first, second)
    mixed = generator(latents, (own[0] + own[1]) / 2)
    assert not torch.allclose(mixed, first) and not torch.allclose(mixed, second)
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    again = ClassGenerator(3, 5, (3, 10, 14), torch.Generator().manual_seed(0))
    assert torch.equal(again.linear.weight, generator.linear.weight)


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_learns_in_turns_with_the_network_and_a_kill_changes_nothing(
    quant_model: QuantModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: type[GeneratedFineTuning]
) -> None:
    settings, images = method(**SMALL), small_images(20)
    whole = settings.train(quant_model, images, Rng(0))
    assert state(whole.last) != state(quant_model)
    step = loop._Training._step
    made: list[int] = []

    def die(self: Any, number: int, batch: Any) -> Any:
        made.append(number)
        if len(made) == 4:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(loop._Training, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        settings.train(quant_model, images, Rng(0), workdir=tmp_path)
    resumed = settings.train(quant_model, images, Rng(0), workdir=tmp_path)
    assert made == [1, 2, 3, 4, 3, 4, 5, 6]
    assert state(resumed.last) == state(whole.last) and state(resumed.best) == state(whole.best)
    assert resumed.report == whole.report


def test_given_images_choose_the_best_state_and_are_never_trained_on(
    quant_model: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = [GDFQ(**SMALL).train(quant_model, small_images(20, seed=seed), Rng(0)) for seed in (0, 1)]
    assert state(tuned[0].last) == state(tuned[1].last)
    assert tuned[0].report.points != tuned[1].report.points


def test_ranges_are_set_anew_on_generated_images_unless_they_are_to_stay(quant_model: QuantModel) -> None:
    fixed = {"weight_lr": 1e-9, "weight_scale_lr": 0.0, "activation_scale_lr": 0.0, "other_lr": 0.0}
    still = GDFQ(**SMALL, **fixed, recalibrate=False).train(quant_model, small_images(20), Rng(0)).last
    assert state(still) == state(quant_model)
    anew = GDFQ(**SMALL, **fixed).train(quant_model, small_images(20), Rng(0)).last.state()
    before = quant_model.state()
    changed = {name for name in before if not torch.equal(anew[name], before[name])}
    assert changed and all(name.endswith((".scale", ".zero_point")) for name in changed)


def test_rates_are_shares_of_the_ranges_that_training_begins_with(quant_model: QuantModel) -> None:
    """Where ranges are set anew, those that the network came with decide nothing."""
    other, images = quant_model.trainable_copy(), small_images(20)
    with torch.no_grad():
        for quantizer in other.quantizers.values():
            for part in [] if quantizer.fixed else quantizer.learnable():
                part.mul_(50)
    settings = GDFQ(**SMALL, activation_scale_lr=0.01)
    one, two = (settings.train(model, images, Rng(0)) for model in (quant_model, other))
    assert state(one.last) == state(two.last)


def test_a_state_holds_the_grids_that_no_optimiser_knows(quant_model: QuantModel) -> None:
    source = source_of(GDFQ(**SMALL), quant_model)
    kept = source.state()
    quantizers = source.student.network.quantizers
    before = {name: {part: value.clone() for part, value in one.grid().items()} for name, one in quantizers.items()}
    for one in quantizers.values():
        one.load_grid({part: value + 1 for part, value in one.grid().items()})
    source.load(kept)
    for name, one in quantizers.items():
        assert all(torch.equal(value, before[name][part]) for part, value in one.grid().items())


def warmed(settings: GeneratedFineTuning, quant_model: QuantModel) -> tuple[Tensor, Tensor]:
    source = source_of(settings, quant_model)
    source.prepare(QUIET)
    images, labels = source._made(Rng(9), 64)
    return images.detach(), labels


def test_images_become_those_of_their_class_where_that_is_asked(quant_model: QuantModel) -> None:
    def recognised(weight: float) -> float:
        settings = GDFQ(
            batch_size=32, latent_size=6, generator_warm_up=40, generator_lr=0.01, recalibrate=False,
            generator_cross_entropy=weight, batch_norm=1e-3,
        )  # fmt: skip
        images, labels = warmed(settings, quant_model)
        with torch.no_grad():
            logits = quant_model.float_model.logits(images)
        return float(F.cross_entropy(logits, labels))

    assert recognised(1.0) < 0.99 * recognised(0.0)


def test_slack_and_correlation_are_parts_of_dsg(quant_model: QuantModel) -> None:
    plain = source_of(GDFQ(**SMALL), quant_model)
    slack = source_of(DSGQAT(**SMALL), quant_model)
    assert plain._network.slack is None and slack._network.slack is not None and bool((slack._network.slack > 0).any())
    assert source_of(DSGQAT(**SMALL, slack=None), quant_model)._network.slack is None
    labels = torch.zeros(4, dtype=torch.int64)
    alike = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
    apart = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (term,) = DSGQAT(**SMALL).objective(slack, labels, Rng(0)).of_images
    assert float(term(alike)) > 2 * float(term(apart))
    assert not DSGQAT(**SMALL, correlation=None).objective(slack, labels, Rng(0)).of_images
    results = [
        state(method.train(quant_model, small_images(20), Rng(0)).last)
        for method in (GDFQ(**SMALL), DSGQAT(**SMALL), DSGQAT(**SMALL, slack=None), DSGQAT(**SMALL, correlation=None))
    ]
    assert len(set(results)) == 4
    assert results[0] == state(
        DSGQAT(**SMALL, slack=None, correlation=None).train(quant_model, small_images(20), Rng(0)).last
    )


def test_the_game_keeps_disagreement_within_bounds() -> None:
    teacher = torch.tensor([[8.0, 0, 0], [8.0, 0, 0], [8.0, 0, 0]])
    student = torch.tensor([[8.0, 0, 0], [0, 8.0, 0], [7.0, 0, 0]])
    known = agreement_of(teacher, student)
    assert known.argmax() == 0 and known.argmin() == 1 and float(known[0]) == pytest.approx(1) and float(known[1]) == 0
    entropy = -(F.softmax(torch.tensor([1.0, 0, 0]), 0) * F.log_softmax(torch.tensor([1.0, 0, 0]), 0)).sum()
    apart = F.softmax(teacher[1] - student[1], 0)
    smallest = -(apart * apart.log()).sum()
    assert float(known[2]) == pytest.approx(float((entropy - smallest) / (math.log(3) - smallest)), abs=1e-5)
    labels = torch.tensor([0, 0, 0])
    bounds = AdaDFQ(disagreement=0.0, agreement=0.0)
    assert float(game_loss(teacher, student, labels, bounds)) == pytest.approx(
        float((0.1 + (known[0] - 0.8) + F.relu(known[2] - 0.8)) / 3), abs=1e-5
    )
    only = AdaDFQ(disagreement=1.0, agreement=0.0, lower=0.0, upper=1.0)
    torch.testing.assert_close(game_loss(teacher, student, labels, only), F.cross_entropy(teacher - student, labels))
    only = AdaDFQ(disagreement=0.0, agreement=1.0, lower=0.0, upper=1.0)
    torch.testing.assert_close(game_loss(teacher, student, labels, only), F.cross_entropy(teacher + student, labels))


def test_the_game_moves_the_generator_and_not_the_network(quant_model: QuantModel) -> None:
    source = source_of(AdaDFQ(**SMALL), quant_model)
    before, weights = source.student.values(), source._generator.linear.weight.detach().clone()
    source._train(Rng(0), 1.0)
    after = source.student.values()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in source.student.parameters.values())
    assert not torch.equal(source._generator.linear.weight, weights)
    (term,) = AdaDFQ(**SMALL).objective(source, torch.zeros(4, dtype=torch.int64), Rng(0)).of_images
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(term(images), images)
    assert gradient.abs().sum() > 0 and source.classes == CLASSES


@pytest.mark.parametrize("method", [GDFQ(), Distill(renewal=Renewal())], ids=["gdfq", "renewal"])
def test_a_network_without_statistics_is_refused_before_anything_is_quantized(
    quant_model: QuantModel, tmp_path: Path, method: GDFQ | Distill
) -> None:
    without = small_float_model(tmp_path)
    stage = FineTuneStage(FineTuneSection.parse({"method": method.name, **method.model_dump()}, "test"))
    stage.check(cast(Any, SimpleNamespace(model=quant_model.float_model)))
    batch_norms = [one for one in without.module.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    for one in batch_norms:
        one.reset_running_stats()
    with pytest.raises(UnsupportedModelError, match=r"looks untrained: .* --weights FILE$"):
        stage.check(cast(Any, SimpleNamespace(model=without)))
    for one in batch_norms:
        one.running_mean = one.running_var = None
    with pytest.raises(UnsupportedModelError, match=r"no batch norm with running statistics.* use the method distill"):
        stage.check(cast(Any, SimpleNamespace(model=without)))


def test_what_a_generator_cannot_be_trained_with_is_said_when_it_is_known(quant_model: QuantModel) -> None:
    with pytest.raises(ValueError, match="unknown observer 'widest'"):
        GDFQ(observer="widest")
    wild = source_of(GDFQ(**SMALL, generator_lr=1e30), quant_model)
    with pytest.raises(InputError, match=r"the generator diverged .* lower generator_lr"):
        wild.prepare(QUIET)
