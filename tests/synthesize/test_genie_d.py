from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.core.progress import Bar
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.data.store import ImageSetWriter
from synthquant.models.float_model import FloatModel
from synthquant.synthesize import genie_d
from synthquant.synthesize.generator import GeneratorKind, UpsampledConv, make_generator
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.inversion import ExponentialSchedule, Learner

MakeModel = Callable[..., FloatModel]

QUICK = GenieD(batch_size=4, iterations=3, latent_size=8)


def pixels(images: ImageSet) -> torch.Tensor:
    return torch.stack([images[i].image for i in range(len(images))])


def writer(folder: Path, model: FloatModel, count: int, method: GenieD = QUICK) -> ImageSetWriter:
    return ImageSetWriter(
        folder,
        method="genie_d",
        settings=method.model_dump(mode="json"),
        seed=0,
        model_fingerprint=model.fingerprint,
        image_size=model.preprocess.input_size,
        target_count=count,
    )


@pytest.mark.parametrize("size", [(4, 4), (1, 3), (5, 2)])
def test_upsampled_convolution_equals_upsampling_and_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = UpsampledConv(5, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    inputs = torch.randn(2, 5, *size, requires_grad=True)
    found = layer(inputs)
    expected = F.conv2d(F.interpolate(inputs, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weight, wanted = torch.randn_like(found), (inputs, layer.weight, layer.bias)
    gradients = torch.autograd.grad((found * weight).sum(), wanted)
    slow_gradients = torch.autograd.grad((expected * weight).sum(), wanted)
    for gradient, slow in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (9, 14), (1, 1)])
@pytest.mark.parametrize("kind", ["genie", "light"])
def test_generator_makes_any_size_in_normalised_space(size: tuple[int, int], kind: GeneratorKind) -> None:
    generator = make_generator(kind, 8, (3, *size), torch.device("cpu"))
    generator.reset(torch.Generator().manual_seed(0))
    images = generator(torch.randn(6, *generator.latent_shape, generator=torch.Generator().manual_seed(1)))
    assert images.shape == (6, 3, *size)
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=0.05)


@pytest.mark.parametrize(("size", "kind"), [((32, 64), "genie"), ((32, 65), "light")])
def test_generator_is_the_paper_s_for_images_of_the_paper_s_size(size: tuple[int, int], kind: GeneratorKind) -> None:
    def shapes(kind: GeneratorKind) -> list[torch.Size]:
        return [parameter.shape for parameter in make_generator(kind, 8, (3, *size), torch.device("cpu")).parameters()]

    others: dict[str, GeneratorKind] = {"genie": "light", "light": "genie"}
    assert shapes("auto") == shapes(kind) != shapes(others[kind])


def test_light_generator_does_a_fraction_of_the_work_at_224_pixels() -> None:
    work = []
    kinds: tuple[GeneratorKind, ...] = ("genie", "light")
    for kind in kinds:
        generator = make_generator(kind, 256, (3, 224, 224), torch.device("meta"))
        with FlopCounterMode(display=False) as counter:
            generator(torch.zeros(1, *generator.latent_shape, device="meta"))
        work.append(counter.get_total_flops())
    assert work[1] < work[0] / 5


def test_setting_chooses_the_generator(tiny: FloatModel) -> None:
    made = {
        kind: pixels(QUICK.model_copy(update={"generator": kind}).synthesize(tiny, 4, Rng(0)))
        for kind in ("auto", "genie", "light")
    }
    assert torch.equal(made["auto"], made["genie"]) and not torch.equal(made["auto"], made["light"])


def test_generator_starts_from_the_same_distributions_as_torch() -> None:
    generator = make_generator("genie", 256, (3, 8, 8), torch.device("cpu"))
    generator.reset(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for mine, torchs in (
        (generator.linear, nn.Linear(256, 512)),
        (generator.convs[0], nn.Conv2d(128, 64, 3)),
        (generator.convs[1], nn.Conv2d(64, 3, 3)),
    ):
        assert mine is not None and torchs.bias is not None
        assert mine.weight.shape == torchs.weight.shape and mine.bias.shape == torchs.bias.shape
        assert float(mine.weight.detach().std()) == pytest.approx(float(torchs.weight.detach().std()), rel=0.05)
        assert float(mine.weight.detach().abs().max()) <= float(torchs.weight.detach().abs().max()) * 1.02
        assert float(mine.bias.detach().abs().max()) <= float(mine.weight.detach().abs().max()) * 1.02
    assert torch.equal(generator.norms[0].weight, torch.ones(128)) and not generator.norms[1].bias.any()


def test_rates_drive_what_their_names_say(tiny: FloatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Learner]] = []

    def spy(network: object, make_images: Callable[[], torch.Tensor], learners: list[Learner], **rest: object):  # type: ignore[no-untyped-def]
        seen.append(list(learners))
        return make_images().detach()

    monkeypatch.setattr(genie_d, "invert", spy)
    GenieD(batch_size=4, latent_lr=0.3, generator_lr=0.02, latent_size=8).synthesize(tiny, 4, Rng(0))
    of_latents, of_generator = (learner.optimizer.param_groups[0] for learner in seen[0])
    assert [tuple(p.shape) for p in of_latents["params"]] == [(4, 8)]
    assert len(of_generator["params"]) == 10
    assert float(of_latents["lr"]) == pytest.approx(0.3) and float(of_generator["lr"]) == pytest.approx(0.02)

    GenieD(batch_size=4, latent_lr=0.3, generator="light", generator_decay=0.5).synthesize(tiny, 4, Rng(0))
    maps, weights = (learner.schedule for learner in seen[1])
    assert isinstance(maps, ExponentialSchedule) and isinstance(weights, ExponentialSchedule)
    assert (maps.factor, maps.every) == (weights.factor, weights.every) == (0.5, 100)
    assert seen[1][0].optimizer.param_groups[0]["lr"] is maps.rate


def test_defaults_are_the_effective_values_of_the_authors() -> None:
    method = GenieD()
    assert (method.latent_lr, method.generator_lr, method.iterations, method.batch_size) == (0.1, 0.01, 4000, 128)
    assert (method.generator_decay, method.generator_decay_every, method.latent_patience) == (0.95, 100, 100)
    assert method.statistics == "batch" and method.swing


@pytest.mark.parametrize("count", [1, 4, 10])
def test_exact_count_in_pixel_space(tiny: FloatModel, count: int) -> None:
    before = tiny.fingerprint
    state = torch.get_rng_state()
    images = QUICK.synthesize(tiny, count, Rng(0))
    assert len(images) == count
    assert images.manifest.framing == "cropped" and images.manifest.dtype == "float16"
    assert images.manifest.image_size == (12, 12) and images.manifest.method == "genie_d"
    assert images.manifest.settings == QUICK.model_dump(mode="json")
    assert images.manifest.model_fingerprint == tiny.fingerprint == before
    assert torch.equal(torch.get_rng_state(), state)
    if count == 4:  # one whole batch: the generator's last layer gives it mean 0 and deviation 1
        normalized = model_inputs(images, tiny.preprocess)
        assert float(normalized.mean()) == pytest.approx(0, abs=0.01)
        assert float(normalized.std()) == pytest.approx(1, abs=0.05)


def test_same_seed_same_images_and_another_seed_others(tiny: FloatModel) -> None:
    first, second, other = (pixels(QUICK.synthesize(tiny, 6, Rng(seed))) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_batches_are_independent_of_the_count(tiny: FloatModel) -> None:
    few, many = (pixels(QUICK.synthesize(tiny, count, Rng(0))) for count in (4, 8))
    assert torch.equal(few, many[:4])
    assert not torch.equal(many[:4], many[4:])


def test_resumed_run_ends_with_the_same_bytes(tiny: FloatModel, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    whole = QUICK.synthesize(tiny, 10, Rng(0), writer=writer(tmp_path / "whole", tiny, 10))
    interrupted = writer(tmp_path / "resumed", tiny, 10)
    append = interrupted.append

    def append_once(images: torch.Tensor, *more: object) -> None:
        if interrupted.finished_parts == 1:
            raise Stopped
        append(images, *more)  # type: ignore[arg-type]

    interrupted.append = append_once  # type: ignore[method-assign, assignment]  # stands for a kill
    with pytest.raises(Stopped):
        QUICK.synthesize(tiny, 10, Rng(0), writer=interrupted)
    again = writer(tmp_path / "resumed", tiny, 10)
    assert (again.finished_parts, again.finished_count) == (1, 4)
    resumed = QUICK.synthesize(tiny, 10, Rng(0), writer=again)
    assert len(resumed) == len(whole) == 10
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "resumed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    assert torch.equal(pixels(whole), pixels(QUICK.synthesize(tiny, 10, Rng(0))))


def test_finished_set_is_returned_as_it_is(tiny: FloatModel, tmp_path: Path) -> None:
    first = QUICK.synthesize(tiny, 5, Rng(0), writer=writer(tmp_path / "set", tiny, 5))
    again = QUICK.synthesize(tiny, 5, Rng(0), writer=writer(tmp_path / "set", tiny, 5))
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("size", [(13, 9), (32, 20)])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_any_size_and_precision(make_model: MakeModel, size: tuple[int, int], compute_dtype: str) -> None:
    method = QUICK.model_copy(update={"compute_dtype": compute_dtype})
    images = method.synthesize(make_model(size=size), 5, Rng(0))
    assert pixels(images).shape == (5, 3, *size)
    assert bool(pixels(images).isfinite().all())


def test_loss_falls_over_a_batch(tiny: FloatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    monkeypatch.setattr(Bar, "advance", lambda self, steps=1, **fields: shown.extend(fields.values()))
    GenieD(batch_size=16, iterations=100, latent_size=16).synthesize(tiny, 16, Rng(0))
    assert len(shown) == 3 and shown[2] < 0.8 * shown[0], shown


def test_network_without_batch_norm_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"genie_d needs; use a method that does not: .*noise"):
        QUICK.synthesize(make_model(nn.Conv2d(3, 2, 1)), 4, Rng(0))


def test_no_images_is_an_error(tiny: FloatModel) -> None:
    with pytest.raises(InputError, match="count is 0; ask for at least 1 image"):
        QUICK.synthesize(tiny, 0, Rng(0))


def test_rate_that_is_too_high_is_named(tiny: FloatModel) -> None:
    method = GenieD(batch_size=4, iterations=100, latent_size=8, generator_lr=1e38)
    with pytest.raises(InputError, match=r"loss of batch 0 is .* lower generator_lr \(now 1e\+38\) or latent_lr"):
        method.synthesize(tiny, 4, Rng(0))
