from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthquant.core.errors import DataError, InputError, ModelError, RecipeError
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.core.settings import parse_settings
from synthquant.data.image_set import ImageSet
from synthquant.data.store import ImageSetWriter
from synthquant.diffusion.embedding import Embedding, write_embedding
from synthquant.diffusion.pipelines import Drawn, Sampling
from synthquant.diffusion.text_to_image import open_text_to_image
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.synthesize.batches import open_writer
from synthquant.synthesize.text_to_image import TextToImage

Look = Callable[[str, int], Tensor]


@dataclass
class FakeGenerator:
    """Draws what a function of prompt and seed says, and counts."""

    look: Look
    unsafe: Callable[[str, int], bool] = lambda prompt, seed: False
    name: str = "fake"
    fingerprint: str = "f"
    batches: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Drawn:
        self.batches.append(len(prompts))
        self.prompts += prompts
        pairs = list(zip(prompts, seeds, strict=True))
        images = torch.stack([self.look(prompt, seed) for prompt, seed in pairs])
        unsafe = tuple(self.unsafe(prompt, seed) for prompt, seed in pairs)
        return Drawn(images, unsafe, (True,) * len(prompts))

    def is_cut(self, prompt: str) -> bool:
        return "gigantic" in prompt


def noise(prompt: str, seed: int) -> Tensor:
    return torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


class Heard(Progress):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeGenerator], FakeGenerator]:
    def put_in(generator: FakeGenerator) -> FakeGenerator:
        monkeypatch.setattr("synthquant.synthesize.text_to_image.open_text_to_image", lambda name, **options: generator)
        return generator

    return put_in


Use = Callable[[FakeGenerator], FakeGenerator]


@pytest.fixture(scope="module")
def network() -> FloatModel:
    return open_model("zoo/cifar10-resnet20")


def pixels(images: ImageSet) -> Tensor:
    return torch.stack([images[index].image for index in range(len(images))])


def test_images_come_with_all_that_makes_them_again(generator_folder: Path, network: FloatModel) -> None:
    method = TextToImage(generator=str(generator_folder), steps=2, batch_size=4)
    images = method.synthesize(network, 10, Rng(0))
    assert (images.manifest.dtype, images.manifest.framing, images.manifest.image_size) == ("uint8", "raw", (32, 32))
    assert images.labels is not None and sorted(images.labels.tolist()) == list(range(10))
    generator = open_text_to_image(str(generator_folder))
    for number in (0, 7):
        row = images[number]
        assert row.label is not None and network.class_names is not None
        assert row.columns["class_names"] == network.class_names[row.label]
        assert row.columns["prompt"] == row.columns["template"].format(row.columns["class_names"])
        assert row.columns["generator"] == generator.fingerprint
        again = generator.draw([row.columns["prompt"]], [row.columns["seed"]], Sampling(steps=2, guidance=3.5)).images[
            0
        ]
        assert (again.int() - row.image.int()).abs().max() <= 1


def test_the_batch_size_does_not_change_an_image(generator_folder: Path, network: FloatModel) -> None:
    sets = [
        TextToImage(generator=str(generator_folder), steps=1, batch_size=size).synthesize(network, 7, Rng(0))
        for size in (1, 3, 7)
    ]
    assert all(other.column("seed") == sets[0].column("seed") for other in sets[1:])
    assert all((pixels(other).int() - pixels(sets[0]).int()).abs().max() <= 1 for other in sets[1:])


def test_a_network_without_batch_norm_serves(use: Use, network: FloatModel) -> None:
    use(FakeGenerator(noise))
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    model = FloatModel(plain, network.preprocess, "plain", network.source, num_classes=10)
    assert len(TextToImage(classes="cifar10").synthesize(model, 5, Rng(0))) == 5


def test_bad_images_are_drawn_again_and_counted(use: Use, network: FloatModel, tmp_path: Path) -> None:
    # One seed in three is black, one in five is blanked by the safety checker; both follow from the seed.
    def look(prompt: str, seed: int) -> Tensor:
        return torch.zeros(3, 8, 8, dtype=torch.uint8) if seed % 3 == 0 else noise(prompt, seed)

    use(FakeGenerator(look, unsafe=lambda prompt, seed: seed % 5 == 0))
    method, heard = TextToImage(batch_size=8), Heard()
    writer = open_writer(tmp_path / "set", "text_to_image", method, 40, 0, network)
    images = method.synthesize(network, 40, Rng(0), writer=writer, progress=heard)
    assert len(images) == 40 and images.manifest.quality["black"] == []
    assert all(seed % 3 and seed % 5 for seed in images.column("seed"))
    reasons = [reason for text in images.column("rejected") for reason in text.split(", ") if reason]
    redrawn = json.loads((tmp_path / "set" / "manifest.json").read_text())["redrawn"]
    assert redrawn == {"black": reasons.count("black"), "unsafe": reasons.count("unsafe")}
    assert redrawn["black"] > 5 and redrawn["unsafe"] > 3
    assert heard.warnings == [
        f"{sum(redrawn.values())} images were drawn again: {redrawn['black']} black, {redrawn['unsafe']} unsafe"
    ]
    in_memory = method.synthesize(network, 40, Rng(0))
    assert torch.equal(pixels(in_memory), pixels(images)) and in_memory.manifest.redrawn == redrawn


@pytest.mark.parametrize("low_pass", [None, 0.1])
def test_near_duplicates_are_drawn_again_also_across_batches_and_after_a_kill(
    use: Use, network: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_pass: float | None
) -> None:
    # Six pictures only, so that a class repeats itself from its second image on until it finds another one.
    generator = use(FakeGenerator(lambda prompt, seed: noise(prompt, seed % 6) // 2 + seed % 2))
    method = TextToImage(batch_size=5, only=("cat", "dog"), redraws=60, low_pass=low_pass)

    def writer(name: str) -> ImageSetWriter:
        return open_writer(tmp_path / name, "text_to_image", method, 10, 0, network)

    whole = method.synthesize(network, 10, Rng(0), writer=writer("whole"))
    shown = pixels(whole)
    for label in (3, 5):
        of_class = [image for image, found in zip(shown, whole.labels.tolist(), strict=True) if found == label]  # type: ignore[union-attr]
        assert len(of_class) == 5 and len({image.numpy().tobytes() for image in of_class}) == 5
    assert whole.manifest.redrawn["duplicate"] > 0

    class Stop(BaseException):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        killed = writer("killed")
        patch.setattr(killed, "append", _once(killed.append, stop))
        method.synthesize(network, 10, Rng(0), writer=killed)
    drawn = len(generator.batches)
    resumed = method.synthesize(network, 10, Rng(0), writer=writer("killed"))
    assert resumed.manifest == whole.manifest and torch.equal(pixels(resumed), shown)
    done = len(generator.batches)
    assert done > drawn
    assert method.synthesize(network, 10, Rng(0), writer=writer("killed")).manifest == whole.manifest
    assert len(generator.batches) == done  # a finished set needs no generator


def _once(first: Callable[..., None], then: Callable[..., None]) -> Callable[..., None]:
    calls: list[int] = []

    def call(*args: Any) -> None:
        calls.append(1)
        (first if len(calls) == 1 else then)(*args)

    return call


def test_killed_between_the_last_part_and_the_manifest(
    use: Use, network: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(FakeGenerator(noise, unsafe=lambda prompt, seed: seed % 2 == 0))
    method = TextToImage(batch_size=5)
    writer = open_writer(tmp_path / "set", "text_to_image", method, 10, 0, network)
    monkeypatch.setattr(writer, "finish", lambda *args, **options: None)
    method.synthesize(network, 10, Rng(0), writer=writer)
    assert not (tmp_path / "set" / "manifest.json").exists()
    again = open_writer(tmp_path / "set", "text_to_image", method, 10, 0, network)
    assert method.synthesize(network, 10, Rng(0), writer=again).manifest.redrawn["unsafe"] > 0


def test_a_generator_of_black_images_is_an_error_at_once(use: Use, network: FloatModel) -> None:
    generator = use(FakeGenerator(lambda prompt, seed: torch.zeros(3, 8, 8, dtype=torch.uint8)))
    with pytest.raises(
        InputError, match=r"fake gives no usable image for '.*': 3 attempts, 3 black; try the generator"
    ):
        TextToImage(redraws=2).synthesize(network, 20, Rng(0))
    assert generator.batches == [8, 8, 8]


def test_a_class_that_never_passes_is_an_error_after_three_templates(use: Use, network: FloatModel) -> None:
    generator = use(FakeGenerator(noise, unsafe=lambda prompt, seed: "ship" in prompt))
    with pytest.raises(InputError, match=r"'.* ship': 9 attempts, 9 unsafe; leave the class out with only"):
        TextToImage(redraws=2).synthesize(network, 20, Rng(0))
    ships = [prompt for prompt in generator.prompts if "ship" in prompt]
    assert len(ships) == 9 and len(set(ships)) == 3


def test_a_generator_that_ignores_its_seed_is_an_error(use: Use, network: FloatModel) -> None:
    use(FakeGenerator(lambda prompt, seed: noise(prompt, 1)))
    with pytest.raises(InputError, match=r"6 attempts, 6 duplicate"):
        TextToImage(redraws=1, only=("cat",)).synthesize(network, 2, Rng(0))


def test_prompts_that_are_cut_are_told(use: Use, network: FloatModel) -> None:
    use(FakeGenerator(noise))
    heard = Heard()
    TextToImage(templates=("gigantic {}",)).synthesize(network, 3, Rng(0), progress=heard)
    assert len(heard.warnings) == 1 and "3 prompts are longer than the text encoder reads" in heard.warnings[0]


def test_a_folder_of_another_generator_is_not_continued(
    use: Use, network: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = TextToImage(batch_size=2)
    use(FakeGenerator(noise))
    writer = open_writer(tmp_path / "set", "text_to_image", method, 4, 0, network)
    monkeypatch.setattr(writer, "append", _once(writer.append, lambda *args: pytest.skip("unreachable")))
    monkeypatch.setattr(writer, "finish", lambda *args, **options: None)
    with pytest.raises(pytest.skip.Exception):
        method.synthesize(network, 4, Rng(0), writer=writer)
    use(FakeGenerator(noise, fingerprint="another"))
    again = open_writer(tmp_path / "set", "text_to_image", method, 4, 0, network)
    with pytest.raises(DataError, match="holds images of another generator or token"):
        method.synthesize(network, 4, Rng(0), writer=again)


def test_a_token_is_used(generator_folder: Path, network: FloatModel, tmp_path: Path) -> None:
    path = tmp_path / "token.safetensors"
    write_embedding(path, Embedding("<real>", 20 * torch.arange(16.0).cos().view(1, 16)))
    images = TextToImage(generator=str(generator_folder), steps=1, embedding=str(path)).synthesize(network, 3, Rng(0))
    assert all(text.endswith("in the style of <real>") for text in images.column("prompt"))
    write_embedding(path, Embedding("<real>", 20 * torch.arange(16.0).sin().view(1, 16)))
    others = TextToImage(generator=str(generator_folder), steps=1, embedding=str(path)).synthesize(network, 3, Rng(0))
    assert others.column("seed") == images.column("seed") and not torch.equal(pixels(others), pixels(images))
    assert others.column("generator") != images.column("generator")
    write_embedding(path, Embedding("<real>", torch.ones(1, 5)))
    with pytest.raises(ModelError, match=r"width 5, the text encoder of .* has width 16"):
        TextToImage(generator=str(generator_folder), embedding=str(path)).synthesize(network, 3, Rng(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ["cat", "hrose"]}, r"only: unknown class 'hrose'; did you mean 'horse'"),
        ({"classes": []}, "classes names no class"),
        ({"classes": ["cat", "dog"]}, "classes names 2 classes but cifar10-resnet20 has 10"),
        ({"wording": "gloss"}, "class 'airplane' has no gloss"),
        ({"classes_per_prompt": 11}, "classes_per_prompt is 11 but only 10 classes"),
        ({"generator": "no/such/folder"}, "there is no pipeline folder no/such/folder"),
        ({"embedding": "none.safetensors"}, "embedding none.safetensors does not exist"),
    ],
)
def test_wrong_settings(generator_folder: Path, network: FloatModel, settings: dict[str, Any], message: str) -> None:
    method = TextToImage.model_validate({"generator": str(generator_folder), **settings})
    with pytest.raises(InputError, match=message) as error:
        method.synthesize(network, 4, Rng(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding": "a", "tuning": {"images": "b"}}, "embedding and tuning exclude each other"),
        ({"templates": ["a photo"]}, "template 'a photo' must have one place {}"),
        ({"embedding": "a", "templates": ["a {}"]}, "template 'a {}' must have two places {}"),
        ({"height": 64}, "give height and width or neither"),
        ({"steps": 0}, "steps = 0"),
        ({"tuning": {"images": "b", "shot": 3}}, "unknown setting 'tuning.shot'; did you mean 'shots'"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("{", r"\{")):
        parse_settings(TextToImage, settings, "recipe")
