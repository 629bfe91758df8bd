"""Prompt tuning of GenQ (arXiv:2312.05272, eq. 10 and 11): Adam on the vector at a constant rate, and nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests.small_pipeline import WIDTH, build_small_pipeline

from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.diffusion.latent import LatentDiffusion
from synthquant.diffusion.pipelines import TextToImagePipeline
from synthquant.synthesize.prompt_tuning import PromptTuning, tune_prompt

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
