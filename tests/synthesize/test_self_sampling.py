from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests import small_diffusion as small
from tests.damage import Warned
from tests.diffusion.test_text_cache import extra_large, latent_consistency
from tests.small_pipeline import build_small_pipeline

import synthquant as sq
from synthquant.core.errors import DataError, InputError, OutputError, SynthquantError, UnsupportedModelError
from synthquant.core.files import sha256_file
from synthquant.core.settings import parse_settings
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.trajectory_writer import TrajectoryWriter
from synthquant.synthesize.self_sampling import SelfSampling

PROMPTS = ("photo of a cat", "photo of a ship", "rendition of the dog")
FEW = {"sampler_steps": 6, "steps": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def ddim() -> Denoiser:
    return small.denoiser(small.ddim())


@pytest.fixture(scope="module")
def stable() -> Denoiser:
    return small.denoiser(build_small_pipeline())


def record(model: Denoiser, count: int, seed: int = 0, **settings: Any) -> sq.Trajectory:
    return SelfSampling.model_validate(FEW | settings).synthesize(model, count, sq.Rng(seed))


def rows(trajectory: sq.Trajectory) -> dict[str, Tensor]:
    (batch,) = trajectory.batches(len(trajectory))
    return dict(batch.named())


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_loop(
    model: Denoiser, seed: int, steps: int, context: Tensor | None = None, scale: float = 1.0
) -> list[Tensor]:
    """What a sampler gives its network, of one image: the published loop, step by step."""
    scheduler, network = model.pipeline.pipeline.scheduler, model.module
    scheduler.set_timesteps(steps)
    size: Any = network.config
    x = noise(seed, size.in_channels, size.sample_size, size.sample_size)
    generator = torch.Generator().manual_seed(seed)
    torch.randn(x.shape, generator=generator)
    seen = []
    for time in scheduler.timesteps:
        seen.append(x)
        if context is None:
            predicted = network(x, time).sample
        else:
            without, with_prompt = network(torch.cat([x, x]), time, encoder_hidden_states=context).sample.chunk(2)
            predicted = without + scale * (with_prompt - without)
        x = scheduler.step(predicted, time, x, generator=generator).prev_sample
    return seen


@pytest.mark.parametrize("build", [small.ddim, small.ddpm])
def test_each_row_is_what_the_sampler_gave_its_network(build: Any) -> None:
    model = small.denoiser(build())
    trajectory = record(model, 9)
    found, manifest = rows(trajectory), trajectory.manifest
    assert manifest.steps == (0, 2, 4) and len(manifest.timesteps) == 6
    for image, seed in enumerate(manifest.seeds):
        expected = plain_loop(model, seed, 6)
        for row in (trajectory.images == image).nonzero().flatten().tolist():
            step = int(trajectory.steps[row])
            torch.testing.assert_close(found["sample"][row], expected[step][0], rtol=1e-4, atol=1e-5)
            assert float(found["timestep"][row]) == manifest.timesteps[step]


def test_rows_with_guidance_are_the_sampler_s_too(stable: Denoiser) -> None:
    trajectory = record(stable, 4, prompts=PROMPTS, guidance=3.0, steps=2)
    found, manifest = rows(trajectory), trajectory.manifest
    assert manifest.conditions == PROMPTS[:2] and manifest.repeats == 2 and len(trajectory) == 8
    pipeline = stable.pipeline.pipeline
    for image, (seed, prompt) in enumerate(zip(manifest.seeds, PROMPTS, strict=False)):
        text, empty = pipeline.encode_prompt([prompt], "cpu", 1, True)
        context = torch.cat([empty, text])
        own = (trajectory.images == image).nonzero().flatten()
        torch.testing.assert_close(found["encoder_hidden_states"][own], context.repeat(2, 1, 1), rtol=1e-4, atol=1e-5)
        expected = plain_loop(stable, seed, 6, context, scale=3.0)
        for row in own.tolist():
            step = int(trajectory.steps[row])
            torch.testing.assert_close(found["sample"][row], expected[step][0], rtol=1e-4, atol=1e-4)


def test_guidance_doubles_the_rows_and_nothing_else(stable: Denoiser) -> None:
    with_guidance, without = (record(stable, 4, prompts=PROMPTS, guidance=scale, steps=2) for scale in (3.0, 1.0))
    assert (len(with_guidance), len(without)) == (8, 4)
    assert with_guidance.steps.tolist() == [0, 0, 3, 3, 0, 0, 3, 3] and without.steps.tolist() == [0, 3, 0, 3]
    first = rows(with_guidance)
    assert torch.equal(first["sample"][::2], first["sample"][1::2])
    assert not torch.equal(first["encoder_hidden_states"][0], first["encoder_hidden_states"][1])
    assert torch.equal(first["encoder_hidden_states"][1::2], rows(without)["encoder_hidden_states"])
    assert with_guidance.manifest.guidance == 3.0
    assert record(stable, 2, prompts=PROMPTS, steps=2).manifest.guidance == 7.5  # of Stable Diffusion's own


def test_labels_of_a_transformer(ddim: Denoiser) -> None:
    model = small.denoiser(small.dit())
    trajectory = record(model, 6, labels=(5, 9), guidance=4.0)
    found = rows(trajectory)
    assert list(found) == ["hidden_states", "timestep", "class_labels"] and len(trajectory) == 12
    assert found["class_labels"].tolist() == [5, 1000] * 3 + [9, 1000] * 3
    balanced = record(model, 9, guidance=1.0).manifest.conditions
    assert balanced is not None and len(set(balanced)) == 3


def test_latent_diffusion() -> None:
    model = small.denoiser(small.latent())
    trajectory = record(model, 6, prompts=PROMPTS, guidance=3.0, height=64, width=64)
    assert len(trajectory) == 12 and rows(trajectory)["sample"].shape == (12, 4, 8, 8)


def test_trees_of_conditions_and_distilled_models() -> None:
    extra = rows(record(small.denoiser(extra_large()), 3, prompts=PROMPTS))
    assert {"added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"} < set(extra)
    distilled = record(small.denoiser(latent_consistency()), 3, prompts=PROMPTS)
    assert len(distilled) == 3 and "timestep_cond" in rows(distilled)  # it is told its guidance


@pytest.mark.parametrize("count", [3, 6, 7, 8])
def test_exactly_the_count_in_equal_shares(ddim: Denoiser, count: int) -> None:
    trajectory = record(ddim, count)
    assert len(trajectory) == len(rows(trajectory)["sample"]) == count
    shares = Counter(trajectory.steps.tolist())
    assert sorted(shares) == [0, 2, 4] and max(shares.values()) - min(shares.values()) <= 1
    assert trajectory.images.tolist() == [row // 3 for row in range(count)]
    assert len(set(trajectory.manifest.seeds)) == -(-count // 3)


@pytest.mark.parametrize(
    ("which", "total", "steps", "expected"),
    [
        ("uniform", 100, 20, list(range(0, 100, 5))),  # as published: range(0, T, T // c)
        ("uniform", 50, 25, list(range(0, 50, 2))),
        ("uniform", 10, 4, [0, 2, 5, 7]),
        ("uniform", 6, None, [0, 1, 2, 3, 4, 5]),
        ("first", 10, 4, [0, 1, 2, 3]),
        ("middle", 10, 4, [3, 4, 5, 6]),
        ("last", 10, 4, [6, 7, 8, 9]),
    ],
)
def test_which_steps_are_recorded(which: Any, total: int, steps: int | None, expected: list[int]) -> None:
    assert list(SelfSampling(steps=steps, which=which).chosen(total, sq.Rng(0))) == expected


def test_steps_from_a_normal_distribution() -> None:
    method, seen = SelfSampling(steps=10, which="normal"), Counter[int]()
    for seed in range(50):
        steps = method.chosen(100, sq.Rng(seed))
        assert len(set(steps)) == 10 and list(steps) == sorted(steps)
        seen.update(steps)
    near = sum(count for step, count in seen.items() if abs(step - 49.5) < 100 / 6)
    assert 0.55 < near / 500 < 0.75  # 0.68 of a normal distribution lie within its deviation
    assert method.chosen(100, sq.Rng(1)) == method.chosen(100, sq.Rng(1)) != method.chosen(100, sq.Rng(2))


def test_a_sampler_with_more_calls_than_steps(stable: Denoiser) -> None:
    trajectory = record(stable, 7, prompts=PROMPTS, scheduler="pndm", steps=None, guidance=1.0)
    assert len(trajectory.manifest.timesteps) == 7  # PLMS calls its network twice for the first of 6 steps
    assert trajectory.steps.tolist() == list(range(7)) and trajectory.is_consecutive


def test_batch_size_does_not_change_the_rows(ddim: Denoiser) -> None:
    for other in (1, 5):
        first, second = rows(record(ddim, 9)), rows(record(ddim, 9, batch_size=other))
        torch.testing.assert_close(first["sample"], second["sample"], rtol=1e-4, atol=1e-5)


def test_seed_and_storage(ddim: Denoiser) -> None:
    first, same, other = (rows(record(ddim, 6, seed))["sample"] for seed in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)
    half = rows(record(ddim, 6, 3, storage="float16"))
    assert half["sample"].dtype == torch.float32 and half["timestep"].dtype == torch.int64
    assert torch.equal(half["sample"], first.half().float())


def test_precision_of_sampling(ddim: Denoiser) -> None:
    before = ddim.fingerprint
    trajectory = record(ddim, 6, dtype="bfloat16")
    assert torch.equal(rows(trajectory)["sample"], rows(trajectory)["sample"].bfloat16().float())
    assert ddim.fingerprint == before and next(ddim.module.parameters()).dtype == torch.float32
    assert ddim.taking(trajectory).example(1).kwargs["sample"].dtype == torch.float32


def test_consecutive_steps(ddim: Denoiser) -> None:
    assert record(ddim, 6, steps=2, which="middle").is_consecutive
    assert record(ddim, 6, steps=None).is_consecutive
    assert not record(ddim, 6, steps=2).is_consecutive
    whole = record(ddim, 12, steps=None)
    assert whole.subset(range(3)).is_consecutive
    assert not whole.subset([0, 2]).is_consecutive and not whole.subset([0]).is_consecutive
    assert not whole.subset([0, 1, 6, 7, 2]).is_consecutive and not whole.subset([0, 1, 3]).is_consecutive


def test_rows_in_any_order(ddim: Denoiser) -> None:
    trajectory = record(ddim, 9)
    everything, chosen = rows(trajectory)["sample"], [8, 0, 3, 2]
    found = torch.cat([batch.kwargs["sample"] for batch in trajectory.batches(3, chosen)])
    assert torch.equal(found, everything[chosen])
    some = trajectory.subset(chosen)
    assert torch.equal(rows(some)["sample"], everything[chosen]) and some.fingerprint != trajectory.fingerprint
    assert some.steps.tolist() == trajectory.steps[chosen].tolist()


# The folder


def written(
    model: Denoiser, folder: Path, count: int = 9, seed: int = 0, progress: Any = None, **settings: Any
) -> sq.Trajectory:
    method = SelfSampling.model_validate(FEW | settings)
    writer = TrajectoryWriter(folder, progress or Warned())
    return method.synthesize(model, count, sq.Rng(seed), writer=writer)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_what_is_written_is_what_was_recorded(stable: Denoiser, tmp_path: Path) -> None:
    settings = {"prompts": PROMPTS, "guidance": 3.0}
    trajectory = written(stable, tmp_path / "set", **settings)
    with pytest.raises(DataError, match="holds no images but the trajectory of a diffusion model"):
        sq.open_images(tmp_path / "set")
    assert sorted(hashes(tmp_path / "set")) == ["part-00000.safetensors", "part-00001.safetensors", "trajectory.json"]
    opened = sq.open_trajectory(tmp_path / "set")
    opened.verify()
    assert opened.fingerprint == trajectory.fingerprint
    alone = rows(record(stable, 9, **settings))
    assert all(torch.equal(alone[name], value) for name, value in rows(opened).items())
    part = opened._part(0)
    assert part["sample"].shape == (2, 3, 1, 6, 16, 16)  # images and steps, and not twice
    assert part["encoder_hidden_states"].shape == (2, 1, 2, 16, 16)  # once for each image


@pytest.mark.parametrize("after", [0, 1])
def test_a_killed_run_goes_on_to_the_same_bytes(
    ddim: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    class Stop(BaseException):
        pass

    append = TrajectoryWriter.append

    def stopping(self: TrajectoryWriter, index: int, tensors: Any) -> None:
        if index == after:
            raise Stop
        append(self, index, tensors)

    written(ddim, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TrajectoryWriter, "append", stopping)
        written(ddim, tmp_path / "killed")
    with pytest.raises(DataError, match="is an unfinished trajectory; run the command that makes it again"):
        sq.open_trajectory(tmp_path / "killed")
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryWriter, "append", lambda self, index, t: (calls.append(index), append(self, index, t)))
        written(ddim, tmp_path / "killed")
    assert calls == list(range(after, 2))
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_a_damaged_part_is_made_again(ddim: Denoiser, tmp_path: Path) -> None:
    written(ddim, tmp_path / "set")
    before, progress = hashes(tmp_path / "set"), Warned()
    path = tmp_path / "set" / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="not as it was written"):
        sq.open_trajectory(tmp_path / "set").verify()
    with pytest.raises(DataError, match="not as it was written; run the command"):
        rows(sq.open_trajectory(tmp_path / "set"))
    written(ddim, tmp_path / "set", progress=progress)
    assert hashes(tmp_path / "set") == before
    assert len(progress.warnings) == 1 and "part-00000.safetensors is missing or not as" in progress.warnings[0]
    path.unlink()
    with pytest.raises(DataError, match=r"part-00000.safetensors is missing; run the command"):
        sq.open_trajectory(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there, 1 now"),
        ({"count": 12}, "count is 9 there, 12 now"),
        ({"which": "last"}, "settings.which is 'uniform' there, 'last' now"),
        ({"scheduler": "dpm++"}, "scheduler.class is 'DDIMScheduler' there, 'DPMSolverMultistepScheduler' now"),
    ],
)
def test_another_trajectory_is_kept(ddim: Denoiser, tmp_path: Path, change: Any, message: str) -> None:
    written(ddim, tmp_path / "set")
    before = hashes(tmp_path / "set")
    with pytest.raises(DataError, match=f"holds another trajectory .*{message}"):
        written(ddim, tmp_path / "set", **change)
    assert hashes(tmp_path / "set") == before


def test_resuming_with_another_pipeline(ddim: Denoiser, tmp_path: Path) -> None:
    written(ddim, tmp_path / "set")
    with pytest.raises(DataError, match=r"holds another trajectory \(pipeline is '[0-9a-f]"):
        written(small.denoiser(small.ddim(seed=1)), tmp_path / "set")
    with pytest.raises(DataError, match="is a trajectory of another pipeline"):
        small.denoiser(small.ddim(seed=1)).taking(sq.open_trajectory(tmp_path / "set"))


def test_a_folder_with_other_things(ddim: Denoiser, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and holds no trajectory"):
        written(ddim, tmp_path)
    with pytest.raises(DataError, match=r"is not a trajectory: it has no trajectory\.json"):
        sq.open_trajectory(tmp_path)


# Quantizing


@pytest.mark.parametrize("build", [small.ddim, small.dit, small.latent])
def test_a_network_is_quantized_with_its_trajectory(build: Any) -> None:
    model = small.denoiser(build())
    conditions = {"prompts": PROMPTS} if model.pipeline.conditioning == "prompts" else {}
    trajectory = record(model, 6, **conditions)
    quant_model = sq.QuantModel.build(model.taking(trajectory), "W4A8")
    sq.Rtn().apply(quant_model, trajectory, sq.Rng(0))
    quant_model.require_calibrated()
    (wanted,), (found,) = (trajectory_output(network, trajectory) for network in (model.module, quant_model))
    assert torch.isfinite(found).all() and 0 < (found - wanted).square().mean() < wanted.square().mean()


@torch.no_grad()
def trajectory_output(network: Any, trajectory: sq.Trajectory) -> Any:
    (batch,) = trajectory.batches(len(trajectory))
    return batch.call(network)


def test_rows_of_another_size_than_the_pipeline_s_own() -> None:
    model = small.denoiser(small.latent())
    trajectory = record(model, 3, prompts=PROMPTS, height=128, width=64)
    fitted = model.taking(trajectory)
    assert fitted.example(1).kwargs["sample"].shape == (1, 4, 16, 8)
    sq.Rtn().apply(sq.QuantModel.build(fitted, "W8A8"), trajectory, sq.Rng(0))
    with pytest.raises(
        DataError, match=r"input sample of a sample is torch.float32 \[4, 16, 8\], and the network takes"
    ):
        sq.Rtn().apply(sq.QuantModel.build(model, "W8A8"), trajectory, sq.Rng(0))


# What cannot be


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (
            small.ddim,
            {"prompts": ["a"]},
            "prompts are given and small is unconditional: it reads none; leave",
        ),
        (small.ddim, {"classes": "cifar10"}, "classes are given and small is unconditional"),
        (small.ddim, {"labels": [1]}, "labels are given and small is unconditional"),
        (small.ddim, {"guidance": 3.0}, "takes no guidance_scale"),
        (small.ddim, {"negative_prompt": "dark"}, "takes no negative_prompt"),
        (small.ddim, {"sampler_steps": 1001}, "1001 steps are more than the 1000 that the scheduler of small has"),
        (small.ddim, {"steps": 7}, "steps is 7 and the sampler makes 6; record fewer, or raise sampler_steps"),
        (small.ddim, {"scheduler": "dimm"}, "unknown scheduler 'dimm'; did you mean 'ddim'"),
        (small.ddim, {"scheduler": "euler"}, "begins with noise of size 1, and the scheduler euler does not"),
        (small.ddpm, {"eta": 1.0}, "takes no eta"),
        (small.dit, {"prompts": ["a"]}, "prompts are given and small reads labels; leave prompts out"),
        (small.dit, {"labels": [1000]}, "reads labels, which are whole numbers from 0 to 999"),
        (build_small_pipeline, {}, "small reads prompts; give prompts=FILE, prompts="),
        (build_small_pipeline, {"labels": [1]}, "labels are given and small reads prompts"),
        (
            build_small_pipeline,
            {"prompts": "none.txt"},
            "prompts=none.txt is no file; give a text file with one prompt",
        ),
        (
            build_small_pipeline,
            {"prompts": ["a"], "height": 12, "width": 12},
            "cannot draw: ValueError: .*divisible by 8",
        ),
    ],
)
def test_settings_that_a_pipeline_does_not_have(build: Any, settings: Any, message: str) -> None:
    with pytest.raises(SynthquantError, match=message) as error:
        record(small.denoiser(build()), 8, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ["a"], "classes": "cifar10"}, "prompts and classes exclude each other"),
        ({"templates": ["photo of a {}"]}, "templates have a place for a class; give classes too"),
        ({"classes": "cifar10", "templates": ["photo"]}, "template 'photo' must have one place"),
        ({"height": 64}, "give height and width or neither"),
        ({"which": "random"}, "which"),
    ],
)
def test_settings_that_do_not_fit_together(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_settings(SelfSampling, settings, "here")


def test_too_few_rows_and_another_network(ddim: Denoiser) -> None:
    with pytest.raises(InputError, match="count is 2 and 3 steps are recorded, each at least once; ask for more"):
        record(ddim, 2)
    with pytest.raises(UnsupportedModelError, match="cifar10-resnet20 is no diffusion pipeline, whose sampler"):
        SelfSampling().synthesize(sq.open_model("zoo/cifar10-resnet20"), 20, sq.Rng(0))


def test_prompts_of_a_file_and_of_classes(stable: Denoiser, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("photo of a cat\n\n photo of a dog \n")
    few = {"steps": 1, "guidance": 1.0}
    read = record(stable, 3, prompts=str(tmp_path / "prompts.txt"), **few)
    assert read.manifest.conditions == ("photo of a cat", "photo of a dog", "photo of a cat")
    made = record(stable, 10, classes="cifar10", templates=["photo of the {}"], **few)
    assert len(set(made.manifest.conditions or ())) == 10
    assert all(str(text).startswith("photo of the ") for text in made.manifest.conditions or ())
    (tmp_path / "prompts.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no prompt; write one a line"):
        record(stable, 3, prompts=str(tmp_path / "prompts.txt"), **few)


def test_long_prompts_are_told_of(stable: Denoiser, tmp_path: Path) -> None:
    progress = Warned()
    method = SelfSampling(sampler_steps=2, steps=1, guidance=1.0, prompts=("photo of the " * 9, "photo of a cat"))
    method.synthesize(stable, 2, sq.Rng(0), progress=progress)
    assert len(progress.warnings) == 1 and progress.warnings[0].startswith("1 prompts are longer than the text encoder")


def test_values_that_are_not_finite() -> None:
    model = small.denoiser(small.ddim())
    with torch.no_grad():
        model.module.conv_out.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match="gives values that are not finite at step 2 of its sampler"):
        record(model, 3)
