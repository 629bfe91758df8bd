"""The diffusion models of the zoo: prompts, training, saved folders and their checks, all at the smallest size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from diffusers import DDIMPipeline, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import autoencoder
import check_generators
import generators
import prompts
import train_cifar_ddpm as ddpm
import train_cifar_text2image as text2image
from synthquant.models.zoo import CIFAR10_CLASSES, NETWORKS
from synthquant.synthesize.prompts import STYLE_TEMPLATE, TEMPLATES

COMMON = ("--size", "tiny", "--batch-size", 4, "--limit", 16, "--round-steps", 1, "--save-seconds", 0)


@dataclass(frozen=True)
class Trained:
    text2image: Path
    ddpm: Path


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both models after two steps, in a training that was stopped after each round."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for script, extra, calls in ((text2image, ("--autoencoder-steps", 1), 2), (ddpm, (), 2)):
            arguments = ["--train", images, "--out", folder, "--steps", 2, *COMMON, *extra, "--minutes", 0]
            patch.setattr("sys.argv", ["script", *map(str, arguments), "--device", "cpu"])
            for _ in range(calls):
                assert not (folder / script.NAME).exists()
                script.main()
    return Trained(folder / text2image.NAME, folder / ddpm.NAME)


def test_every_word_of_a_prompt_is_one_token() -> None:
    tokenizer = prompts.build_tokenizer()
    assert len(TEMPLATES) == 27
    assert all(len(tokenizer.tokenize(word)) == 1 for word in prompts.vocabulary_words())
    longest = STYLE_TEMPLATE.format("automobile", "colorful")
    assert len(tokenizer(longest).input_ids) <= prompts.MAX_TOKENS
    assert tokenizer.decode(tokenizer("Photo of a Frog").input_ids, skip_special_tokens=True) == "photo of a frog"
    assert tokenizer.unk_token_id not in tokenizer("zebra", add_special_tokens=False).input_ids


def test_style_words_follow_the_image() -> None:
    gray = torch.stack([torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (10, 100, 200)])
    assert prompts.style_levels(gray)[:, 0].tolist() == [0, 1, 2]
    colours = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    colours[1, 0], colours[2, 0] = 150, 250
    assert prompts.style_levels(colours)[:, 1].tolist() == [0, 1, 2]


def test_prompts_are_drawn_by_class_with_a_tenth_empty_and_a_tenth_of_style() -> None:
    torch.manual_seed(0)
    tokenizer = prompts.build_tokenizer()
    table = text2image.Prompts(tokenizer, torch.device("cpu"))
    ids = table.draw(torch.full((2000,), 6), torch.full((2000, 3), 2))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    empty = sum(text == "" for text in texts)
    style = sum("in the style of" in text for text in texts)
    assert 140 < empty < 260 and 140 < style < 260
    assert all("frog" in text for text in texts if text)
    assert {text.split()[-1] for text in texts if "style" in text} == {"bright", "colorful", "sharp"}


def test_the_text_encoder_learns_with_the_unet() -> None:
    torch.manual_seed(0)
    size = text2image.SIZES["tiny"]
    tokenizer = prompts.build_tokenizer()
    table = text2image.Prompts(tokenizer, torch.device("cpu"))
    labels, levels = torch.arange(20) % 2, torch.ones(20, 3, dtype=torch.int64)
    moments = torch.randn(40, 12, 16, 16).abs()
    trainer = text2image.TextToImageTrainer(
        text2image.build_unet(size), text2image.build_text_encoder(size, tokenizer), table, moments, 1.0,
        labels, levels, torch.device("cpu"), 16, 3e-3, False,
    )  # fmt: skip
    before = {name: value.clone() for name, value in trainer.text_encoder.named_parameters()}
    trainer.begin_round()
    for _ in range(3):
        trainer.step(1.0)
    moved = [name for name, value in trainer.text_encoder.named_parameters() if not torch.equal(before[name], value)]
    assert any("token_embedding" in name for name in moved) and any("q_proj" in name for name in moved)


def test_text2image_folder_opens_as_stable_diffusion(trained: Trained) -> None:
    weights = load_file(trained.text2image / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(value.dtype == torch.float16 for value in weights.values())
    pipeline = StableDiffusionPipeline.from_pretrained(trained.text2image)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype} == {torch.float32}
    torch.testing.assert_close(pipeline.unet.conv_in.weight.data.half(), weights["conv_in.weight"])
    drawn = [
        pipeline(
            ["photo of a cat"] * 2, guidance_scale=3.5, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for _ in range(2)
    ]  # fmt: skip
    assert drawn[0].shape == (2, 32, 32, 3) and np.array_equal(*drawn)
    card = json.loads((trained.text2image / "card.json").read_text())
    assert card["steps"] == 2 and card["autoencoder"]["steps"] == 1
    assert card["data"].startswith("training images (second half: 8)")


def test_the_pipeline_sees_what_training_saw(trained: Trained) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained.text2image)
    prompt = "close-up photo of the truck"
    text, empty = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=True)
    ids = prompts.encode(prompts.build_tokenizer(), [prompt, ""])
    with torch.no_grad():
        expected = pipeline.text_encoder(ids)[0]
    torch.testing.assert_close(torch.cat([text, empty]), expected)
    assert torch.equal(pipeline.scheduler.alphas_cumprod, generators.DDIMScheduler(**generators.NOISE).alphas_cumprod)
    assert pipeline.scheduler.config.prediction_type == "epsilon" and not pipeline.scheduler.config.clip_sample


def test_a_learned_token_finds_its_place(trained: Trained, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained.text2image)
    vector = torch.randn(16)
    save_file({"<shots>": vector}, tmp_path / "token.safetensors")
    pipeline.load_textual_inversion(tmp_path / "token.safetensors", token="<shots>")
    ids = pipeline.tokenizer(STYLE_TEMPLATE.format("cat", "<shots>")).input_ids
    assert len(ids) == 12
    torch.testing.assert_close(pipeline.text_encoder.get_input_embeddings().weight[ids[-2]].data, vector)


def test_ddpm_folder_opens_and_has_what_q_diffusion_needs(trained: Trained) -> None:
    pipeline = DiffusionPipeline.from_pretrained(trained.ddpm)
    assert isinstance(pipeline, DDIMPipeline) and pipeline.unet.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 32, 32, 3)
    names = [name for name, _ in pipeline.unet.named_modules()]
    assert any(".attentions." in name for name in names)
    # A skip convolution that reads the concatenation of two features: more channels in than the level has.
    resnet = pipeline.unet.up_blocks[0].resnets[0]
    assert resnet.conv_shortcut is not None and resnet.conv_shortcut.in_channels == 32


def test_the_size_for_a_cpu_reads_the_text_at_8x8_only() -> None:
    size = text2image.SIZES["cpu"]
    unet = text2image.build_unet(size).eval()
    places: list[int] = []
    for name, part in unet.named_modules():
        if name.endswith(".attn2"):  # attention to the text
            part.register_forward_pre_hook(lambda _, args: places.append(args[0].shape[1]))
    with torch.no_grad():
        noise = unet(torch.zeros(1, 6, 16, 16), 5, torch.zeros(1, 16, size.text)).sample
    assert noise.shape == (1, 6, 16, 16)
    assert len(places) >= 3 and set(places) == {64}


def test_full_sizes_fit_the_budget() -> None:
    size = text2image.SIZES["small"]
    parts = (
        text2image.build_unet(size),
        text2image.build_text_encoder(size, prompts.build_tokenizer()),
        autoencoder.build_autoencoder(size.autoencoder),
        ddpm.build_unet(ddpm.SIZES["small"]),
        *(entry.build(10) for entry in NETWORKS.values()),
    )
    numbers = [sum(value.numel() for value in part.state_dict().values()) for part in parts]
    assert 2 * max(numbers) < 16e6
    assert 2 * sum(numbers) < 39.8e6


def test_latents_are_scaled_to_one() -> None:
    torch.manual_seed(0)
    model = autoencoder.build_autoencoder((16, 16))
    moments = autoencoder.encode_all(model, torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), batch_size=4)
    assert moments.shape == (6, 12, 16, 16)
    factor = autoencoder.scale_latents(model, moments)
    mean, std = moments.chunk(2, 1)
    latents = factor * (mean + std * torch.randn_like(mean))
    assert model.config.scaling_factor == factor
    assert latents.square().mean().item() == pytest.approx(1.0, rel=0.1)


def test_checks_write_figures_and_sheets(
    run_script: Callable[..., None], trained: Trained, images: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_file(NETWORKS["cifar10-resnet20"].build(10).state_dict(), tmp_path / "weights.safetensors")
    run_script(
        check_generators, "--text2image", trained.text2image, "--ddpm", trained.ddpm, "--train", images,
        "--test", images, "--classifier", f"cifar10-resnet20={tmp_path / 'weights.safetensors'}",
        "--out", tmp_path / "out", "--count", 20, "--fid-count", 30, "--steps", 1, "--columns", 2, "--batch-size", 16,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((tmp_path / "out" / "cifar10-text2image.json").read_text())
    assert found["recognised"]["cifar10-resnet20"]["samples"] == 20
    assert set(found["recognised"]["cifar10-resnet20"]["by_class"]) == set(CIFAR10_CLASSES)
    assert found["empty"] == {"count": 20, "black": 0, "constant": 0}
    assert found["fid"]["samples"] == 30 and found["fid"]["real_images"] == 20 and found["fid"]["half_to_half"] > 0
    with Image.open(tmp_path / "out" / "cifar10-text2image.png") as sheet:
        assert sheet.size == (2 * 64, 10 * 64)
    assert json.loads((tmp_path / "out" / "cifar10-ddpm.json").read_text())["fid"]["real_images"] == 40


def test_black_and_constant_images_are_counted() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    images[1] = 3
    images[2] = torch.tensor([200, 10, 90], dtype=torch.uint8).view(3, 1, 1)
    assert check_generators.empty_images(images) == {"count": 4, "black": 1, "constant": 2}


def test_a_contact_sheet_leaves_columns_out_to_stay_small() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    whole = check_generators.contact_sheet(images, 4)
    small = check_generators.contact_sheet(images, 4, limit=len(whole) - 1)
    assert len(small) < len(whole)
    with Image.open(check_generators.io.BytesIO(small)) as sheet:
        assert sheet.width < 4 * 16
    with Image.open(check_generators.io.BytesIO(whole)) as sheet:
        pixels = torch.from_numpy(np.array(sheet))[::2, ::2]
    assert torch.equal(pixels[8:16, 16:24], images[6].permute(1, 2, 0))
