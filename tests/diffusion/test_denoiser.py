from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

import diffusers
from tests import small_diffusion as small
from tests.small_pipeline import build_small_pipeline

import synthquant as sq
from synthquant.core.errors import InputError, ModelError, UnsupportedModelError
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.library import conditioning_of, require_no_adapters
from synthquant.diffusion.pipelines import DiffusionPipeline, Sampling
from synthquant.diffusion.recording import normal_form

FAST = Sampling(steps=4)
KINDS = {
    "ddim": (small.ddim, None),
    "ddpm": (small.ddpm, None),
    "dit": (small.dit, [1, 7, 999]),
    "stable": (build_small_pipeline, ["photo of a cat", "photo of a ship", "rendition of the dog"]),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[DiffusionPipeline, Any]:
    build, conditions = KINDS[request.param]
    return small.opened(build()), conditions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(small.ddim(seed=3), tmp_path_factory.mktemp("pipeline") / "ddim")


def some(conditions: Any, index: int) -> Any:
    return None if conditions is None else conditions[index : index + 1]


def test_an_image_is_the_same_alone_and_within_a_batch(kind: tuple[DiffusionPipeline, Any]) -> None:
    pipeline, conditions = kind
    together = pipeline.draw(conditions, [1, 2, 3], FAST).images
    alone = torch.cat([pipeline.draw(some(conditions, i), [i + 1], FAST).images for i in range(3)])
    assert together.shape[:2] == (3, 3) and (together.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together[0], pipeline.draw(some(conditions, 0), [9], FAST).images[0])


def test_the_noise_of_steps_is_the_image_s_own_where_a_pipeline_forgets_it() -> None:
    pipeline = small.opened(small.dit(scheduler="DDPMScheduler"))  # whose step gets no generator from DiTPipeline
    first = pipeline.draw([3, 4], [1, 2], FAST).images
    torch.manual_seed(5)
    alone = pipeline.draw([3], [1], FAST).images
    assert (first[:1].int() - alone.int()).abs().max() <= 1
    assert "step" not in vars(pipeline.pipeline.scheduler)


def test_another_network_draws_in_the_denoiser_s_place(kind: tuple[DiffusionPipeline, Any]) -> None:
    pipeline, conditions = kind
    before = pipeline.draw(conditions, [1, 2, 3], FAST).images
    calls = []

    class Louder(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            calls.append(given)
            (noise,) = pipeline.denoiser(**given)
            return (factor * noise,)

    factor = 1.0
    twin = pipeline.replaced(Louder())
    assert torch.equal(twin.draw(conditions, [1, 2, 3], FAST).images, before)
    assert len(calls) == 4 and all(call["return_dict"] is False for call in calls)
    assert all(len(call["timestep"]) == len(next(iter(call.values()))) for call in calls)
    factor = 0.5
    assert not torch.equal(twin.draw(conditions, [1, 2, 3], FAST).images, before)
    assert torch.equal(pipeline.draw(conditions, [1, 2, 3], FAST).images, before)


def test_a_pipeline_opens_as_its_denoiser(folder: Path) -> None:
    model = sq.open_model(f"diffusers/{folder}")
    assert isinstance(model, Denoiser) and model.task == "denoise" and model.name == "ddim"
    assert model.module is model.pipeline.pipeline.unet and not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert list(model.example().kwargs) == ["sample", "timestep", "return_dict"]
    assert model.example().kwargs["sample"].shape == (2, 3, 8, 8)
    assert model.example().kwargs["timestep"].dtype == torch.int64
    assert sq.open_model(str(folder)).fingerprint == model.fingerprint
    assert sq.open_model(str(folder)).pipeline.fingerprint == model.pipeline.fingerprint  # type: ignore[attr-defined]


def test_what_it_takes_is_what_the_sampler_gave_it_first(generator_folder: Path) -> None:
    model = sq.open_model(f"diffusers/{generator_folder}")
    assert isinstance(model, Denoiser)
    kwargs = model.takes.kwargs  # type: ignore[union-attr]
    assert list(kwargs) == ["sample", "timestep", "encoder_hidden_states", "return_dict"]
    seen = model.pipeline.record(["a photo"], [0], Sampling(steps=2), {0})[0]
    assert all(torch.equal(kwargs[name], value) for name, value in seen.named())


def test_a_checkpoint_of_a_denoiser_opens_again(folder: Path, tmp_path: Path) -> None:
    model = sq.open_model(f"diffusers/{folder}")
    quant_model = sq.QuantModel.build(model, "W8A16")
    sq.Rtn().apply(quant_model, Rows(model), sq.Rng(0))
    quant_model.save(tmp_path / "model")
    loaded = sq.load(tmp_path / "model")
    (expected,) = model.example(3).call(quant_model)
    assert torch.equal(model.example(3).call(loaded)[0], expected)
    assert loaded.float_model.task == "denoise"


class Rows:
    """Three samples."""

    fingerprint = "rows"

    def __init__(self, model: sq.FloatModel) -> None:
        self._inputs = model.example(3)

    def __len__(self) -> int:
        return 3

    def batches(self, size: int, indices: Any = None) -> Any:
        yield self._inputs


def test_random_weights_are_the_same_on_every_call_and_read_no_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    first, second = (sq.open_model(str(tmp_path / "copy"), pretrained=False) for _ in range(2))
    assert first.fingerprint == second.fingerprint != sq.open_model(str(folder)).fingerprint


def test_a_call_has_one_normal_form() -> None:
    network = small.unet()
    sample, time = torch.randn(3, 3, 8, 8), torch.tensor(7)
    forms = [
        normal_form(network, (sample, time), {}),
        normal_form(network, (), {"timestep": time[None], "sample": sample, "class_labels": None}),
        normal_form(network, (sample,), {"timestep": 7, "return_dict": True}),
        normal_form(network, (sample, time.expand(3)), {"return_dict": False}),
    ]
    for form in forms:
        form.require(forms[0].signature)
        assert torch.equal(form.kwargs["timestep"], torch.tensor([7, 7, 7])) and form.kwargs["return_dict"] is False
        assert torch.equal(form.call(network)[0], network(sample, 7).sample)


def test_arguments_without_rows_are_constant() -> None:
    class Network(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, timestep: Any = None, ids: Any = None, **more: Any) -> None: ...

    found = normal_form(Network(), (torch.zeros(2, 4),), {"ids": torch.arange(7), "sigma": [torch.ones(2)], "scale": 3})
    assert found.constants == {"ids"} and found.kwargs["scale"] == 3
    assert [name for name, _ in found.named()] == ["hidden_states", "sigma.0"]
    with pytest.raises(UnsupportedModelError, match="given sigma with some tensors that have a row for each of 2"):
        normal_form(Network(), (torch.zeros(2, 4),), {"sigma": [torch.ones(2), torch.ones(3)]})


def test_other_schedulers(kind: tuple[DiffusionPipeline, Any]) -> None:
    pipeline, conditions = kind
    other = pipeline.with_scheduler("dpm++")
    assert other.draw(conditions, [1, 2, 3], FAST).finite == (True,) * 3
    assert type(pipeline.pipeline.scheduler).__name__ != other.scheduler["class"] == "DPMSolverMultistepScheduler"
    assert other.fingerprint != pipeline.fingerprint
    if "stable" not in type(pipeline.pipeline).__module__:
        with pytest.raises(InputError, match="begins with noise of size 1, and the scheduler euler does not"):
            pipeline.with_scheduler("euler")


@pytest.mark.parametrize(
    ("build", "conditions", "sampling", "message"),
    [
        (small.ddim, ["a cat"], {}, "is unconditional: it reads no prompts or labels"),
        (small.ddim, None, {"steps": 1001}, "1001 steps are more than the 1000 that the scheduler"),
        (small.ddim, None, {"guidance": 2.0}, r"DDIMPipeline\) takes no guidance_scale; leave it out"),
        (small.ddim, None, {"negative_prompt": "dark"}, "takes no negative_prompt"),
        (small.ddim, None, {"height": 16, "width": 16}, "takes no height"),
        (small.ddpm, None, {"eta": 0.5}, "takes no eta"),
        (small.dit, ["a cat"], {}, "reads labels, which are whole numbers from 0 to 999"),
        (small.dit, [1000], {}, "reads labels, which are whole numbers from 0 to 999"),
        (small.dit, None, {}, "no labels to draw; small needs one for each image"),
        (build_small_pipeline, [3], {}, "reads prompts, which are texts"),
        (build_small_pipeline, ["a", "b"], {}, "there are 2 prompts and 1 seeds"),
    ],
)
def test_what_a_pipeline_cannot_draw(build: Any, conditions: Any, sampling: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        small.opened(build()).draw(conditions, [0], Sampling.model_validate(sampling))
    assert "\n" not in str(error.value)


def test_eta_is_for_schedulers_that_take_it() -> None:
    pipeline = small.opened(small.ddim())
    drawn = [pipeline.draw(None, [1], Sampling(steps=4, eta=eta)).images for eta in (None, 0.0, 1.0)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(InputError, match="DPMSolverMultistepScheduler takes no eta"):
        pipeline.with_scheduler("dpm++").draw(None, [1], Sampling(steps=4, eta=1.0))


def test_pipelines_of_other_kinds() -> None:
    for name in ("StableDiffusionImg2ImgPipeline", "TextToVideoSDPipeline", "StableVideoDiffusionPipeline"):
        with pytest.raises(UnsupportedModelError, match=f"is a {name}, which does not make images of noise"):
            conditioning_of(getattr(diffusers, name), "it")


def test_a_pipeline_without_a_denoiser(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    index = tmp_path / "copy" / "model_index.json"
    index.write_text(json.dumps({key: value for key, value in json.loads(index.read_text()).items() if key != "unet"}))
    with pytest.raises(UnsupportedModelError, match="has no denoiser: neither a unet nor a transformer"):
        sq.open_model(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("conv_in.weight", "conv_in.base_layer.weight"), r"has adapters \(LoRA\) beside"),
        (lambda name: name.replace("conv_in.weight", "conv_inn.weight"), "1 are missing, for example conv_in.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_denoiser(folder: Path, tmp_path: Path, rename: Any, message: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        sq.open_model(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", "[]", "is no diffusers pipeline: its model_index.json does not name"),
        ("model_index.json", '{"_class_name": "UNet2DModel"}', "is a UNet2DModel, which diffusers .* does not have"),
        ("unet/config.json", "{", "cannot be opened: OSError: It looks like the config file"),
        ("unet/config.json", "{}", "cannot be opened: ValueError: Cannot load because"),
        ("unet/diffusion_pytorch_model.safetensors", "cut off", "cannot be opened: OSError: Unable to load weights"),
        ("unet/diffusion_pytorch_model.safetensors", None, "weights are read from safetensors only"),
    ],
)
def test_damaged_pipelines(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, content: str | None, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / file).unlink()
    if content is not None:
        (tmp_path / "copy" / file).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        sq.open_model(str(tmp_path / "copy"))
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_adapters_beside_weights_in_memory() -> None:
    network = small.unet()
    require_no_adapters(network, "it")
    network.conv_in.lora_A = torch.nn.ModuleDict()
    with pytest.raises(ModelError, match=r"it has adapters \(LoRA\) beside its weights, .* fuse them"):
        require_no_adapters(network, "it")


def test_weights_of_a_file(folder: Path, tmp_path: Path) -> None:
    other = small.saved(small.ddim(seed=4), tmp_path / "other")
    model = sq.open_model(str(folder), weights=other / "unet" / "diffusion_pytorch_model.safetensors")
    expected = sq.open_model(str(other))
    assert model.fingerprint == expected.fingerprint
    assert isinstance(model, Denoiser) and isinstance(expected, Denoiser)
    assert model.pipeline.fingerprint == expected.pipeline.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 10}, "predicts noise; leave --num-classes and --task out"),
        ({"task": "other"}, "predicts noise; leave --num-classes and --task out"),
        ({"input_size": 32}, "not images; leave out --input-size"),
    ],
)
def test_settings_of_classifiers_are_refused(folder: Path, options: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sq.open_model(f"diffusers/{folder}", **options)


def test_no_other_network_denoises() -> None:
    with pytest.raises(ModelError, match="is no diffusion pipeline, whose task is denoise"):
        sq.open_model("zoo/cifar10-resnet20", task="denoise")
