from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_networks import CLASSES, calibrated_model, small_float_model, small_images

from synthquant.core.errors import DataError, ModelError
from synthquant.core.processes import ALONE
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.core.tensor_file import digest_of, read_sealed_tensors
from synthquant.data.image_set import ImageSet
from synthquant.finetune import Distill, batches, looks
from synthquant.finetune import fine_tuning as loop
from synthquant.finetune.batches import ImagePool
from synthquant.finetune.student import Student
from synthquant.models.held_out import hold_out
from synthquant.nn.quant_model import QuantModel

SMALL: dict[str, Any] = {"iterations": 12, "batch_size": 5, "evaluations": 4}


class Told(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def quant_model(tmp_path_factory: pytest.TempPathFactory) -> QuantModel:
    return calibrated_model(small_float_model(tmp_path_factory.mktemp("network")), "W3A3")


def state(model: QuantModel) -> str:
    return digest_of(model.state())


def test_step_0_is_the_quantized_network_bit_for_bit(quant_model: QuantModel) -> None:
    student = Student(quant_model, "offsets", lsq_gradient_scale=True)
    inputs = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = quant_model(inputs)
        assert torch.equal(student.network(inputs), expected)
    with student.training():
        assert torch.equal(student.network(inputs), expected)
    assert state(student.finished()) == state(quant_model)


def test_training_brings_the_network_nearer_to_its_teacher_and_leaves_the_start_alone(quant_model: QuantModel) -> None:
    before = state(quant_model)
    tuned = Distill(iterations=60, batch_size=16, flip=False, shift=0.0, weight_lr=0.05).train(
        quant_model, small_images(40), Rng(0)
    )
    assert state(quant_model) == before != state(tuned.last)
    points = tuned.report.points
    assert points is not None and points[0].step == 0 and points[-1].step == 60
    assert points[-1].loss is not None and points[1].loss is not None and points[-1].loss < 0.6 * points[1].loss
    for layer in tuned.best.layers.values():
        assert layer.weight_source is None and layer.weight_quantizer is not None
        assert int(layer.weight_quantizer.codes.max()) <= layer.weight_quantizer.args.quant_max
    assert not any(parameter.requires_grad for parameter in tuned.best.parameters())


def test_the_best_by_agreement_on_images_held_out_is_the_result(
    quant_model: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured there decides alone, whatever the images that are trained on say."""
    answers = iter([0.2, 0.2, 0.4, 0.2, 0.6, 0.2, 0.4, 0.9, 0.3, 1.0])  # of images held out and trained on, in turns
    monkeypatch.setattr(looks, "agreement", lambda reference, logits: next(answers))
    states: list[str] = []
    look = loop._Training._look

    def watch(self: Any, *args: Any) -> None:
        look(self, *args)
        states.append(state(self._student.finished()))

    monkeypatch.setattr(loop._Training, "_look", watch)
    tuned = Distill(**SMALL).train(quant_model, small_images(20), Rng(0))
    assert tuned.report.best_step == 6 and tuned.report.held_out_count == 2
    assert len(set(states)) == 5 and state(tuned.best) == states[2] and state(tuned.last) == states[4]


def test_images_held_out_are_never_trained_on(quant_model: QuantModel) -> None:
    parts = hold_out(20, 0.25, Rng(0))
    assert len(parts.held_out) == 5 and sorted([*parts.held_out.tolist(), *parts.training.tolist()]) == list(range(20))
    assert not torch.equal(hold_out(20, 0.25, Rng(1)).held_out, parts.held_out)
    student = Student(quant_model, "offsets", lsq_gradient_scale=True)
    own = Distill(**SMALL).source(student, small_images(20), parts, Rng(0), ALONE)
    assert torch.equal(own._chosen, parts.training)
    model = quant_model.float_model
    labels = torch.arange(20) % CLASSES
    images = ImageSet.from_tensors(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).repeat(1, 3, 16, 16), labels)
    pool = ImagePool(images, parts.training, model, 4, Rng(0))
    seen: list[int] = []
    for batch, _ in zip(pool.batches(), range(6), strict=False):
        assert batch.labels is not None
        own = (model.preprocess.pixels(batch.images)[:, 0, 0, 0] * 255).round().int().tolist()
        assert [number % CLASSES for number in own] == batch.labels.tolist()
        seen += own
    assert not set(seen) & set(parts.held_out.tolist())
    assert len(set(seen[:12])) == 12 and seen[:12] != seen[12:]  # three batches an epoch, another order in the next
    assert torch.equal(
        next(pool.batches(4)).images, [batch.images for batch, _ in zip(pool.batches(), range(5), strict=False)][4]
    )


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "sgd", "average": 0.9, "clip": 1.0, "form": "weights"}], ids=["adamw", "sgd"]
)
def test_a_killed_training_goes_on_to_the_same_bytes(
    quant_model: QuantModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    method, images = Distill(**SMALL, **changes), small_images(20)
    whole = method.train(quant_model, images, Rng(0))
    steps: list[int] = []
    step = loop._Training._step

    def die(self: Any, number: int, batch: Any) -> Any:
        steps.append(number)
        if len(steps) == 8:  # between two states that are kept
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(loop._Training, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        method.train(quant_model, images, Rng(0), workdir=tmp_path)
    resumed = method.train(quant_model, images, Rng(0), workdir=tmp_path)
    assert steps == [*range(1, 9), *range(7, 13)]
    assert state(resumed.best) == state(whole.best) and state(resumed.last) == state(whole.last)
    assert resumed.report == whole.report
    with pytest.raises(DataError, match="state of another training"):
        Distill(**{**SMALL, "weight_lr": 0.02}).train(quant_model, images, Rng(0), workdir=tmp_path)


def test_images_that_do_not_fit_into_memory_are_read_anew_to_the_same_network(
    quant_model: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, images = Distill(**SMALL), small_images(20)
    expected = settings.train(quant_model, images, Rng(0))
    monkeypatch.setattr(batches, "_IN_MEMORY", 0)
    found = settings.train(quant_model, images, Rng(0))
    assert state(found.last) == state(expected.last) and found.report == expected.report
    student = Student(quant_model, "offsets", lsq_gradient_scale=True)
    looked_at = looks.Looks(images, hold_out(20, 0.5, Rng(0)), student)._looks
    assert all(inputs.kept is None and len(logits) == 10 for inputs, logits in looked_at)


def test_a_damaged_state_is_not_used(quant_model: QuantModel, tmp_path: Path) -> None:
    method, told = Distill(**SMALL), Told()
    whole = method.train(quant_model, small_images(20), Rng(0), workdir=tmp_path)
    path = tmp_path / "training.safetensors"
    assert read_sealed_tensors(path).texts["made_from"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = method.train(quant_model, small_images(20), Rng(0), workdir=tmp_path, progress=told)
    assert state(again.best) == state(whole.best) and "training starts again" in told.warnings[0]


def test_training_that_diverges_keeps_the_best_state_and_says_so(quant_model: QuantModel, tmp_path: Path) -> None:
    told = Told()
    wild = Distill(**SMALL, other_lr=1e38, activation_scale_lr=0.0, warm_up=0.0)
    tuned = wild.train(quant_model, small_images(20), Rng(0), progress=told, workdir=tmp_path)
    assert tuned.report.diverged and tuned.report.steps is not None and tuned.report.steps < 12
    assert len(told.warnings) == 1 and "lower the learning rates" in told.warnings[0] and "\n" not in told.warnings[0]
    assert f"of step {tuned.report.best_step}" in told.warnings[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tuned.last.state().values())
    again = wild.train(quant_model, small_images(20), Rng(0), workdir=tmp_path)
    assert again.report == tuned.report and state(again.best) == state(tuned.best)


def test_the_running_average_is_the_result(quant_model: QuantModel) -> None:
    plain = Distill(**SMALL).train(quant_model, small_images(20), Rng(0))
    averaged = Distill(**SMALL, average=0.999).train(quant_model, small_images(20), Rng(0))
    start, moved, slow = (model.state()["fc.bias"] for model in (quant_model, plain.last, averaged.last))
    assert 0 < (slow - start).abs().max() < 0.05 * (moved - start).abs().max()


def test_each_rate_moves_its_own_part(quant_model: QuantModel) -> None:
    rates = ("weight_lr", "weight_scale_lr", "activation_scale_lr", "other_lr")
    endings = (".weight_codes", ".weight_scale", ".scale", ("bias", "after.weight"))
    for name, ending in zip(rates, endings, strict=True):
        only = {rate: (0.2 if rate == name == "weight_lr" else 0.01) if rate == name else 0.0 for rate in rates}
        found = Distill(**SMALL, **only).train(quant_model, small_images(20), Rng(0)).last.state()
        changed = {key for key, value in quant_model.state().items() if not torch.equal(found[key], value)}
        assert changed and all(key.endswith(ending) for key in changed), (name, changed)


def test_rates_of_activations_are_shares_of_their_step_sizes(quant_model: QuantModel) -> None:
    student = Student(quant_model, "offsets", lsq_gradient_scale=True)
    own = {name: student.parameters[name] for name, group in student.groups.items() if group == "activation_scales"}
    assert len({float(scale) for scale in own.values()}) == len(own) > 2
    for optimizer, power in (("adamw", 1), ("sgd", 2)):
        groups = Distill(optimizer=optimizer, activation_scale_lr=0.02).trainer(student).optimizer.param_groups
        rates = {id(group["params"][0]): group["lr"] for group in groups}
        assert all(rates[id(scale)] == pytest.approx(0.02 * float(scale) ** power) for scale in own.values())


@pytest.mark.parametrize(
    ("term", "weight_lr", "other_lr", "share"),
    [("cross_entropy", 0.05, 2e-3, 0.995), ("features", 0.005, 5e-4, 0.9), ("attention", 0.02, 5e-4, 0.9)],
)
def test_each_term_of_the_loss_is_learned_from(
    quant_model: QuantModel, term: str, weight_lr: float, other_lr: float, share: float
) -> None:
    settings = {**SMALL, "iterations": 60, "batch_size": 18, "flip": False, "shift": 0.0}
    settings |= {"weight_lr": weight_lr, "other_lr": other_lr, "distillation": 0.0, term: 1.0}
    points = Distill(**settings).train(quant_model, small_images(20), Rng(0)).report.points
    assert points is not None and points[-1].loss is not None and points[1].loss is not None
    assert 0 < points[-1].loss < share * points[1].loss


def test_attention_is_learned_by_the_layer_behind_the_features_too(quant_model: QuantModel) -> None:
    """Which channels matter to a class is what the classifier's weights say."""
    settings = {**SMALL, "distillation": 0.0, "attention": 1.0, "weight_lr": 0.2, "other_lr": 0.0}
    found = Distill(**settings).train(quant_model, small_images(20), Rng(0)).last.state()
    assert not torch.equal(found["fc.weight_codes"], quant_model.state()["fc.weight_codes"])


def test_images_are_varied_otherwise_in_each_step(quant_model: QuantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def watch(images: torch.Tensor, generator: torch.Generator, processes: object) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return images

    monkeypatch.setattr(loop, "flip", watch)
    Distill(**SMALL, shift=0.0).train(quant_model, small_images(20), Rng(0))
    assert len(set(seeds)) == len(seeds) == 12


def test_images_without_labels_take_the_class_of_the_teacher(quant_model: QuantModel) -> None:
    images = small_images(20)
    bare = ImageSet.from_tensors(torch.stack([images[index].image for index in range(20)]))
    model = quant_model.float_model
    inputs = model.preprocess(torch.stack([images[index].image for index in range(20)]), "cropped")
    with torch.no_grad():
        own = ImageSet.from_tensors(
            torch.stack([images[index].image for index in range(20)]), model.module(inputs).argmax(1)
        )
    settings = {**SMALL, "distillation": 0.0, "cross_entropy": 1.0, "flip": False, "shift": 0.0}
    found = [state(Distill(**settings).train(quant_model, one, Rng(0)).last) for one in (bare, own, images)]
    assert found[0] == found[1] != found[2]


def test_bfloat16_computes_quantizers_in_float32(quant_model: QuantModel) -> None:
    seen: list[torch.dtype] = []
    quantizer = next(one for name, one in quant_model.quantizers.items() if not one.fixed)
    original = type(quantizer).quantize_learning

    def watch(self: Any, x: torch.Tensor, keep: Any) -> torch.Tensor:
        y = original(self, x, keep)
        seen.append(y.dtype)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(quantizer), "quantize_learning", watch)
        tuned = Distill(**{**SMALL, "iterations": 4}, compute_dtype="bfloat16").train(
            quant_model, small_images(20), Rng(0)
        )
    assert set(seen) == {torch.float32}
    assert all(tensor.dtype != torch.bfloat16 for tensor in tuned.best.state().values())


def test_batch_norms_that_were_kept_are_trained_and_keep_their_statistics(tmp_path: Path) -> None:
    from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights

    model = QuantModel.build(small_float_model(tmp_path), "W4A4", fold=False)
    calibrate_weights(model, "minmax")
    calibrate_activations(model, CalibrationSet(model, small_images()), 12, "minmax", quantized_weights=True)
    tuned = Distill(**SMALL).train(model, small_images(20), Rng(0)).last.state()
    before = model.state()
    assert torch.equal(tuned["norm.running_mean"], before["norm.running_mean"])
    assert not torch.equal(tuned["norm.weight"], before["norm.weight"])


def test_what_cannot_be_trained_is_refused_in_one_line(quant_model: QuantModel) -> None:
    method = Distill(**SMALL)
    images = small_images(20)
    wrong = ImageSet.from_tensors(torch.stack([images[0].image] * 4), torch.tensor([0, 1, 2, CLASSES]))
    with pytest.raises(DataError, match=f"labels up to {CLASSES} but .* has {CLASSES} classes"):
        method.train(quant_model, wrong, Rng(0))
    with pytest.raises(ValueError, match="so there is no loss"):
        Distill(distillation=0.0)
    with pytest.raises(DataError, match="1 samples are too few"):
        method.train(quant_model, small_images(1), Rng(0))
    with pytest.raises(DataError, match=r"needs images.*; a Tensor is no image set"):
        method.train(quant_model, torch.rand(8, 3, 16, 16), Rng(0))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs images"):
        method.train(quant_model, None, Rng(0))
    with pytest.raises(ModelError, match="not calibrated yet"):
        method.train(QuantModel.build(quant_model.float_model, "W4A4"), images, Rng(0))
