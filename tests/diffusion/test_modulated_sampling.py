"""Modulated denoisers in samplers of diffusers, which call them as they please."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

import diffusers
from tests.denoisers import DENOISERS, denoiser
from tests.nn.toy_denoiser import Rows
from tests.small_diffusion import NOISE, ddim, saved
from tests.small_pipeline import build_small_pipeline
from torch import Tensor

import synthquant as sq
from synthquant.core.errors import DataError, InputError, SchemeError
from synthquant.core.rng import Rng
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.difference_ranges import calibrate_differences
from synthquant.quantize.rtn import Rtn

STEPS, COUNT = 6, 2


def draw(pipeline: Any, network: Any = None, steps: int = STEPS, seed: int = 0) -> Tensor:
    """Images `[2, 3, 8, 8]`, drawn with another denoiser if there is one."""
    own, pipeline.unet = pipeline.unet, pipeline.unet if network is None else network
    generators = [torch.Generator().manual_seed(seed + image) for image in range(COUNT)]
    try:
        found = pipeline(batch_size=COUNT, generator=generators, num_inference_steps=steps, output_type="np").images
    finally:
        pipeline.unet = own
    return torch.from_numpy(found)


def recorded(pipeline: Any) -> Rows:
    """What the sampler gave the denoiser, at all steps."""
    samples: list[Tensor] = []
    times: list[float] = []

    def look(module: Any, args: Any) -> None:
        samples.append(args[0].clone())
        times.append(int(args[1]))

    handle = pipeline.unet.register_forward_pre_hook(look)
    draw(pipeline, seed=100)
    handle.remove()
    return Rows(samples, times)


def float_model(pipeline: Any) -> FloatModel:
    unet = pipeline.unet.eval().requires_grad_(False)
    example = {"sample": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    arguments = Inputs((), {**example, "timestep": torch.tensor([900, 500, 100]), "return_dict": False})
    return FloatModel(unet, arguments, "small", ModelSource(source="test"), "other")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    found = ddim()
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def modulated(pipeline: Any) -> QuantModel:
    model = QuantModel.build(float_model(pipeline), QuantScheme.parse({"preset": "W8A4", "modulation": {}}))
    Rtn(observer="minmax").apply(model, recorded(pipeline), Rng(0))
    return model


def test_without_quantization_the_images_are_the_float_ones(pipeline: Any, modulated: QuantModel) -> None:
    wanted = draw(pipeline)
    with modulated.mode(weights=False, activations=False), modulated.sampling():
        torch.testing.assert_close(draw(pipeline, modulated.module), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_calls_between_two_steps_are_steps_as_well(pipeline: Any, modulated: QuantModel, scheduler: str) -> None:
    own = getattr(diffusers, scheduler)(**NOISE)
    own.set_timesteps(STEPS)
    noise = torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * own.init_noise_sigma

    @torch.no_grad()
    def sample(network: Any) -> Tensor:
        own.set_timesteps(STEPS)
        x = noise.clone()
        for t in own.timesteps:
            x = own.step(network(own.scale_model_input(x, t), t, return_dict=False)[0], t, x).prev_sample
        return x

    wanted = sample(pipeline.unet)
    with modulated.mode(weights=False, activations=False), modulated.sampling():
        found = sample(modulated.module)
        assert modulated.modulation is not None and modulated.modulation.run.steps > 1.5 * STEPS
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", DENOISERS)
def test_split_shortcuts_contexts_and_transformers_are_modulated_too(kind: str) -> None:
    # Three samples of each step, one step after the other.
    own = denoiser(kind, count=9)
    fields: dict[str, Any] = {"preset": "W8A8", "split_shortcuts": "all", "modulation": {}}
    off: dict[str, Any] = {}
    if kind == "transformer":  # it embeds the timestep a second time, for its last layers
        embedder = "transformer_blocks.0.norm1.emb.timestep_embedder"
        with pytest.raises(SchemeError, match=rf"{embedder}.linear_1 runs 2 times in a pass") as told:
            QuantModel.build(own.model, QuantScheme.parse(fields))
        off = json.loads(str(told.value).partition("scheme.overrides=")[2])
        assert set(off) == {f"{embedder}.linear_1", f"{embedder}.linear_2"}
    model = QuantModel.build(own.model, QuantScheme.parse({**fields, "overrides": off}))
    steps = [own.inputs.rows(start, start + 3) for start in (0, 3, 6)]
    with torch.no_grad():
        wanted = torch.cat([one.clone().call(own.model.module)[0] for one in steps])
        with model.mode(weights=False, activations=False), model.sampling():
            found = torch.cat([one.clone().call(model)[0] for one in steps])
    assert model.modulation is not None and set(model.modulation.layers) == set(model.layers) - set(off)
    assert (kind == "transformer") == (not model.splits)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_guidance_doubles_the_rows_which_keep_their_places() -> None:
    pipeline = build_small_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Inputs] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        given = {"sample": args[0], "timestep": torch.as_tensor(args[1]).expand(len(args[0]))}
        given |= {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        seen.append(Inputs((), {**given, "return_dict": False}))

    def draw_two(network: Any) -> Tensor:
        own, pipeline.unet = pipeline.unet, network
        generators = [torch.Generator().manual_seed(seed) for seed in range(COUNT)]
        options = {"num_inference_steps": 4, "guidance_scale": 5.0, "generator": generators, "output_type": "latent"}
        try:
            found: Tensor = pipeline(["a cat", "a ship"], **options).images
        finally:
            pipeline.unet = own
        return found

    handle = pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        wanted = draw_two(pipeline.unet)
    handle.remove()
    assert len(seen[0]) == 2 * COUNT
    model = FloatModel(pipeline.unet.eval().requires_grad_(False), seen[0], "guided", ModelSource(source="t"), "other")
    quantized = QuantModel.build(model, QuantScheme.parse({"preset": "W8A4", "modulation": {}}))
    with torch.no_grad(), quantized.mode(weights=False, activations=False), quantized.sampling():
        found = draw_two(quantized.module)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_noise_is_predicted_better_from_differences(pipeline: Any, modulated: QuantModel) -> None:
    # A few steps of a sampler that makes many.
    times = [500 - 10 * step for step in range(6)]
    noise = torch.randn(len(times), COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = Rows(list((noise * torch.tensor([1.0, *[0.05] * 5]).reshape(-1, 1, 1, 1, 1)).cumsum(0)), times)
    ways = {
        "static": QuantModel.build(modulated.float_model, "W8A4"),
        "static differences": QuantModel.build(
            modulated.float_model, QuantScheme.parse({"preset": "W8A4", "modulation": {"ranges": "static"}})
        ),
    }
    for model in ways.values():
        Rtn(observer="minmax").apply(model, rows, Rng(0))
    calibrate_differences(ways["static differences"], rows)
    errors = {}
    with torch.no_grad():
        wanted = [batch.call(pipeline.unet)[0] for batch in rows.batches(COUNT)]
        for name, model in {**ways, "differences": modulated}.items():
            with model.sampling():
                found = [batch.call(model)[0] for batch in rows.batches(COUNT)]
            errors[name] = float(torch.cat([a - b for a, b in zip(found, wanted, strict=True)][1:]).norm())
    assert errors["differences"] < errors["static"] / 2
    assert errors["static differences"] < errors["static"] / 2


def test_each_call_of_a_pipeline_is_a_trajectory_of_its_own(pipeline: Any, modulated: QuantModel) -> None:
    def sampled() -> Tensor:
        with modulated.sampling():
            return draw(pipeline, modulated.module)

    first, second = sampled(), sampled()
    assert torch.equal(first, second)
    with modulated.sampling(), pytest.raises(InputError, match="a new trajectory, or two that are interleaved"):
        draw(pipeline, modulated.module)
        draw(pipeline, modulated.module)
    assert torch.equal(sampled(), first)


def test_a_run_samples_with_the_steps_that_it_was_calibrated_on(tmp_path: Path) -> None:
    source, run = saved(ddim(), tmp_path / "pipeline"), tmp_path / "run"
    recipe = {
        "model": f"diffusers/{source}",
        "images": {"method": "self_sampling", "count": 12, "sampler_steps": STEPS, "steps": None, "batch_size": 2},
        "quantize": {"method": "rtn", "scheme": {"preset": "W4A4", "modulation": {"ranges": "static"}}},
        "device": "cpu",
    }
    sq.run(sq.Recipe.parse(recipe), run)
    metrics = sq.RunRecord.load(run / "run.json").stages["quantize"].metrics
    kept = metrics["modulation"]["bytes_per_row"]
    assert metrics["modulation"]["images"] == 2 and kept > 0
    quantized = sq.load_pipeline(run)
    quantized.set_progress_bar_config(disable=True)
    assert torch.equal(draw(quantized), draw(quantized))
    with pytest.raises(InputError, match="static ranges of differences are of a sampler with 6 steps"):
        draw(quantized, steps=4)
    few = recipe | {"images": recipe["images"] | {"steps": 3}}  # type: ignore[operator]
    with pytest.raises(
        DataError, match="need all 6 steps of the sampler, one after the other, and the trajectory has 3"
    ):
        sq.run(sq.Recipe.parse(few), tmp_path / "few")
