from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests.damage import Warned, damages
from tests.small_pipeline import WIDTH, build_small_pipeline

from synthquant.core.errors import DataError, InputError
from synthquant.core.progress import Bar
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.diffusion.latent import LatentDiffusion
from synthquant.diffusion.text_to_image import TextToImagePipeline
from synthquant.models.open import open_model
from synthquant.synthesize.prompt_tuning import PromptTuning, TuningState, draw_shots, tune_prompt
from synthquant.synthesize.text_to_image import TextToImage

NAMES = ("cat", "dog", "ship")
SMALL = PromptTuning(shots=2, iterations=6, batch_size=4, lr=0.05, checkpoint_every=2)


@pytest.fixture(scope="module")
def generator() -> TextToImagePipeline:
    return TextToImagePipeline(build_small_pipeline(), "small", torch.device("cpu"))


@pytest.fixture(scope="module")
def real() -> ImageSet:
    """Photographs of another size than the generator's: flat colours with some noise."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(40, 216, (12, 3, 1, 1), generator=generator)
    noise = torch.randint(-30, 31, (12, 3, 24, 40), generator=generator)
    return ImageSet.from_tensors((colours + noise).to(torch.uint8), labels=torch.arange(12) % 3, framing="raw")


def test_only_the_vector_changes_and_the_error_falls(generator: TextToImagePipeline, real: ImageSet) -> None:
    networks = LatentDiffusion(generator)
    before = {name: value.clone() for name, value in generator.pipeline.unet.state_dict().items()}
    table = generator.pipeline.text_encoder.get_input_embeddings().weight.clone()
    settings = SMALL.model_copy(update={"iterations": 40, "batch_size": 8, "flip": False})
    embedding = tune_prompt(generator, real, NAMES, settings, Rng(0))
    assert embedding.token == "<real>" and embedding.vectors.shape == (1, WIDTH)
    assert all(torch.equal(value, before[name]) for name, value in generator.pipeline.unet.state_dict().items())
    assert torch.equal(generator.pipeline.text_encoder.get_input_embeddings().weight, table)
    assert all(parameter.grad is None for parameter in generator.pipeline.unet.parameters())

    tokens = networks.tokenize([settings.template.format(name, "<real>") for name in NAMES], "<real>")
    source = torch.Generator().manual_seed(1)
    images = torch.stack([real[index].image[:, :24, 8:32] for index in range(12)]).float().div(127.5).sub(1)
    images = torch.nn.functional.interpolate(images, (32, 32))
    mean, deviation = networks.moments(images).chunk(2, 1)
    latents = (mean + deviation * torch.randn(mean.shape, generator=source)).repeat(8, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=source)
    times = torch.randint(0, 1000, (len(latents),), generator=source)

    def error(vector: torch.Tensor) -> float:
        with torch.no_grad():
            text = networks.text(tokens, vector)[torch.arange(len(latents)) % 3]
            return networks.loss(latents, noise, times, text).item()

    assert error(embedding.vectors[0]) < error(networks.word_vector("imagenet"))


def test_it_is_written_as_a_textual_inversion(generator: TextToImagePipeline, real: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "token.safetensors"
    embedding = tune_prompt(generator, real, NAMES, SMALL, Rng(0), path=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["token.safetensors"]
    pipeline = build_small_pipeline()
    pipeline.load_textual_inversion(path)  # as any user of diffusers does
    row = pipeline.tokenizer.convert_tokens_to_ids("<real>")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[row], embedding.vectors[0])
    assert TextToImagePipeline(pipeline, "small", torch.device("cpu")).draw is not None


def test_half_precision_has_the_same_gradient_and_nearly_the_same_token(real: ImageSet) -> None:
    def tuned(precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        states: list[TuningState] = []
        generator = TextToImagePipeline(build_small_pipeline().to(precision), "small", torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            start = TuningState.start
            patch.setattr(TuningState, "start", lambda *args: (states.append(start(*args)), states[0])[1])
            embedding = tune_prompt(generator, real, NAMES, SMALL, Rng(0))
        assert states[0].vector.dtype == torch.float32 and states[0].vector.grad is not None
        return embedding.vectors, states[0].vector.grad

    token, gradient = tuned(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        half_token, half_gradient = tuned(dtype)
        torch.testing.assert_close(half_gradient, gradient, rtol=0, atol=0.1 * gradient.abs().max().item())
        assert torch.nn.functional.cosine_similarity(half_token, token).item() > 0.99, dtype


@pytest.mark.parametrize("killed_after", [2, 4])
def test_killed_and_resumed_it_is_the_same(
    generator: TextToImagePipeline, real: ImageSet, tmp_path: Path, killed_after: int
) -> None:
    class Stop(BaseException):
        pass

    whole = tune_prompt(generator, real, NAMES, SMALL, Rng(0))
    path = tmp_path / "token.safetensors"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        original = LatentDiffusion.loss
        calls: list[int] = []

        def loss(self: LatentDiffusion, *args: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) > killed_after + 1:  # in the middle of two states
                raise Stop
            return original(self, *args)

        patch.setattr(LatentDiffusion, "loss", loss)
        tune_prompt(generator, real, NAMES, SMALL, Rng(0), path=path)
    state = path.with_name("token.state.safetensors")
    left = state.read_bytes()
    assert not path.exists()
    advanced: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "advance", lambda self, steps=1, **fields: advanced.append(steps))
        resumed = tune_prompt(generator, real, NAMES, SMALL, Rng(0), path=path)
    assert killed_after in advanced
    assert torch.equal(resumed.vectors, whole.vectors) and not state.exists()
    state.write_bytes(left)  # as a kill after the last file leaves it
    again = tune_prompt(generator, real, NAMES, SMALL, Rng(0), path=path)
    assert torch.equal(again.vectors, whole.vectors) and not state.exists()


def test_a_file_of_another_tuning_is_kept(generator: TextToImagePipeline, real: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "token.safetensors"
    tune_prompt(generator, real, NAMES, SMALL, Rng(0), path=path)
    content = path.read_bytes()
    changes = {
        "settings": (real, SMALL.model_copy(update={"lr": 0.1}), 0, NAMES),
        "seed": (real, SMALL, 1, NAMES),
        "images": (real.subset(list(range(11, -1, -1))), SMALL, 0, NAMES),
        "classes": (real, SMALL, 0, ("cat", "dog", "frog")),
    }
    for what, (images, settings, seed, names) in changes.items():
        with pytest.raises(
            InputError, match=f"holds a token that was tuned with other {what}|{'images' if seed else '-'}"
        ):
            tune_prompt(generator, images, names, settings, Rng(seed), path=path)
    assert path.read_bytes() == content


def test_a_damaged_state_is_left_alone_and_that_is_said(
    generator: TextToImagePipeline, real: ImageSet, tmp_path: Path
) -> None:
    path, other, progress = tmp_path / "new.safetensors", tmp_path / "other.safetensors", Warned()
    path.with_name("new.state.safetensors").write_bytes(b"broken")
    first = tune_prompt(generator, real, NAMES, SMALL, Rng(0), path=path, progress=progress)
    assert len(progress.warnings) == 1 and "new.state.safetensors is not as it was written" in progress.warnings[0]
    assert torch.equal(first.vectors, tune_prompt(generator, real, NAMES, SMALL, Rng(0), path=other).vectors)


def test_every_damage_to_a_state_is_found(tmp_path: Path) -> None:
    path, state = tmp_path / "a.state.safetensors", TuningState.start(torch.randn(4), 0.1)
    state.vector.grad = torch.ones(4)
    state.optimizer.step()
    state.step = 1
    state.save(path, {"seed": "0"})
    for what, content in damages(path.read_bytes(), 100):
        path.write_bytes(content)
        found, progress = TuningState.start(torch.zeros(4), 0.1), Warned()
        found.load(path, {"seed": "0"}, progress)
        whole = found.step == 1 and torch.equal(found.vector, state.vector) and not progress.warnings
        assert whole or (found.step == 0 and not found.vector.any() and len(progress.warnings) == 1), what


def test_shots_are_drawn_by_class(real: ImageSet) -> None:
    chosen = draw_shots(real, NAMES, 2, Rng(0))
    assert (chosen % 3).tolist() == [0, 0, 1, 1, 2, 2] and len(set(chosen.tolist())) == 6
    assert torch.equal(chosen, draw_shots(real, NAMES, 2, Rng(0)))
    assert any(not torch.equal(chosen, draw_shots(real, NAMES, 2, Rng(seed))) for seed in (1, 2, 3))


def test_images_that_do_not_do(generator: TextToImagePipeline, real: ImageSet) -> None:
    with pytest.raises(DataError, match="class 'cat' has 4 real images, shots asks for 5"):
        draw_shots(real, NAMES, 5, Rng(0))
    with pytest.raises(DataError, match="labels up to 2 but there are 2 class names"):
        draw_shots(real, NAMES[:2], 1, Rng(0))
    with pytest.raises(DataError, match="have no labels"):
        draw_shots(ImageSet.from_tensors(torch.zeros(2, 3, 8, 8)), NAMES, 1, Rng(0))


def test_settings_that_do_not_do(generator: TextToImagePipeline, real: ImageSet) -> None:
    for change, message in (
        ({"template": "a {}"}, "must have two places"),
        ({"initial_word": " "}, "is no word to start from"),
        ({"lr": 1e30, "iterations": 4}, "lower lr"),
    ):
        with pytest.raises(InputError, match=message):
            tune_prompt(generator, real, NAMES, SMALL.model_copy(update=change), Rng(0))


def test_tuned_within_the_method(generator_folder: Path, real: ImageSet, tmp_path: Path) -> None:
    from synthquant.synthesize.batches import open_writer

    pairs = torch.stack([real[index].image for index in range(10)])
    ImageSet.from_tensors(pairs, labels=torch.arange(10), framing="raw").save(tmp_path / "few")
    network = open_model("zoo/cifar10-resnet20")
    tuning = {"images": str(tmp_path / "few"), "iterations": 2, "batch_size": 2}
    method = TextToImage.model_validate({"generator": str(generator_folder), "steps": 1, "tuning": tuning})
    writer = open_writer(tmp_path / "set", "text_to_image", method, 3, 0, network)
    images = method.synthesize(network, 3, Rng(0), writer=writer)
    assert (tmp_path / "set" / "token.safetensors").is_file()
    assert all(text.endswith("in the style of <real>") for text in images.column("prompt"))
    in_memory = method.synthesize(network, 3, Rng(0))
    assert torch.equal(
        torch.stack([images[i].image for i in range(3)]), torch.stack([in_memory[i].image for i in range(3)])
    )
