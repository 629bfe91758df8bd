from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.data.preprocess import model_inputs
from synthquant.data.store import ImageSetWriter
from synthquant.models.float_model import FloatModel
from synthquant.synthesize.zeroq import ZeroQ

MakeModel = Callable[..., FloatModel]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())).mean((2, 3))


def test_follows_the_paper_step_by_step(make_model: MakeModel) -> None:
    """The loop of the paper with PyTorch's own Adam, scheduler and statistics, from the same start."""
    torch.manual_seed(0)
    model = make_model(Plain(), (8, 8))
    net = model.module
    assert isinstance(net, Plain)
    # The rate falls within these iterations, so the schedule is compared too.
    method = ZeroQ(batch_size=3, iterations=25, patience=0, pixel_lr=2.0, untrained=True)
    images = torch.randn(3, 3, 8, 8, generator=Rng(0).child("batch-0").generator("pixels")).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=2.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-4, patience=0)
    for _ in range(25):
        optimizer.zero_grad()
        x1 = net.conv1(images)
        x2 = net.conv2(net.bn1(x1).relu())
        loss = torch.zeros(())
        for x, norm in ((x1, net.bn1), (x2, net.bn2), (images, None)):
            mean = torch.zeros(3) if norm is None else norm.running_mean
            std = torch.ones(3) if norm is None else (norm.running_var + 1e-6).sqrt()
            loss = loss + (x.mean((2, 3)) - mean).norm() ** 2 / 3
            loss = loss + ((x.var((2, 3)) + 1e-6).sqrt() - std).norm() ** 2 / 3
        loss.backward()
        optimizer.step()
        scheduler.step(loss.item())
    assert optimizer.param_groups[0]["lr"] < 0.5
    found = model_inputs(method.synthesize(model, 3, Rng(0)), model.preprocess)
    torch.testing.assert_close(found, images.detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("count", [1, 7])
def test_exact_count_and_same_seed_same_images(tiny: FloatModel, count: int) -> None:
    before = tiny.fingerprint
    method = ZeroQ(batch_size=3, iterations=3)
    first, second = (method.synthesize(tiny, count, Rng(5)) for _ in range(2))
    assert len(first) == count and tiny.fingerprint == before
    assert all(torch.equal(first[i].image, second[i].image) for i in range(count))


def test_images_do_not_influence_each_other(tiny: FloatModel) -> None:
    few, many = (ZeroQ(batch_size=size, iterations=3).synthesize(tiny, size, Rng(0)) for size in (2, 6))
    # Batches of another size are laid out, and so summed, in another order.
    for i in range(2):
        torch.testing.assert_close(few[i].image.float(), many[i].image.float(), rtol=0, atol=0.02)


def test_parts_on_disk_are_not_made_again(tiny: FloatModel, tmp_path: Path) -> None:
    method = ZeroQ(batch_size=2, iterations=2)

    def writer() -> ImageSetWriter:
        return ImageSetWriter(
            tmp_path / "images",
            method="zeroq",
            settings=method.model_dump(mode="json"),
            seed=0,
            model_fingerprint=tiny.fingerprint,
            image_size=(12, 12),
            target_count=5,
        )

    half = writer()
    half.append(torch.full((2, 3, 12, 12), 0.25, dtype=torch.float16))
    images = method.synthesize(tiny, 5, Rng(0), writer=writer())
    assert len(images) == 5 and [part.count for part in images.manifest.parts] == [2, 2, 1]
    assert bool((images[0].image == 0.25).all())


def test_start_deviation_scales_the_start(tiny: FloatModel) -> None:
    method = ZeroQ(batch_size=4, iterations=1, pixel_lr=1e-6, start_std=0.0136)
    normalized = model_inputs(method.synthesize(tiny, 4, Rng(0)), tiny.preprocess)
    assert float(normalized.std()) == pytest.approx(0.0136, rel=0.1)


def test_defaults_are_those_of_the_authors() -> None:
    method = ZeroQ()
    assert (method.pixel_lr, method.iterations, method.patience, method.batch_size) == (0.5, 500, 100, 32)
    assert method.statistics == "image" and not method.swing


def test_network_without_batch_norm_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"zeroq needs; use a method that does not: .*noise"):
        ZeroQ().synthesize(make_model(nn.Conv2d(3, 2, 1)), 4, Rng(0))


def test_no_images_is_an_error(tiny: FloatModel) -> None:
    with pytest.raises(InputError, match="count is -1"):
        ZeroQ().synthesize(tiny, -1, Rng(0))
