from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

import diffusers
from tests.small_pipeline import WIDTH, build_small_pipeline

from synthquant.core.errors import InputError, MissingExtraError, ModelError, UnknownNameError, UnsupportedModelError
from synthquant.core.settings import parse_settings
from synthquant.diffusion.embedding import Embedding
from synthquant.diffusion.library import SCHEDULERS, quiet
from synthquant.diffusion.pipelines import Sampling
from synthquant.diffusion.text_to_image import TextToImagePipeline, open_text_to_image

CPU = torch.device("cpu")
FAST = Sampling(steps=2, guidance=3.5)
PROMPTS = ["photo of a cat", "photo of a ship", "rendition of the dog"]


@pytest.fixture(scope="module")
def generator(generator_folder: Path) -> TextToImagePipeline:
    return open_text_to_image(str(generator_folder))


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_an_image_is_the_same_alone_and_within_a_batch(generator_folder: Path, scheduler: str | None) -> None:
    generator = open_text_to_image(str(generator_folder), scheduler=scheduler)
    together = generator.draw(PROMPTS, [1, 2, 3], FAST).images
    alone = torch.cat([generator.draw([prompt], [seed], FAST).images for seed, prompt in enumerate(PROMPTS, 1)])
    assert together.shape == (3, 3, 32, 32) and together.dtype == torch.uint8
    assert (together.int() - alone.int()).abs().max() <= 1  # of 255: sums are rounded otherwise


def test_prompt_seed_guidance_and_negative_prompt_count(generator: TextToImagePipeline) -> None:
    def draw(prompt: str = PROMPTS[0], seed: int = 1, **sampling: Any) -> torch.Tensor:
        return generator.draw([prompt], [seed], FAST.model_copy(update=sampling)).images

    assert torch.equal(draw(), draw())
    others = [draw(PROMPTS[1]), draw(seed=2), draw(guidance=1.0), draw(negative_prompt="blurry"), draw(steps=3)]
    assert all(not torch.equal(draw(), other) for other in others)
    assert torch.equal(draw(guidance=1.0), draw(guidance=1.0, negative_prompt="blurry"))  # nothing to guide away from
    assert draw(height=16, width=24).shape == (1, 3, 16, 24)


def test_images_are_those_of_the_pipeline_itself(generator: TextToImagePipeline) -> None:
    drawn = generator.draw(PROMPTS, [5, 6, 7], FAST.model_copy(update={"negative_prompt": "dark"})).images
    pipeline = build_small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        negative_prompt=["dark"] * 3,
        guidance_scale=3.5,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        output_type="np",
    ).images
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round()
    assert (drawn.float() - expected).abs().max() <= 1


def test_a_prompt_is_encoded_once(generator_folder: Path) -> None:
    generator = open_text_to_image(str(generator_folder))
    rows: list[int] = []
    generator.pipeline.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    generator.draw([PROMPTS[0], PROMPTS[1], PROMPTS[0]], [1, 2, 3], FAST)
    first = sum(rows)
    assert first == 4  # two prompts, and the empty one with another empty one beside it
    generator.draw([PROMPTS[1], PROMPTS[0]], [4, 5], FAST)
    assert sum(rows) == first


def test_blanked_and_broken_images_are_reported() -> None:
    class Result:
        images = torch.stack([torch.full((3, 8, 8), value) for value in (0.5, 0.0, float("nan"), float("inf"))])
        nsfw_content_detected = (False, True, False, False)

    pipeline = build_small_pipeline()
    generator = TextToImagePipeline(pipeline, "small", CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipeline), "__call__", lambda self, **arguments: Result())
        drawn = generator.draw(["a"] * 4, [1, 2, 3, 4], FAST)
    assert drawn.unsafe == (False, True, False, False)
    assert drawn.finite == (True, True, False, False)
    assert drawn.images[:, 0, 0, 0].tolist() == [128, 0, 0, 0]


def test_the_fingerprint_follows_weights_scheduler_and_embedding(generator_folder: Path) -> None:
    first = open_text_to_image(str(generator_folder))
    assert first.fingerprint == open_text_to_image(str(generator_folder)).fingerprint
    others = [
        open_text_to_image(str(generator_folder), scheduler="euler").fingerprint,
        open_text_to_image(str(generator_folder), dtype="bfloat16").fingerprint,
        TextToImagePipeline(build_small_pipeline(seed=1), "other", CPU).fingerprint,
    ]
    before = first.fingerprint
    first.add_embedding(Embedding("<a>", torch.ones(1, WIDTH)), "here")
    assert len({before, first.fingerprint, *others}) == 5


def test_precision_and_silence(generator_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generator = open_text_to_image(str(generator_folder), dtype="bfloat16")
    assert generator.pipeline.unet.dtype == torch.bfloat16
    generator.draw(PROMPTS[:1], [1], FAST)
    assert capfd.readouterr() == ("", "")


def test_quiet_leaves_the_libraries_as_they_were() -> None:
    logging = diffusers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet():
        assert not logging.is_progress_bar_enabled()
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_an_embedding_is_read_in_its_place(generator_folder: Path) -> None:
    generator = open_text_to_image(str(generator_folder))
    prompt = "photo of a cat in the style of <real>"
    before = generator.draw([prompt], [1], FAST).images
    token = generator.add_embedding(Embedding("<real>", 20 * torch.randn(1, WIDTH)), "here")
    assert token == "<real>"
    after = generator.draw([prompt], [1], FAST).images
    assert not torch.equal(before, after)
    with pytest.raises(ModelError, match=r"'<real>', which .* already has"):
        generator.add_embedding(Embedding("<real>", torch.ones(1, WIDTH)), "here")


def test_an_embedding_of_another_width_is_refused(generator: TextToImagePipeline) -> None:
    with pytest.raises(ModelError, match=f"width 5, the text encoder of .* has width {WIDTH}"):
        generator.add_embedding(Embedding("<real>", torch.ones(1, 5)), "here")


def test_a_long_prompt_is_found(generator: TextToImagePipeline) -> None:
    assert generator.is_cut("photo of the " * 9) and not generator.is_cut("photo of a cat")


def test_height_needs_width() -> None:
    with pytest.raises(InputError, match="height and width or neither"):
        parse_settings(Sampling, {"height": 64}, "here")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/none", "there is no pipeline folder .*/none; give the folder"),
        ("none", "there is no pipeline folder none"),
        ("{folder}/model_index.json", "is a file; give the folder"),
        ("{folder}/unet", "is no diffusers pipeline: it has no model_index.json"),
        ("zoo/cifar10-ddpm", "zoo/cifar10-ddpm is not bundled with this version|not a text-to-image pipeline"),
        ("zoo/nothing", "unknown bundled diffusion model 'nothing'"),
        ("owner/not-in-the-cache", "pipeline owner/not-in-the-cache cannot be opened: .*it is no folder here"),
    ],
)
def test_no_such_generator(generator_folder: Path, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_text_to_image(source.format(folder=generator_folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["DDIMPipeline", "StableDiffusionImg2ImgPipeline", "TextToVideoSDPipeline"])
def test_a_pipeline_of_another_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UnsupportedModelError, match=f"is a {name}, (not a text-to-image|which does not make images)"):
        open_text_to_image(str(tmp_path))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"])
def test_text_to_image_pipelines_are_told_apart_from_others(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match="cannot be opened"):  # it has no weights, and that is all that is wrong
        open_text_to_image(str(tmp_path))


def test_a_pipeline_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MyPipeline"}))
    with pytest.raises(UnsupportedModelError, match=r"is a MyPipeline, which diffusers .* does not have"):
        open_text_to_image(str(tmp_path))


def test_a_wrong_scheduler_device_size_and_no_prompt(generator_folder: Path, generator: TextToImagePipeline) -> None:
    with pytest.raises(UnknownNameError, match="unknown scheduler 'ddimm'; did you mean 'ddim'"):
        open_text_to_image(str(generator_folder), scheduler="ddimm")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' cannot be used"):
            open_text_to_image(str(generator_folder), device="cuda")
    with pytest.raises(InputError, match=r"cannot draw: ValueError: .*divisible by 8"):
        generator.draw(["a"], [1], Sampling(height=12, width=12))
    with pytest.raises(InputError, match="no prompts"):
        generator.draw([], [], FAST)


def test_without_diffusers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'synthquant\[diffusion\]'"):
        open_text_to_image("owner/name")
