from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

import diffusers
from tests.small_pipeline import WIDTH, build_small_pipeline

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.diffusion.latent import LatentDiffusion
from synthquant.diffusion.text_to_image import TextToImagePipeline

PROMPT = "a photo of a cat in the style of <real>"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return build_small_pipeline()


@pytest.fixture
def networks(pipeline: Any) -> LatentDiffusion:
    return LatentDiffusion(TextToImagePipeline(pipeline, "small", torch.device("cpu")))


def test_sizes(networks: LatentDiffusion) -> None:
    assert (networks.width, networks.timesteps, networks.image_size) == (WIDTH, 1000, (32, 32))


def test_moments_are_those_of_the_scaled_latents(networks: LatentDiffusion, pipeline: Any) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, deviation = networks.moments(images).chunk(2, 1)
    posterior = pipeline.vae.encode(images).latent_dist
    torch.testing.assert_close(mean, posterior.mean * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(deviation, posterior.std * pipeline.vae.config.scaling_factor)


def test_a_free_vector_reads_as_the_token_it_equals(networks: LatentDiffusion, pipeline: Any) -> None:
    tokens = networks.tokenize([PROMPT, PROMPT.replace("cat", "ship")], "<real>")
    assert tokens.places.sum(1).tolist() == [1, 1]
    text = networks.text(tokens.rows(torch.tensor([1])), networks.word_vector("dark"))
    expected, _ = pipeline.encode_prompt("a photo of a ship in the style of dark", "cpu", 1, False)
    torch.testing.assert_close(text, expected)
    assert "<real>" not in pipeline.tokenizer.get_vocab()
    assert not pipeline.text_encoder.get_input_embeddings()._forward_hooks


def test_a_word_of_several_tokens_starts_from_their_mean(networks: LatentDiffusion, pipeline: Any) -> None:
    ids = pipeline.tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(ids) > 1
    table = pipeline.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(networks.word_vector("zebra"), table[ids].mean(0))
    with pytest.raises(InputError, match="is no word to start from"):
        networks.word_vector("")


def test_the_loss_is_the_error_of_the_predicted_noise(networks: LatentDiffusion, pipeline: Any) -> None:
    torch.manual_seed(0)
    latents, noise, text = torch.randn(2, 6, 16, 16), torch.randn(2, 6, 16, 16), torch.randn(2, 16, WIDTH)
    times = torch.tensor([10, 900])
    noised = pipeline.scheduler.add_noise(latents, noise, times)
    predicted = pipeline.unet(noised, times, text).sample
    torch.testing.assert_close(networks.loss(latents, noise, times, text), (predicted - noise).square().mean())


def test_the_loss_of_a_network_that_predicts_velocity() -> None:
    pipeline = build_small_pipeline()
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    networks = LatentDiffusion(TextToImagePipeline(pipeline, "small", torch.device("cpu")))
    latents, noise, text = torch.randn(1, 6, 16, 16), torch.randn(1, 6, 16, 16), torch.randn(1, 16, WIDTH)
    times = torch.tensor([500])
    predicted = pipeline.unet(pipeline.scheduler.add_noise(latents, noise, times), times, text).sample
    wanted = pipeline.scheduler.get_velocity(latents, noise, times)
    torch.testing.assert_close(networks.loss(latents, noise, times, text), (predicted - wanted).square().mean())


def test_the_gradient_of_the_vector_is_that_of_finite_differences(networks: LatentDiffusion) -> None:
    torch.manual_seed(0)
    tokens = networks.tokenize([PROMPT], "<real>")
    latents, noise, times = torch.randn(1, 6, 16, 16), torch.randn(1, 6, 16, 16), torch.tensor([300])
    vector = networks.word_vector("imagenet").requires_grad_()
    (gradient,) = torch.autograd.grad(networks.loss(latents, noise, times, networks.text(tokens, vector)), [vector])
    step = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (
            networks.loss(latents, noise, times, networks.text(tokens, vector + sign * 0.5 * step)).item()
            for sign in (1, -1)
        )
    assert up - down == pytest.approx(gradient.norm().item(), rel=0.1)


def test_tokens_that_do_not_do(networks: LatentDiffusion) -> None:
    with pytest.raises(InputError, match="already has the token 'cat</w>'"):
        networks.tokenize(["a cat</w>"], "cat</w>")
    with pytest.raises(InputError, match="is longer than the 16 tokens"):
        networks.tokenize(["photo of the " * 8 + "<real>"], "<real>")


@pytest.mark.parametrize("change", ["flow", "no text encoder", "distilled"])
def test_other_builds_are_refused(change: str) -> None:
    pipeline = build_small_pipeline()
    if change == "flow":
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    elif change == "distilled":
        pipeline.unet.register_to_config(time_cond_proj_dim=32)
    else:
        pipeline.text_encoder = None
    with pytest.raises(UnsupportedModelError, match=r"Stable Diffusion 1 and 2|distilled for a few steps"):
        LatentDiffusion(TextToImagePipeline(pipeline, "small", torch.device("cpu")))
