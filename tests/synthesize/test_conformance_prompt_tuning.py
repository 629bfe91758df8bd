"""Prompt tuning of GenQ (arXiv:2312.05272, eq. 10 and 11): Adam on the vector at a constant rate, and nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests.small_pipeline import WIDTH, build_small_pipeline

from synthquant.core.progress import QUIET
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.diffusion.latent import LatentDiffusion
from synthquant.diffusion.text_to_image import TextToImagePipeline
from synthquant.synthesize.prompt_tuning import PromptTuning, Shots, _draw, _encode_shots, tune_prompt

STEPS, RATE = 7, 0.05


def tuned(monkeypatch: pytest.MonkeyPatch, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end of a vector whose loss falls as its product with `slope` does."""
    generator = TextToImagePipeline(build_small_pipeline(), "small", torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = ImageSet.from_tensors(pixels, labels=torch.arange(2), framing="raw")
    monkeypatch.setattr(LatentDiffusion, "text", lambda self, tokens, vector: vector.expand(len(tokens.ids), 1, -1))
    monkeypatch.setattr(LatentDiffusion, "loss", lambda self, latents, noise, times, text: (text * slope).sum())
    settings = PromptTuning(iterations=STEPS, batch_size=2, lr=RATE)
    found = tune_prompt(generator, images, ("cat", "dog"), settings, Rng(0))
    return LatentDiffusion(generator).word_vector("imagenet"), found.vectors[0]


def test_without_a_gradient_the_vector_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight decay, which the diffusers example has (AdamW, 1e-2)."""
    start, end = tuned(monkeypatch, torch.zeros(WIDTH))
    assert bool((start != 0).any()) and torch.equal(start, end)


def test_adam_at_a_constant_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a constant slope each step of Adam is the rate against its sign, however steep the slope is."""
    slope = torch.linspace(-2.1, 3, WIDTH).roll(3)
    start, end = tuned(monkeypatch, slope)
    torch.testing.assert_close(end, start - STEPS * RATE * slope.sign(), rtol=1e-4, atol=1e-4)


def test_defaults_are_those_of_the_paper() -> None:
    settings = PromptTuning()
    assert (settings.iterations, settings.batch_size, settings.lr) == (50_000, 32, 5e-4)
    assert (settings.initial_word, settings.shots, settings.flip) == ("imagenet", 1, True)
    assert settings.template.format("dog", "<real>") == "a photo of a dog in the style of <real>"


def test_a_batch_is_drawn_as_the_objective_says() -> None:
    """Equation 11: images uniform, latents from their posteriors, unit Gaussian noise, times uniform over all steps."""
    networks = LatentDiffusion(TextToImagePipeline(build_small_pipeline(), "small", torch.device("cpu")))
    count, classes = 8000, torch.tensor([4, 7, 5])
    # Image i, mirrored or not (m), has latents of mean 100 i + 40 m and deviation 0.5 + 0.25 i.
    means = torch.arange(3.0).view(3, 1) * 100 + torch.tensor([0.0, 40.0])
    moments = torch.stack([means, (0.5 + 0.25 * torch.arange(3.0)).view(3, 1).expand(3, 2)], 2)[..., None, None].half()
    latents, drawn, noise, times = _draw(Shots(moments, classes, ""), count, networks, Rng(0))
    values = latents.flatten()
    image, mirrored = (values + 20).div(100).floor().long(), (values + 20) % 100 >= 40
    assert torch.equal(classes[image], drawn), "a prompt names the class of its image"
    for index in range(3):
        share = float((image == index).float().mean())
        assert share == pytest.approx(1 / 3, abs=0.02)
        for flipped in (False, True):
            own = values[(image == index) & (mirrored == flipped)]
            assert len(own) / count == pytest.approx(1 / 6, abs=0.02)
            assert float(own.mean()) == pytest.approx(100 * index + 40 * flipped, abs=0.15)
            assert float(own.std()) == pytest.approx(0.5 + 0.25 * index, rel=0.1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.05) and float(noise.std()) == pytest.approx(1, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), values]))[0, 1])) < 0.05
    assert networks.timesteps == 1000 and int(times.min()) < 10 and int(times.max()) > 989
    assert float(times.double().mean()) == pytest.approx(499.5, abs=10) and len(times.unique()) > 900


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_encoded_as_they_are_and_mirrored(flip: bool) -> None:
    networks = LatentDiffusion(TextToImagePipeline(build_small_pipeline(), "small", torch.device("cpu")))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = ImageSet.from_tensors(pixels, labels=torch.tensor([1, 0]), framing="raw")
    shots = _encode_shots(networks, images, ("cat", "dog"), PromptTuning(flip=flip), Rng(0), QUIET)
    assert shots.classes.tolist() == [0, 1]
    inputs = pixels.flip(0).float() / 127.5 - 1
    views = [inputs, inputs.flip(3)] if flip else [inputs]
    wanted = torch.stack([networks.moments(view) for view in views], 1)
    torch.testing.assert_close(shots.moments.float(), wanted, rtol=1e-2, atol=1e-2)
