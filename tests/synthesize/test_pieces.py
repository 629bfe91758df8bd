"""A batch in pieces has the loss and the gradient of the whole one, in the memory of a piece, whatever is free."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from synthquant.core.free_memory import GIB
from synthquant.core.progress import QUIET, Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.models.batch_norm_loss import measure
from synthquant.models.float_model import FloatModel
from synthquant.synthesize import genie_d, pieces
from synthquant.synthesize.batches import open_writer
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.inversion import InvertedNetwork
from synthquant.synthesize.pieces import Need, Pieces, divided, joined, need_of
from synthquant.synthesize.zeroq import ZeroQ

MakeModel = Callable[..., FloatModel]
CPU = torch.device("cpu")
MIB = 2**20


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(pieces, "free_memory", lambda device: size)


def limits(monkeypatch: pytest.MonkeyPatch, whole: int, piece: int) -> None:
    monkeypatch.setattr(pieces, "_WHOLE", {"cpu": whole})
    monkeypatch.setattr(pieces, "_PIECE", {"cpu": piece})


def pixels(images: ImageSet) -> torch.Tensor:
    return torch.stack([images[index].image for index in range(len(images))])


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
@pytest.mark.parametrize("shape", [(7, 4, 3, 5), (7, 4, 1, 1), (7, 4)])
def test_statistics_of_pieces_are_those_of_the_whole(shape: tuple[int, ...], epsilon: float) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    values[:, 2] = 1.25  # a constant channel
    whole, apart = values.clone().requires_grad_(), values.clone().requires_grad_()
    wanted = measure(whole, epsilon=epsilon)
    parts = apart.split([4, 1, 2])
    counts = torch.stack([torch.full((4,), part.numel() / 4) for part in parts])
    found = joined(torch.stack([measure(part, epsilon=epsilon) for part in parts]), counts, epsilon)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * weight).sum(), apart)
    (expected,) = torch.autograd.grad((wanted * weight).sum(), whole)
    if not epsilon:  # the gradient of a constant channel's deviation is left out there
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(gradient).all()


def inverted(model: FloatModel, statistics: Literal["batch", "image"]) -> InvertedNetwork:
    return InvertedNetwork(
        model, method="genie_d", statistics=statistics, channel_weights="mean", swing=True, untrained=True
    )


def backward(network: InvertedNetwork, model: FloatModel, how: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    network.pieces = how
    made_from = model.example_images(7).requires_grad_()
    loss = network.backward(made_from * 1.5)
    assert not loss.requires_grad and made_from.grad is not None
    return loss, made_from.grad


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("statistics", ["batch", "image"])
def test_loss_and_gradient_are_those_of_the_whole_batch(
    tiny: FloatModel, statistics: Literal["batch", "image"], size: int
) -> None:
    network = inverted(tiny, statistics)
    assert network.swing is not None
    network.swing.draw(torch.Generator().manual_seed(3))
    loss, gradient = backward(network, tiny, Pieces())
    found, of_pieces = backward(network, tiny, Pieces(size, 1))
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_pieces, gradient, rtol=1e-3, atol=1e-5)
    # The comparison would see it if pieces were judged one by one.
    if statistics == "batch":
        assert float(network.loss(1.5 * tiny.example_images(7)[:size])) != pytest.approx(float(loss), rel=1e-3)


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_what_is_kept_changes_the_time_and_no_bit(tiny: FloatModel, kept: int) -> None:
    network = inverted(tiny, "batch")
    passes: list[int] = []
    network._network.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    wanted = backward(network, tiny, Pieces(2, 1))
    assert passes == [2, 2, 2, 1, 2, 2, 2]
    passes.clear()
    found = backward(network, tiny, Pieces(2, kept))
    assert len(passes) == 4 + (4 - kept)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_need_is_what_is_saved_for_the_gradient() -> None:
    weight, images = torch.ones(10, 10), torch.ones(4, 10, requires_grad=True)

    def run() -> torch.Tensor:
        return ((images @ weight).exp() ** 2).sum()  # saves the weight, and the result of exp once

    need = need_of(run, 4, fixed=7, own=[weight])
    assert need == Need(7, 10 * 4 * (1 + 3)) and need.of(100) == 7 + 100 * 160
    assert need_of(run, 4, fixed=7, own=[]).per_image == (160 + 400 + 3 * 400) // 4


def test_a_batch_that_fits_runs_as_a_whole_whatever_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (GIB, 100 * GIB):
        free(monkeypatch, size)
        told = Told()
        assert divided(128, Need(0, 6 * MIB), Need(0, MIB // 8), CPU, told) == Pieces(128, 1)
        assert not told.said and not told.warned


def test_free_memory_decides_what_is_kept_and_not_the_size_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    found = {}
    for size in (3, 8, 100):
        free(monkeypatch, size * GIB)
        found[size] = divided(128, Need(0, 64 * MIB), Need(GIB, 0), CPU, told)
    assert found == {3: Pieces(16, 1), 8: Pieces(16, 5), 100: Pieces(16, 8)}
    assert [text.split(":")[0] for text in told.said] == [
        "batches of 128 images run in 8 pieces of 16, 7 of them computed twice",
        "batches of 128 images run in 8 pieces of 16, 3 of them computed twice",
        "batches of 128 images run in 8 pieces of 16",
    ]
    assert "their activations take 8.00 GiB, what makes the images 1.00 GiB, and 3.00 GiB are free" in told.said[0]
    assert not told.warned


def test_a_batch_that_cannot_fit_is_told_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, GIB)
    told = Told()
    assert divided(128, Need(0, 64 * MIB), Need(GIB, MIB), CPU, told) == Pieces(16, 1)
    assert told.warned == [
        "a batch of 128 images takes 2.12 GiB of memory at least and 1.00 GiB are free; lower batch_size"
    ]
    divided(1, Need(0, 3 * GIB), Need(0, 0), CPU, told)
    assert "a batch of 1 images takes 3.00 GiB" in told.warned[1]


def test_default_batches_of_small_networks_run_as_a_whole(tiny: FloatModel) -> None:
    told = Told()
    settings = GenieD(iterations=1, latent_size=4, untrained=True)
    images = settings.synthesize(tiny, 130, Rng(0), progress=told)
    assert len(images) == 130 and settings.batch_size == 128 and not told.said and not told.warned


def method(**changes: Any) -> GenieD:
    return GenieD(iterations=2, latent_size=4, untrained=True, **changes)


def test_a_size_that_is_asked_for_is_obeyed(tiny: FloatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need = inverted(tiny, "batch").need(tiny.example_images(2)).per_image
    whole = method(batch_size=10).synthesize(tiny, 20, Rng(0))
    limits(monkeypatch, whole=8 * need, piece=5 * need)
    told, large = Told(), method(batch_size=10)
    writer = open_writer(tmp_path / "set", "genie_d", large, 20, 0, tiny)
    found = large.synthesize(tiny, 20, Rng(0), writer=writer, progress=told)
    assert [part.count for part in found.manifest.parts] == [10, 10]
    assert "batches of 10 images run in 3 pieces of 4" in told.said[0]
    assert (pixels(found).float() - pixels(whole).float()).abs().mean() < 0.05


def test_a_set_that_was_begun_goes_on_to_the_same_bytes(
    tiny: FloatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a machine with other free memory."""
    need = inverted(tiny, "batch").need(tiny.example_images(2)).per_image
    limits(monkeypatch, whole=4 * need, piece=4 * need)
    free(monkeypatch, 1)
    chosen = method(batch_size=8)
    whole = chosen.synthesize(tiny, 20, Rng(0))
    folder = tmp_path / "set"
    make, made = genie_d.GenieD._make_batch, []

    def die(self: GenieD, *args: Any) -> torch.Tensor:
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return make(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(genie_d.GenieD, "_make_batch", die)
        with pytest.raises(KeyboardInterrupt):
            chosen.synthesize(tiny, 20, Rng(0), writer=open_writer(folder, "genie_d", chosen, 20, 0, tiny))
    free(monkeypatch, 100 * GIB)
    found = chosen.synthesize(tiny, 20, Rng(0), writer=open_writer(folder, "genie_d", chosen, 20, 0, tiny))
    assert [part.count for part in found.manifest.parts] == [8, 8, 4]
    assert torch.equal(pixels(found), pixels(whole))


def test_images_that_do_not_influence_each_other_are_the_same_in_pieces(
    tiny: FloatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ZeroQ(iterations=3, batch_size=8, untrained=True)
    whole = settings.synthesize(tiny, 8, Rng(0), progress=QUIET)
    limits(monkeypatch, whole=1, piece=1)
    told = Told()
    found = settings.synthesize(tiny, 8, Rng(0), progress=told)
    assert "run in 8 pieces of 1" in told.said[0]
    torch.testing.assert_close(pixels(found), pixels(whole), rtol=1e-2, atol=1e-2)


_LIMITED = """
import resource, torch
from torch import nn
from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.synthesize.inversion import InvertedNetwork
from synthquant.synthesize.pieces import Pieces

# Eight images keep 8 * 16 tensors of 4 MiB.
layers = [part for _ in range(8) for part in (nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))]
network = nn.Sequential(nn.Conv2d(3, 16, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
preprocess = Preprocess(input_size=(256, 256), mean=(0.5,) * 3, std=(0.2,) * 3)
model = FloatModel(network.eval(), preprocess, "deep", ModelSource(source="zoo/deep"))
inverted = InvertedNetwork(
    model, method="genie_d", statistics="batch", channel_weights="mean", swing=False, untrained=True
)
images = model.example_images(8).requires_grad_()
inverted.pieces = Pieces(1, 1)
inverted.backward(images[:1] * 1)
used = next(int(row.split()[1]) * 1024 for row in open("/proc/self/status") if row.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20, used + 300 * 2**20))
for size in (1, 8):
    inverted.pieces = Pieces(size, 1)
    try:
        inverted.backward(images * 1)
        print(size, "fits")
    except RuntimeError as error:
        print(size, "does not: " + str(error).replace("\\n", " "))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_pieces_fit_where_the_whole_batch_does_not() -> None:
    result = subprocess.run([sys.executable, "-c", _LIMITED], capture_output=True, text=True)
    pieces_of_one, whole = result.stdout.splitlines()
    assert pieces_of_one == "1 fits", result.stderr
    assert whole.startswith("8 does not: ") and "allocate memory" in whole


def test_functions_that_mix_layers_of_other_kinds_are_measured(make_model: MakeModel) -> None:
    """A batch norm subclass is watched by a hook, which counts its values as the others do."""

    class Watched(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    model = make_model(nn.Sequential(nn.Conv2d(3, 4, 3), Watched(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network = inverted(model, "batch")
    loss, gradient = backward(network, model, Pieces())
    found, of_pieces = backward(network, model, Pieces(2, 1))
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_pieces, gradient, rtol=1e-3, atol=1e-5)
