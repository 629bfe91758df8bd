"""Sets that pipelines draw: equal noise for float and quantized, resumable, and what is kept of the sampler's steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests import small_diffusion as small
from tests.small_pipeline import build_small_pipeline
from tests.small_quantized import quantized, tiny

import synthquant as sq
from synthquant.compare import compare
from synthquant.core.errors import DataError, InputError
from synthquant.core.progress import QUIET, Progress
from synthquant.data.sampler_steps import STEPS_NAME, SamplerSteps
from synthquant.data.seed_pairs import same_seed_pairs
from synthquant.diffusion.pipelines import DiffusionPipeline, Sampling
from synthquant.evaluate.step_errors import step_errors
from synthquant.models.samples import samples_for
from synthquant.synthesize.sampling import SampleSettings, sample

FAST = SampleSettings(steps=3, batch_size=4)


@pytest.fixture(scope="module")
def float_and_quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    source = small.saved(tiny(), tmp_path_factory.mktemp("sample") / "pipeline")
    quant_model, _ = quantized(source, scheme="W4A8")
    pipeline = small.opened(tiny())
    return pipeline, pipeline.replaced(quant_model)


def test_both_start_from_the_same_noise_and_end_elsewhere(
    float_and_quantized: tuple[DiffusionPipeline, DiffusionPipeline], tmp_path: Path
) -> None:
    settings = FAST.model_copy(update={"keep_steps": 5})
    sets = [
        sample(pipeline, settings, 6, 0, tmp_path / name, QUIET)
        for pipeline, name in zip(float_and_quantized, ("float", "quantized"), strict=True)
    ]
    pairs = same_seed_pairs(*sets)
    assert pairs is not None and pairs.first.tolist() == pairs.second.tolist() == list(range(6))
    assert sets[0].fingerprint != sets[1].fingerprint and len(set(sets[0].column("seed"))) == 6
    steps = [SamplerSteps.read(one.folder) for one in sets]
    assert steps[0] is not None and steps[1] is not None
    assert steps[0].images.shape == (3, 5, 3, 8, 8) and steps[0].seeds.tolist() == sets[0].column("seed")[:5]
    generators = [torch.Generator().manual_seed(seed) for seed in steps[0].seeds.tolist()]
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators])
    assert torch.equal(steps[0].images[0], noise) and torch.equal(steps[1].images[0], noise)
    errors = step_errors(steps[1], steps[0])
    assert [one.step for one in errors] == [0, 1, 2] and errors[0].error.value == 0 < errors[1].error.value
    first, second = (one.images[2].double().flatten(1) for one in steps)
    assert errors[2].error.value == pytest.approx(float(((second - first).norm(dim=1) / first.norm(dim=1)).mean()))
    assert errors[2].timestep == float(steps[0].times[2]) and errors[1].error.low < errors[1].error.value
    found = compare(
        str(tmp_path / "quantized"), str(tmp_path / "float"), device="cpu",
        settings=sq.QualitySettings(resamples=0, subsets=1),
    )  # fmt: skip
    assert [row["error"]["value"] for row in found["step_errors"]] == [one.error.value for one in errors]


def test_images_do_not_depend_on_how_many_are_drawn_together(
    float_and_quantized: tuple[DiffusionPipeline, DiffusionPipeline], tmp_path: Path
) -> None:
    pipeline, _ = float_and_quantized
    first = sample(pipeline, FAST, 6, 0, tmp_path / "a", QUIET)
    more = sample(pipeline, FAST.model_copy(update={"batch_size": 3}), 8, 0, tmp_path / "b", QUIET)
    assert more.column("seed")[:6] == first.column("seed")
    for index in range(6):
        assert (first[index].image.int() - more[index].image.int()).abs().max() <= 1
    other = sample(pipeline, FAST, 6, 1, tmp_path / "c", QUIET)
    assert not set(other.column("seed")) & set(first.column("seed"))
    rng = sq.Rng(0).child("sample")
    again = pipeline.draw(None, [rng.seed_for("noise of image 2")], Sampling(steps=3)).images[0]
    assert (again.int() - first[2].image.int()).abs().max() <= 1


def test_a_killed_sampling_goes_on_to_the_same_bytes(
    float_and_quantized: tuple[DiffusionPipeline, DiffusionPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, other = float_and_quantized
    settings = FAST.model_copy(update={"keep_steps": 2})
    sample(pipeline, settings, 10, 0, tmp_path / "whole", QUIET)
    draw, calls = DiffusionPipeline.draw, []

    def stop(self: DiffusionPipeline, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DiffusionPipeline, "draw", stop)
        sample(pipeline, settings, 10, 0, tmp_path / "killed", QUIET)
    assert (tmp_path / "killed" / "part-00000.parquet").is_file()
    with pytest.raises(DataError, match="holds other images"):
        sample(other, settings, 10, 0, tmp_path / "killed", QUIET)
    with pytest.raises(DataError, match="holds other images"):
        sample(pipeline, settings.model_copy(update={"steps": 4}), 10, 0, tmp_path / "killed", QUIET)
    sample(pipeline, settings, 10, 0, tmp_path / "killed", QUIET)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    before = (tmp_path / "killed" / STEPS_NAME).stat().st_mtime_ns
    sample(pipeline, settings, 10, 0, tmp_path / "killed", QUIET)
    assert (tmp_path / "killed" / STEPS_NAME).stat().st_mtime_ns == before, "it was finished"


def test_prompts_and_classes_are_kept_with_the_images(tmp_path: Path) -> None:
    pipeline = small.opened(build_small_pipeline())
    given = SampleSettings(steps=1, prompts=("photo of a cat", "photo of a ship"), batch_size=2, keep_steps=3)
    images = sample(pipeline, given, 3, 0, tmp_path / "prompts", QUIET)
    assert images.column("prompt") == ["photo of a cat", "photo of a ship", "photo of a cat"] and images.labels is None
    steps = SamplerSteps.read(images.folder)
    assert steps is not None and steps.images.shape[:2] == (1, 3), "guidance doubles rows of the same images"
    names = ("cat", "ship")
    classes = sample(pipeline, SampleSettings(steps=1, classes=names, batch_size=4), 4, 0, tmp_path / "classes", QUIET)
    assert classes.labels is not None and sorted(classes.labels.tolist()) == [0, 0, 1, 1]
    for label, prompt in zip(classes.labels.tolist(), classes.column("prompt"), strict=True):
        assert prompt.endswith(names[label])
    with pytest.raises(InputError, match="reads prompts; give"):
        sample(pipeline, SampleSettings(steps=1), 2, 0, tmp_path / "none", QUIET)
    assert not (tmp_path / "none").exists()


def test_labels_are_classes(tmp_path: Path) -> None:
    images = sample(small.opened(small.dit()), SampleSettings(steps=1, labels=(3, 999)), 3, 0, tmp_path / "x", QUIET)
    assert images.labels is not None and images.labels.tolist() == [3, 999, 3]
    assert "prompt" not in images.column_names


def test_what_a_pipeline_cannot_do_is_one_line_and_leaves_nothing(
    float_and_quantized: tuple[DiffusionPipeline, DiffusionPipeline], tmp_path: Path
) -> None:
    pipeline, _ = float_and_quantized
    for wrong, text in (
        ({"steps": 1001}, "1001 steps are more than the 1000"),
        ({"prompts": ("a",)}, "is unconditional"),
        ({"guidance": 2.0}, "takes no guidance_scale"),
        ({"scheduler": "nix"}, "unknown scheduler 'nix'"),
    ):
        with pytest.raises(InputError, match=text):
            sample(pipeline, FAST.model_copy(update=wrong), 2, 0, tmp_path / "out", QUIET)
        assert not (tmp_path / "out").exists(), text


class Lines(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


def test_images_that_are_not_finite_are_counted(
    float_and_quantized: tuple[DiffusionPipeline, DiffusionPipeline], tmp_path: Path
) -> None:
    class Broken(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (torch.where(torch.arange(len(sample)).view(-1, 1, 1, 1) == 1, torch.nan, sample),)

    said = Lines()
    sample(float_and_quantized[0].replaced(Broken()), FAST, 4, 0, tmp_path / "x", said)
    assert any(line.startswith("1 images held values that are not finite") for line in said.said)


def test_steps_of_other_seeds_times_or_shapes_are_not_compared(tmp_path: Path) -> None:
    steps = SamplerSteps(torch.rand(3, 2, 4), torch.tensor([9.0, 5.0, 1.0]), torch.tensor([7, 8]))
    assert step_errors(steps, None) == () and step_errors(None, steps) == ()
    turned = SamplerSteps(steps.images.flip(1), steps.times, steps.seeds.flip(0))
    assert [one.error.value for one in step_errors(steps, turned)] == [0, 0, 0]
    for other in (
        SamplerSteps(steps.images, steps.times + 1, steps.seeds),
        SamplerSteps(steps.images, steps.times, steps.seeds + 9),
        SamplerSteps(torch.rand(3, 2, 5), steps.times, steps.seeds),
        SamplerSteps(steps.images[:2], steps.times[:2], steps.seeds),
    ):
        assert step_errors(steps, other) == ()
    steps.write(tmp_path)
    (tmp_path / STEPS_NAME).write_bytes(b"none")
    with pytest.raises(DataError, match="holds no steps of a sampler"):
        SamplerSteps.read(tmp_path)


def test_samples_whose_keywords_come_in_another_order_are_those_of_the_network(tmp_path: Path) -> None:
    model = sq.open_model(f"diffusers/{small.saved(tiny(), tmp_path / 'pipeline')}")
    example = model.example(2)

    class Sorted:
        fingerprint = "x"

        def __len__(self) -> int:
            return 2

        def batches(self, size: int, indices: Any = None) -> Any:
            yield sq.Inputs((), dict(sorted(example.kwargs.items())), example.constants)

    assert list(example.kwargs) != sorted(example.kwargs)
    (found,) = samples_for(model, Sorted()).batches(2)
    assert list(found.kwargs) == list(example.kwargs) and torch.equal(found.tensors[0], example.tensors[0])
    shutil.rmtree(tmp_path / "pipeline")
