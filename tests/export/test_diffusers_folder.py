"""Quantized pipelines: they draw as pipelines of diffusers do, are saved with all their parts, and load to the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

import diffusers
from tests import small_diffusion as small
from tests.small_networks import small_float_model, small_images
from tests.small_pipeline import build_small_pipeline
from tests.small_quantized import quantized, tiny

import synthquant as sq
from synthquant.compare import keep_with_run
from synthquant.core.errors import InputError, ModelError, UnsupportedModelError, VerificationError
from synthquant.core.files import sha256_file
from synthquant.diffusion.pipelines import Sampling, open_pipeline
from synthquant.diffusion.quantized import as_quantized
from synthquant.diffusion.recording import StandIn
from synthquant.diffusion.text_to_image import open_text_to_image
from synthquant.export.diffusers_folder import quantized_pipeline
from synthquant.quantize.rtn import Rtn

FAST = Sampling(steps=3)
KINDS: dict[str, tuple[Any, Any]] = {
    "ddim": (tiny, None),
    "dit": (small.dit, [1, 7]),
    "stable": (build_small_pipeline, ["photo of a cat", "photo of a ship"]),
}


class Case:
    """A quantized pipeline of one kind, as a run's checkpoint and exported."""

    def __init__(self, kind: str, root: Path) -> None:
        build, self.conditions = KINDS[kind]
        self.source = small.saved(build(), root / "pipeline")
        self.quant_model, self.recorded = quantized(self.source, self.conditions)
        self.run = root / "run"
        self.quant_model.save(self.run / "model")
        self.folder = sq.DiffusersFolder().export(self.quant_model, root / "exported")

    def drawn(self, source: Path | str) -> Tensor:
        return open_pipeline(str(source)).draw(self.conditions, [3, 4], FAST).images


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda kind: Case(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def ddim(cases: Callable[[str], Case]) -> Case:
    return cases("ddim")


@pytest.fixture
def stable(cases: Callable[[str], Case]) -> Case:
    return cases("stable")


def test_run_and_folder_draw_what_the_quantized_network_draws_and_not_what_the_float_one_does(case: Case) -> None:
    expected = open_pipeline(str(case.source)).replaced(case.quant_model).draw(case.conditions, [3, 4], FAST).images
    assert torch.equal(case.drawn(case.run), expected)
    assert torch.equal(case.drawn(case.folder), expected)
    assert not torch.equal(case.drawn(case.source), expected)


def test_the_folder_has_all_parts_and_needs_nothing_else(case: Case, tmp_path: Path) -> None:
    index = json.loads((case.folder / "model_index.json").read_text())
    assert index == {
        key: value
        for key, value in json.loads((case.source / "model_index.json").read_text()).items()
        if key != "_name_or_path"
    }
    denoiser = "transformer" if "transformer" in index else "unet"
    assert sorted(path.name for path in (case.folder / denoiser).iterdir()) == [
        "config.json", "model.safetensors", "quant_config.json",
    ]  # fmt: skip
    for part, found in index.items():
        if isinstance(found, list) and part != denoiser and found[0] is not None:
            for path in (case.source / part).iterdir():
                assert path.suffix == ".json" or sha256_file(path) == sha256_file(case.folder / part / path.name)
    moved = tmp_path / "moved"
    case.source.rename(moved)  # the pipeline that it was made from is gone
    try:
        case.drawn(case.folder)
        with pytest.raises(ModelError, match="pipeline"):
            case.drawn(case.run)
    finally:
        moved.rename(case.source)
    assert str(case.source) not in "".join(
        path.read_text() for path in case.folder.rglob("*.json") if path.name != "quant_config.json"
    )


def test_load_pipeline_gives_a_pipeline_of_diffusers(ddim: Case) -> None:
    pipeline = sq.load_pipeline(ddim.run)
    assert isinstance(pipeline, diffusers.DDIMPipeline) and type(pipeline).__name__ == "DDIMPipeline"
    assert isinstance(pipeline.unet, StandIn) and pipeline.unet.config.sample_size == 8
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(batch_size=2, generator=generators, num_inference_steps=3, output_type="np").images
    assert (found * 255).round().astype("uint8").tolist() == ddim.drawn(ddim.run).permute(0, 2, 3, 1).tolist()


def test_save_pretrained_of_a_quantized_pipeline_keeps_it_quantized(ddim: Case, tmp_path: Path) -> None:
    pipeline = sq.load_pipeline(ddim.folder)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.save_pretrained(tmp_path / "saved")
    weights = (tmp_path / "saved" / "unet" / "model.safetensors").read_bytes()
    assert weights == (ddim.folder / "unet" / "model.safetensors").read_bytes()
    assert sq.load_pipeline(tmp_path / "saved").scheduler.config.timestep_spacing == "trailing"
    with pytest.raises(InputError, match="saved without options; leave variant out"):
        pipeline.save_pretrained(tmp_path / "other", variant="fp16")
    assert not (tmp_path / "other").exists()
    assert torch.equal(ddim.drawn(f"diffusers/{ddim.folder}"), ddim.drawn(ddim.folder))


def test_every_call_of_a_quantized_pipeline_runs_in_what_starts_a_trajectory(ddim: Case) -> None:
    begun: list[str] = []

    @contextmanager
    def sampling() -> Any:
        begun.append("begin")
        yield
        begun.append("end")

    plain = open_pipeline(str(ddim.source))
    pipeline = as_quantized(plain.replaced(ddim.quant_model).pipeline, sampling, lambda *_: None)
    for _ in range(2):
        pipeline(batch_size=1, num_inference_steps=2)
    assert begun == ["begin", "end"] * 2
    plain.draw(None, [1], FAST)
    assert begun == ["begin", "end"] * 2, "the float pipeline is as it was"


def test_the_same_network_gives_the_same_bytes_and_names_its_codes(ddim: Case, tmp_path: Path) -> None:
    again = sq.DiffusersFolder().export(ddim.quant_model, tmp_path / "again")
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(ddim.folder) for path in ddim.folder.rglob("*") if path.is_file())
    for path in files:
        assert (again / path).read_bytes() == (ddim.folder / path).read_bytes(), path
    tensors = load_file(ddim.folder / "unet" / "model.safetensors")
    for name, layer in ddim.quant_model.layers.items():
        assert tensors[f"{name}.weight_packed"].dtype == torch.uint8 and f"{name}.weight" not in tensors
        assert tensors[f"{name}.weight_packed"].numel() == layer.weight.numel(), "eight bits each"


def test_verification_finds_another_network_and_another_scheduler(ddim: Case, tmp_path: Path) -> None:
    exporter = sq.DiffusersFolder()
    found = exporter.verify(ddim.quant_model, ddim.folder, ddim.recorded)
    assert found["samples"] == len(ddim.recorded) and found["drawn"] == 2 and found["loaded"]["max_error"] == 0
    other, _ = quantized(ddim.source, scheme="W4A8")
    exporter.export(other, tmp_path / "other")
    with pytest.raises(VerificationError, match="other outputs"):
        exporter.verify(ddim.quant_model, tmp_path / "other", ddim.recorded)
    exporter.export(ddim.quant_model, tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"beta_end": 0.02', '"beta_end": 0.2'))
    with pytest.raises(VerificationError, match="draws other images"):
        exporter.verify(ddim.quant_model, tmp_path / "scheduler", ddim.recorded)


def test_the_card_says_what_is_known(ddim: Case, tmp_path: Path) -> None:
    card = (ddim.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "quantized: W8A8 (" in card and "`unet` of `pipeline`" in card and str(ddim.source) not in card
    assert "The run that made it is not known." in card and "Not measured" in card and "pipe()" in card
    run = tmp_path / "run"
    ddim.quant_model.save(run / "model")
    record = sq.RunRecord(recipe={"quantize": {"method": "rtn", "scheme": {"name": "W8A8"}}, "images": None}, seed=7)
    record.save(run / "run.json")
    estimate = {"value": 1.25, "low": 1.0, "high": 1.5}
    keep_with_run(
        {"images": "a", "reference": "b", "features": "f (3 numbers)", "count": 4096, "reference_count": 5000,
         "frechet": estimate, "kernel": {"value": 0.5, "std": 0.1, "subsets": 3, "subset_size": 4},
         "precision": estimate, "recall": estimate, "seed": 0},
        run,
    )  # fmt: skip
    kept = (run / "model" / "README.md").read_text()
    assert kept == sq.card(run) and "4 096 images beside 5 000" in kept and "| Frechet distance |" in kept
    result = sq.export_run(run, sq.DiffusersFolder(), tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| quantize.method | rtn |" in card and "| quantize.scheme.name | W8A8 |" in card and "| seed | 7 |" in card
    assert "4 096 images beside 5 000" in card and "| Frechet distance | 1.25 | 1.00 to 1.50 |" in card
    assert result["verification"] is None and result["bytes"] > 0


def test_the_card_of_a_run_loads_its_pipeline(ddim: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (ddim.run / "model" / "README.md").read_text()
    assert card == sq.card(ddim.run) and "Not measured" in card and "## Limits" in card
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").symlink_to(ddim.run / "model")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.+?)```", card, flags=re.DOTALL)[0], names)
    assert names["pipe"](num_inference_steps=1, output_type="np").images.shape[0] == 1


def test_parts_that_stay_float_are_named(stable: Case) -> None:
    card = (stable.folder / "README.md").read_text()
    assert "In floating point stay: `text_encoder` (CLIPTextModel), `vae` (AutoencoderKL)." in card
    assert 'pipe("a photo")' in card


def test_a_quantized_pipeline_is_a_generator_of_images_from_text(stable: Case) -> None:
    generator = open_text_to_image(str(stable.run), scheduler="dpm++")
    found = generator.draw(stable.conditions, [3, 4], FAST).images
    twin = open_pipeline(str(stable.source), scheduler="dpm++")
    assert generator.fingerprint != twin.fingerprint
    assert torch.equal(found, twin.replaced(stable.quant_model).draw(stable.conditions, [3, 4], FAST).images)
    with pytest.raises(InputError, match="computes in float32, not float16"):
        open_text_to_image(str(stable.run), dtype="float16")


def test_the_loop_closes_a_quantized_generator_draws_the_images_of_a_classifier(stable: Case, tmp_path: Path) -> None:
    model = small_float_model(tmp_path)
    names = ("cat", "ship", "dog", "frog", "deer", "bird", "truck")
    sets = {}
    for name, generator in (("float", stable.source), ("run", stable.run), ("folder", stable.folder)):
        method = sq.TextToImage(generator=str(generator), classes=names, steps=1, batch_size=4)
        sets[name] = method.synthesize(model, 4, sq.Rng(0))
    assert [one.column("prompt") for one in sets.values()] == [sets["float"].column("prompt")] * 3
    images = {name: [one[index].image for index in range(4)] for name, one in sets.items()}
    assert all(torch.equal(a, b) for a, b in zip(images["run"], images["folder"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(images["run"], images["float"], strict=True))
    assert sets["run"].column("generator")[0] != sets["float"].column("generator")[0]


def test_what_is_no_quantized_pipeline_is_one_line(ddim: Case, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no quantized network"):
        sq.load_pipeline(ddim.source)
    with pytest.raises(ModelError, match="holds a quantized denoiser, no float weights"):
        sq.open_model(f"diffusers/{ddim.folder}")
    with pytest.raises(UnsupportedModelError, match="not a text-to-image pipeline"):
        open_text_to_image(str(ddim.run))
    classifier = sq.QuantModel.build(small_float_model(tmp_path), "W8A8")
    with pytest.raises(UnsupportedModelError, match="is no denoiser of a diffusion pipeline; export it as checkpoint"):
        sq.DiffusersFolder().check(classifier)
    with pytest.raises(UnsupportedModelError, match="is no denoiser"):
        quantized_pipeline(classifier)
    Rtn().apply(classifier, small_images(4), sq.Rng(0))
    classifier.save(tmp_path / "classifier" / "model")
    with pytest.raises(ModelError, match="holds a quantized Network, which is no denoiser"):
        sq.load_pipeline(tmp_path / "classifier")
    damaged = sq.DiffusersFolder().export(ddim.quant_model, tmp_path / "damaged")
    (damaged / "unet" / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="damaged"):
        sq.load_pipeline(damaged)
