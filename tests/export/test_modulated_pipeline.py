"""Modulated networks in pipelines: each call is a trajectory of its own, and static ranges belong to their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests import small_diffusion as small
from tests.cli.conftest import Command
from tests.cli.conftest import synthquant as synthquant
from tests.small_quantized import tiny

import synthquant as sq
from synthquant.core.errors import InputError
from synthquant.core.progress import QUIET
from synthquant.data.sampler_steps import SamplerSteps
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.pipelines import Sampling, open_pipeline
from synthquant.quantize.difference_ranges import calibrate_differences
from synthquant.synthesize.sampling import SampleSettings, sample
from synthquant.synthesize.self_sampling import SelfSampling

STEPS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, sq.QuantModel, Any]]:
    root = tmp_path_factory.mktemp("modulated")
    model = sq.open_model(f"diffusers/{small.saved(tiny(), root / 'pipeline')}")
    assert isinstance(model, Denoiser)
    trajectory = SelfSampling(sampler_steps=STEPS, steps=None).synthesize(model, 2 * STEPS, sq.Rng(0))
    found = {}
    for ranges in ("dynamic", "static"):
        scheme = sq.QuantScheme.parse({"preset": "W4A4", "modulation": {"ranges": ranges}})
        quant_model = sq.QuantModel.build(model.taking(trajectory), scheme)
        sq.Rtn().apply(quant_model, trajectory, sq.Rng(0))
        if ranges == "static":
            calibrate_differences(quant_model, trajectory)
        quant_model.save(root / ranges / "model")
        found[ranges] = (root / ranges, quant_model, trajectory)
    return found


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
def test_calls_of_any_size_follow_each_other(runs: Any, ranges: str) -> None:
    folder, quant_model, _ = runs[ranges]
    pipeline, how = open_pipeline(str(folder)), Sampling(steps=STEPS)
    first = pipeline.draw(None, [1, 2, 3], how).images
    with torch.no_grad():
        assert torch.equal(pipeline.draw(None, [1], how).images, open_pipeline(str(folder)).draw(None, [1], how).images)
    assert torch.equal(pipeline.draw(None, [1, 2, 3], how).images, first)
    plain = open_pipeline(quant_model.float_model.source.source).replaced(quant_model)
    with quant_model.sampling():
        assert torch.equal(plain.draw(None, [1, 2, 3], how).images, first)
    assert not torch.equal(plain.draw(None, [1, 2, 3], how).images, first), "outside of sampling nothing is modulated"


def test_steps_of_the_sampler_are_kept_of_a_modulated_network(runs: Any, tmp_path: Path) -> None:
    pipeline = open_pipeline(str(runs["dynamic"][0]))
    images = sample(pipeline, SampleSettings(steps=STEPS, keep_steps=2, batch_size=2), 3, 0, tmp_path / "x", QUIET)
    kept = SamplerSteps.read(images.folder)
    assert kept is not None and kept.images.shape[:2] == (STEPS, 2)
    assert torch.equal(pipeline.draw(None, images.column("seed")[:2], Sampling(steps=STEPS)).images[1], images[1].image)


def test_static_ranges_refuse_other_steps_in_one_line(runs: Any, tmp_path: Path, synthquant: Command) -> None:
    folder, quant_model, trajectory = runs["static"]
    said = synthquant("sample", folder, "--count", 2, "--steps", 5, "--device", "cpu", "--out", tmp_path / "x").error
    assert "static ranges of the differences between 3 steps" in said and "--steps 3" in said
    assert not (tmp_path / "x").exists()
    done = synthquant("sample", folder, "--count", 2, "--steps", STEPS, "--device", "cpu", "--out", tmp_path / "y")
    assert done.status == 0, done.err
    with pytest.raises(InputError, match="static ranges"):
        open_pipeline(str(folder)).draw(None, [1], Sampling(steps=5))
    exported = sq.DiffusersFolder().export(quant_model, tmp_path / "folder")
    assert sq.DiffusersFolder().verify(quant_model, exported, trajectory)["drawn"] == 2
