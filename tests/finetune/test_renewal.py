from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model, small_images
from torch import Tensor

from synthquant.core.errors import InputError
from synthquant.core.rng import Rng
from synthquant.core.tensor_file import digest_of
from synthquant.finetune import Distill, batches
from synthquant.finetune import fine_tuning as loop
from synthquant.finetune.renewal import Renewal, RenewedPool
from synthquant.finetune.student import Student
from synthquant.models.held_out import hold_out
from synthquant.nn.quant_model import QuantModel

SMALL: dict[str, Any] = {"iterations": 9, "batch_size": 5, "evaluations": 3}
RENEWAL = Renewal(every=4, images=6, iterations=15, pixel_lr=0.1)


@pytest.fixture(scope="module")
def quant_model(tmp_path_factory: pytest.TempPathFactory) -> QuantModel:
    return calibrated_model(small_float_model(tmp_path_factory.mktemp("network")), "W2A2")


def pool_of(quant_model: QuantModel, settings: Renewal) -> RenewedPool:
    student = Student(quant_model, "offsets", lsq_gradient_scale=True)
    with torch.no_grad():  # a network that is far from its teacher
        for name, group in student.groups.items():
            if group == "weights":
                student.parameters[name].normal_(0, 2, generator=torch.Generator().manual_seed(0))
    parts = hold_out(20, 0.1, Rng(0))
    return RenewedPool(small_images(20), parts.training, student, 5, Rng(0), settings)


def divergence(pool: RenewedPool, images: Tensor) -> float:
    with torch.no_grad():
        teacher = pool._model.module(images).log_softmax(1)
        student = pool._student.network(images).log_softmax(1)
    return float((teacher.exp() * (teacher - student)).sum(1).mean())


def test_some_images_are_made_anew_where_the_networks_disagree(quant_model: QuantModel) -> None:
    def renewed(settings: Renewal) -> tuple[float, float]:
        pool = pool_of(quant_model, settings)
        before, values = pool._pool.clone(), pool._student.values()
        pool._renew(Rng(1))
        changed = (pool._pool != before).flatten(1).any(1)
        assert changed.sum() == 6 and pool._labels is not None
        assert (pool._labels[pool._chosen[changed]] == -1).all() and (pool._labels >= 0).sum() == 14
        assert pool._pool.min() >= pool._model.preprocess.limits[0] - 1e-6
        after = pool._student.values()
        assert all(torch.equal(values[name], after[name]) for name in values)
        assert all(parameter.grad is None for parameter in pool._student.parameters.values())
        return divergence(pool, before[changed]), divergence(pool, pool._pool[changed])

    before, apart = renewed(RENEWAL.model_copy(update={"disagreement": 1e4}))
    _, plain = renewed(RENEWAL.model_copy(update={"disagreement": 0.0}))
    assert apart > 1.3 * before and apart > 1.1 * plain


def test_images_are_renewed_on_time_and_a_kill_changes_nothing(
    quant_model: QuantModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewals: list[str] = []
    renew = RenewedPool._renew

    def watch(self: RenewedPool, rng: Rng) -> None:
        renewals.append(rng.path[-1])
        renew(self, rng)

    monkeypatch.setattr(RenewedPool, "_renew", watch)
    method, images = Distill(**SMALL, renewal=RENEWAL), small_images(20)
    whole = method.train(quant_model, images, Rng(0))
    assert renewals == ["renewal-4", "renewal-8"]
    plain = Distill(**SMALL).train(quant_model, images, Rng(0))
    assert digest_of(plain.last.state()) != digest_of(whole.last.state())
    step = loop._Training._step
    made: list[int] = []

    def die(self: Any, number: int, batch: Any) -> Any:
        made.append(number)
        if len(made) == 8:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(loop._Training, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        method.train(quant_model, images, Rng(0), workdir=tmp_path)
    resumed = method.train(quant_model, images, Rng(0), workdir=tmp_path)
    assert made == [*range(1, 9), 7, 8, 9]
    assert digest_of(resumed.last.state()) == digest_of(whole.last.state()) and resumed.report == whole.report


def test_images_that_do_not_fit_into_memory_are_not_renewed(
    quant_model: QuantModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_IN_MEMORY", 1000)
    with pytest.raises(InputError, match="too many to be renewed"):
        pool_of(quant_model, RENEWAL)
    streamed = Distill(**SMALL).train(quant_model, small_images(20), Rng(0))
    monkeypatch.undo()
    kept = Distill(**SMALL).train(quant_model, small_images(20), Rng(0))
    assert digest_of(streamed.last.state()) == digest_of(kept.last.state())


def test_images_that_were_given_keep_their_labels(quant_model: QuantModel) -> None:
    images = small_images(20)
    assert images.labels is not None
    before = images.labels.clone()
    settings = {"iterations": 1, "pixel_lr": 0.1, "images": 6, "every": 1}
    Distill(**{**SMALL, "iterations": 2}, renewal=settings).train(quant_model, images, Rng(0))
    assert torch.equal(images.labels, before)
