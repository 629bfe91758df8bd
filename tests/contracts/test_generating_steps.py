"""A step that makes its own images while it trains, and a stage that a recipe adds: both known to this file alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from tests.small_networks import small_float_model, small_images
from torch import Tensor
from torch.nn import functional as F

from synthquant import make, pipeline
from synthquant.cli import main
from synthquant.core.errors import InputError, RecipeError
from synthquant.core.files import sha256_file
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.record import RunRecord
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.core.tensor_file import read_sealed_tensors, write_sealed_tensors
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import load_checkpoint
from synthquant.methods import QUANTIZERS, MemoryBudget
from synthquant.models.watched_batch_norms import WatchedBatchNorms
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.learn import learning
from synthquant.recipe import QuantizeSection, Recipe
from synthquant.stages import STAGES, Run, Stage

STEP, STAGE, LATER = "dreams", "halve", "look"


class Dreams(Settings):
    """Images that the two networks disagree on, made anew before each step of training (in the way of GDFQ)."""

    needs_images: ClassVar[bool] = False
    made: ClassVar[list[int]] = []

    rounds: int = Field(default=3, ge=1)
    """How often images are made and learned from."""
    batch_size: int = Field(default=4, ge=1)
    """Images in a round."""

    def apply(
        self,
        quant_model: QuantModel,
        images: ImageSet | None,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
    ) -> QuantReport:
        teacher = copy.deepcopy(quant_model.float_model.module).eval().requires_grad_(False)
        norms = WatchedBatchNorms(teacher, name="teacher", per_image=False)
        calibrate_weights(quant_model, "minmax")
        scales = [one for quantizer in quant_model.quantizers.values() for one in quantizer.learnable()]
        optimizer = torch.optim.SGD(scales, lr=1e-3)
        with progress.bar(STEP, self.rounds) as bar:
            for number in range(self.rounds):
                path = None if workdir is None else workdir / f"round-{number}.safetensors"
                if path is not None and path.exists():
                    kept = read_sealed_tensors(path).tensors
                    for name, quantizer in quant_model.quantizers.items():
                        quantizer.load_grid({part: kept[f"{name}.{part}"] for part in quantizer.grid()})
                else:
                    self.made.append(number)
                    found = self.dream(quant_model, teacher, norms, rng.child(f"round-{number}"), trained=number > 0)
                    if number == 0:
                        pixels = quant_model.float_model.preprocess.pixels(found).half()
                        seen = CalibrationSet(quant_model, ImageSet.from_tensors(pixels, framing="cropped"))
                        calibrate_activations(quant_model, seen, len(found), "minmax", quantized_weights=True)
                    with learning(quant_model.quantizers.values(), scales):
                        loss = F.mse_loss(quant_model(found), teacher(found))
                        optimizer.zero_grad()
                        loss.backward()
                    optimizer.step()
                    if path is not None:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        grids = {name: quantizer.grid() for name, quantizer in quant_model.quantizers.items()}
                        state = {f"{name}.{part}": grid[part] for name, grid in grids.items() for part in grid}
                        write_sealed_tensors(path, state, {})
                bar.advance()
        return QuantReport(method=STEP)

    def dream(
        self, quant_model: QuantModel, teacher: torch.nn.Module, norms: WatchedBatchNorms, rng: Rng, *, trained: bool
    ) -> Tensor:
        size = quant_model.float_model.preprocess.input_size
        images = torch.randn(self.batch_size, 3, *size, generator=rng.generator("pixels")).requires_grad_()
        for _ in range(2):
            statistics, _ = norms.statistics(partial(teacher, images))
            loss = norms.distance(statistics)
            if trained:
                with learning(quant_model.quantizers.values(), ()):
                    loss = loss - F.mse_loss(quant_model(images), teacher(images))
            (gradient,) = torch.autograd.grad(loss, images)
            images = (images - 0.1 * gradient.sign()).detach().requires_grad_()
        return images.detach()


class Halve(Settings, Stage):
    """Changes the quantized network behind the step, before it is kept."""

    name: ClassVar[str] = STAGE
    after: ClassVar[str] = "quantize"
    kept_by: ClassVar[str] = "checkpoint"

    factor: float = 0.5
    """Of all biases."""

    @torch.no_grad()
    def do(self, run: Run) -> dict[str, Any]:
        assert run.quant_model is not None
        biases = [layer.bias for layer in run.quant_model.layers.values() if layer.bias is not None]
        for bias in biases:
            bias.mul_(self.factor)
        return {"biases": len(biases)}


class Look(Settings, Stage):
    """Measures something at the end."""

    name: ClassVar[str] = LATER
    after: ClassVar[str] = "evaluate"

    def do(self, run: Run) -> dict[str, Any]:
        assert run.quant_model is not None
        return {"largest": float(run.quant_model(run.model.example_images(2)).abs().max())}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both are there for this file's tests only."""
    for registry in (QUANTIZERS, STAGES):
        registry.names()  # the package's own first
        monkeypatch.setattr(registry, "_own", dict(registry._own))
    QUANTIZERS.register(STEP)(Dreams)
    STAGES.register(STAGE)(Halve)
    STAGES.register(LATER)(Look)
    Dreams.made.clear()
    yield


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    small_images(21).save(tmp_path / "data")
    return {
        "model": small_float_model(tmp_path).source.model_dump(mode="json"),
        "quantize": {"method": STEP, "scheme": "W4A4"},
        "evaluate": {"data": str(tmp_path / "data"), "batch_size": 8},
        "device": "cpu",
    }


class Stop(Progress):
    """Ends a run when the bar of a title has come to a step."""

    def __init__(self, title: str, step: int) -> None:
        self._title, self._step = title, step

    def bar(self, title: str, total: int) -> Any:
        outer = super().bar(title, total)
        limit = self._step if title == self._title else None

        class Context:
            def __enter__(self) -> Any:
                bar = outer.__enter__()
                advance = bar.advance

                def stopping(steps: int = 1, **fields: float | str) -> None:
                    advance(steps, **fields)
                    if limit is not None and bar.done >= limit:
                        raise KeyboardInterrupt

                bar.advance = stopping
                return bar

            def __exit__(self, *error: Any) -> Any:
                return outer.__exit__(*error)

        return Context()


def weights(run: Path) -> str:
    return sha256_file(run / "model" / "model.safetensors")


def test_a_run_without_images_is_made_by_the_step_and_resumed_inside_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    record = pipeline.run(Recipe.parse(recipe), tmp_path / "whole")
    assert Dreams.made == [0, 1, 2]
    assert list(record.stages) == ["model", "quantize", "checkpoint", "evaluate", "report"]
    assert record.stages["quantize"].metrics["method"] == STEP and not (tmp_path / "whole" / "images").exists()
    assert record.stages["evaluate"].metrics["count"] == 21 and (tmp_path / "whole" / "report.html").is_file()
    written = Recipe.load(tmp_path / "whole" / "recipe.yaml")
    assert written == Recipe.parse(recipe) and written.images is None
    Dreams.made.clear()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(Recipe.parse(recipe), tmp_path / "cut", Stop(STEP, 2))
    assert Dreams.made == [0, 1] and not (tmp_path / "cut" / "model").exists()
    pipeline.run(Recipe.parse(recipe), tmp_path / "cut")
    assert Dreams.made == [0, 1, 2], "finished rounds are not made again"
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    pipeline.run(Recipe.parse(recipe | {"seed": 1}), tmp_path / "other")
    assert weights(tmp_path / "other") != weights(tmp_path / "whole")


def test_the_command_asks_for_images_only_where_they_are_needed(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = [recipe["model"]["source"], "--input-size", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]

    def ended(*more: str) -> tuple[int, str]:
        out = ["--out", str(tmp_path / "run"), "--device", "cpu", "--data", recipe["evaluate"]["data"]]
        with pytest.raises(SystemExit) as stop:
            main(["quantize", *network, *out, *more])
        return int(stop.value.code or 0), capsys.readouterr().err

    status, said = ended("--method", "rtn")
    assert status and said.endswith("'images' is missing: quantize.method rtn needs them\n") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert ended("--method", STEP, "--set", "rounds=1")[0] == 0
    assert Dreams.made == [0] and not (tmp_path / "run" / "images").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"quantize": {"method": "rtn", "scheme": "W8A8"}}, "quantize.method rtn needs them"),
        ({"quantize": {"method": STEP, "scheme": "W8A8", "bias_correction": True}}, "quantize.bias_correction needs"),
        ({"quantize": {"method": STEP, "scheme": "W8A8", "equalize": "activations"}}, "equalize activations needs"),
        ({"select": ["energy:0.7"]}, "select needs them"),
        ({"evaluate": None}, "without evaluate the network is measured on them"),
    ],
)
def test_what_needs_images_says_so_before_a_run(recipe: dict[str, Any], change: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=f"'images' is missing: .*{why}"):
        Recipe.parse(recipe | change)


def test_a_step_that_needs_images_is_not_called_without(recipe: dict[str, Any], tmp_path: Path) -> None:
    section = QuantizeSection.parse({"method": "rtn", "scheme": "W8A8"}, "test")
    with pytest.raises(InputError, match=r"no images to quantize with, which quantize\.method rtn needs"):
        make.quantize(small_float_model(tmp_path), section, None, 0)


def test_a_stage_that_a_recipe_adds_is_done_kept_and_not_repeated(recipe: dict[str, Any], tmp_path: Path) -> None:
    plain = Recipe.parse(recipe)
    added = Recipe.parse(recipe | {STAGE: {"factor": 0.25}, LATER: {}})
    assert added != plain and Recipe.parse(added.resolved()) == added
    assert added.resolved()[STAGE] == {"factor": 0.25} and STAGE not in plain.resolved()
    pipeline.run(plain, tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(added, tmp_path / "added", Stop("evaluate float", 8))
    record = RunRecord.load(tmp_path / "added" / "run.json")
    assert record.stages[STAGE].status == record.stages["checkpoint"].status == "done"
    assert record.stages[STAGE].metrics["biases"] > 0 and LATER not in record.stages
    changed = weights(tmp_path / "added")
    assert changed != weights(tmp_path / "plain")
    record = pipeline.run(added, tmp_path / "added")
    assert weights(tmp_path / "added") == changed, "halved once"
    assert record.stages[LATER].metrics["largest"] > 0 and record.stages["report"].status == "done"
    asked = added.quantize.scheme.model_copy(update={"attention": None})  # this network has none
    assert load_checkpoint(tmp_path / "added" / "model", trust_code=True).scheme == asked
    with pytest.raises(InputError, match="another recipe"):
        pipeline.run(plain, tmp_path / "added")


def test_faults_of_added_stages_are_said(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="unknown setting 'factr'; did you mean 'factor'"):
        Recipe.parse(recipe | {STAGE: {"factr": 1}})
    with pytest.raises(RecipeError, match="halve must be a mapping"):
        Recipe.parse(recipe | {STAGE: 3})
    with pytest.raises(RecipeError, match="unknown setting 'added'"):
        Recipe.parse(recipe | {"added": {STAGE: {}}})
    monkeypatch.setattr(Halve, "after", "select")
    with pytest.raises(RecipeError, match="the stage 'halve' belongs to 'select', which this run does not have"):
        pipeline.run(Recipe.parse(recipe | {STAGE: {}}), tmp_path / "run")
