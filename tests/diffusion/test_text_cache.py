"""Pipelines that take their text in other ways draw what they draw from the prompts themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

import diffusers
from tests.small_pipeline import WIDTH, build_small_pipeline
from transformers import CLIPTextModelWithProjection

from synthquant.core.errors import UnsupportedModelError
from synthquant.diffusion import text_cache
from synthquant.diffusion.embedding import Embedding
from synthquant.diffusion.pipelines import Sampling
from synthquant.diffusion.text_to_image import TextToImagePipeline

PROMPTS = ["photo of a cat", "photo of a ship"]


def changed_unet(unet: Any, **changes: Any) -> Any:
    values = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return diffusers.UNet2DConditionModel(**(values | changes)).eval()


def latent_consistency() -> Any:
    parts = dict(build_small_pipeline().components)
    parts["scheduler"] = diffusers.LCMScheduler(original_inference_steps=50)
    parts.pop("image_encoder", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts["unet"] = changed_unet(parts["unet"], time_cond_proj_dim=8)
    return diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def extra_large() -> Any:
    """Stable Diffusion XL: two text encoders, and a pooled text beside the tokens."""
    small = build_small_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        second = CLIPTextModelWithProjection(small.text_encoder.config).eval()
        second.get_input_embeddings().weight.data.mul_(20)
        unet = changed_unet(
            small.unet,
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )
    return diffusers.StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=second,
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=unet,
        scheduler=small.scheduler,
        add_watermarker=False,
    )


@pytest.mark.parametrize(
    ("build", "negative_prompt"), [(latent_consistency, ""), (extra_large, ""), (extra_large, "dark")]
)
def test_the_cache_changes_nothing(build: Any, negative_prompt: str) -> None:
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(steps=2, guidance=3.0, negative_prompt=negative_prompt)
    drawn = TextToImagePipeline(pipeline, "it", torch.device("cpu")).draw(PROMPTS, [1, 2], sampling).images
    more = {"negative_prompt": [negative_prompt] * 2} if negative_prompt else {}
    images = pipeline(
        PROMPTS,
        guidance_scale=3.0,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
        **more,
    ).images
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round()
    assert (drawn.float() - expected).abs().max() <= 1
    assert (drawn[0].int() - drawn[1].int()).abs().float().mean() > 1


def test_a_token_needs_a_pipeline_of_one_text_encoder() -> None:
    generator = TextToImagePipeline(extra_large(), "xl", torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="has not one text encoder"):
        generator.add_embedding(Embedding("<real>", torch.ones(1, WIDTH)), "token.safetensors")


def test_what_the_pipeline_does_not_take_is_refused() -> None:
    from synthquant.core.errors import InputError

    generator = TextToImagePipeline(latent_consistency(), "lcm", torch.device("cpu"))
    with pytest.raises(InputError, match="takes no negative_prompt; leave it out"):
        generator.draw(PROMPTS, [1, 2], Sampling(negative_prompt="dark"))


def test_unknown_pipelines_get_the_prompts_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        pass

    cache = text_cache.TextCache(Other(), torch.device("cpu"))
    assert cache.arguments(PROMPTS, 3.5, "") == {"prompt": PROMPTS}
    assert cache.arguments(PROMPTS, 3.5, "dark") == {"prompt": PROMPTS, "negative_prompt": ["dark", "dark"]}
    assert not cache.is_cut("word " * 1000)

    monkeypatch.setattr(text_cache, "CACHED_PROMPTS", 2)
    pipeline = build_small_pipeline()
    cache = text_cache.TextCache(pipeline, torch.device("cpu"))
    encoded: list[str] = []
    original = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda prompt, **more: (encoded.append(prompt), original(prompt, **more))[1]
    )
    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache.arguments([prompt], 1.0, "")
    assert encoded == [["a"], ["b"], ["c"], ["b"]]
