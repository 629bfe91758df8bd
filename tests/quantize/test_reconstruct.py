"""The engine: every method lowers the error of its units, resumes bit for bit, and keeps to its budget."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.damage import Warned
from tests.nn.networks import Keywords, Network, Upsampling, float_model
from torch import nn

from synthquant.core.errors import DataError
from synthquant.core.progress import QUIET, Bar, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.methods import QUANTIZERS, Equalize, MemoryBudget
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.equalize import equalized
from synthquant.quantize.reconstruct import Reconstruction

LEARNED = ("adaround", "brecq", "qdrop", "genie_m")
FAST: dict[str, Any] = {"iterations": 24, "batch_size": 8, "rounding_lr": 5e-2, "calibration_images": 16}


def pixels(count: int = 21) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images(count: int = 21) -> ImageSet:
    return ImageSet.from_tensors(pixels(count), dtype="float16")


def method(name: str, **changes: Any) -> Any:
    fields = {**FAST, **({"activation_iterations": 12} if name == "brecq" else {}), **changes}
    return QUANTIZERS.get(name)(**fields)  # type: ignore[call-arg]


def quantize(
    name: str,
    network: nn.Module | None = None,
    *,
    scheme: str = "W3A4",
    seed: int = 0,
    progress: Progress = QUIET,
    workdir: Path | None = None,
    memory: MemoryBudget | None = None,
    data: ImageSet | None = None,
    equalize: Equalize = "none",
    **changes: Any,
) -> tuple[QuantModel, QuantReport]:
    model = equalized(QuantModel.build(float_model(network or Network()), scheme), equalize, images())
    report = method(name, **changes).apply(
        model, data or images(), Rng(seed), progress=progress, workdir=workdir, memory=memory or MemoryBudget()
    )
    return model, report


def state(model: QuantModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state().items()}


def same(left: QuantModel, right: QuantModel) -> bool:
    one, other = state(left), state(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(Exception):
    """What the process dies of."""


class Killing(Progress):
    """Dies after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        yield _KillingBar(title, total, self)


class _KillingBar(Bar):
    def __init__(self, title: str, total: int, progress: Killing) -> None:
        super().__init__(title, total)
        self._progress = progress

    def advance(self, steps: int = 1, **fields: float | str) -> None:
        super().advance(steps, **fields)
        self._progress.left -= steps
        if self._progress.left <= 0:
            raise Killed


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[QuantModel, QuantReport]]:
    return {name: quantize(name) for name in LEARNED}


@pytest.mark.parametrize("name", LEARNED)
def test_lowers_the_error_of_its_units(results: dict[str, tuple[QuantModel, QuantReport]], name: str) -> None:
    model, report = results[name]
    assert report.method == name and report.diverged == tuple(unit.name for unit in report.units if unit.diverged)
    phases = 2 if name == "brecq" else 1
    units = model.units("layer" if name == "adaround" else "block")
    assert [unit.name for unit in report.units] == [unit.name for unit in units] * phases
    for unit in report.units:
        assert unit.loss_start is not None and unit.loss_end is not None
        assert unit.diverged == (unit.loss_end > unit.loss_start)
    gains = [unit.loss_end / unit.loss_start for unit in report.units if unit.loss_end and unit.loss_start]
    assert min(gains) < 0.9 and len(report.diverged) <= len(report.units) / 2
    learned = report.units[1 if name == "brecq" else 0]
    assert learned.steps[0] == 1 and learned.steps[-1] == 24 and len(learned.losses) == len(learned.steps)
    assert learned.undecided is not None and 0 <= learned.undecided <= 1
    assert learned.seconds > 0


@pytest.mark.parametrize("name", LEARNED)
def test_leaves_a_finished_network(results: dict[str, tuple[QuantModel, QuantReport]], name: str) -> None:
    model, _ = results[name]
    assert model.calibrated and not any(parameter.requires_grad for parameter in model.module.parameters())
    for layer in model.layers.values():
        assert layer.weight_source is None and layer.weights_enabled
    for quantizer in model.quantizers.values():
        assert quantizer.enabled and not quantizer.learning and quantizer.watcher is None
        assert float(quantizer.scale) > 0
    with torch.no_grad():
        x = model.float_model.example_images(4)
        assert torch.equal(model(x), model(x)) and bool(model(x).isfinite().all())


@pytest.mark.parametrize("name", LEARNED)
def test_same_seed_same_result(results: dict[str, tuple[QuantModel, QuantReport]], name: str) -> None:
    assert same(quantize(name)[0], results[name][0])
    assert not same(quantize(name, seed=1)[0], results[name][0])


@pytest.mark.parametrize("name", LEARNED)
def test_a_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, results: dict[str, tuple[QuantModel, QuantReport]], name: str
) -> None:
    steps = 3 * 24 + 40 if name == "brecq" else 40  # BRECQ in its second phase
    with pytest.raises(Killed):
        quantize(name, progress=Killing(steps), workdir=tmp_path)
    kept = len(list(tmp_path.rglob("unit-*")))
    assert 0 < kept < len(results[name][1].units)
    model, report = quantize(name, workdir=tmp_path)
    assert same(model, results[name][0])
    for found, wanted in zip(report.units, results[name][1].units, strict=True):
        assert found.model_copy(update={"seconds": wanted.seconds}) == wanted
    again, _ = quantize(name, workdir=tmp_path, progress=Killing(10**6))
    assert same(again, model), "a finished phase is read, not run"


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("qdrop", lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not as it was written"),
        ("genie_m", lambda path: path.write_bytes(b""), "is not as it was written"),
        ("genie_m", lambda path: path.unlink(), "is missing, but units after it are there"),
        ("brecq", lambda path: shutil.copy(path.with_name("unit-0000.safetensors"), path), "after other units than"),
    ],
)
def test_a_damaged_unit_is_learned_again_and_the_others_stay(
    tmp_path: Path,
    results: dict[str, tuple[QuantModel, QuantReport]],
    name: str,
    spoil: Callable[[Path], object],
    told: str,
) -> None:
    quantize(name, workdir=tmp_path)
    paths = sorted(tmp_path.rglob("unit-*"))
    path = next(path for path in paths if path.name == "unit-0001.safetensors")
    before = {path: path.stat().st_mtime_ns for path in paths}
    spoil(path)
    progress = Warned()
    model, _ = quantize(name, workdir=tmp_path, progress=progress)
    assert same(model, results[name][0])
    assert [text for text in progress.warnings if "learned again" in text] == [
        text for text in progress.warnings if str(path) in text and told in text
    ]
    assert len(progress.warnings) >= 1
    assert {p for p in paths if p.stat().st_mtime_ns != before[p]} == {path}


def test_units_of_other_settings_images_or_seeds_are_refused(tmp_path: Path) -> None:
    quantize("genie_m", workdir=tmp_path, iterations=1)
    others: list[dict[str, Any]] = [
        {"iterations": 2},
        {"quantize_probability": 0.75},
        {"seed": 1},
        {"data": images(20)},
    ]
    for changes in (*others, {"scheme": "W2A4"}, {"equalize": "activations"}):
        with pytest.raises(DataError, match="holds units of another run"):
            quantize("genie_m", workdir=tmp_path, **{"iterations": 1, **changes})


@pytest.mark.parametrize("network", [Network, Upsampling, Keywords])
def test_where_caches_are_kept_does_not_matter(tmp_path: Path, network: type[nn.Module]) -> None:
    fast: dict[str, Any] = {"iterations": 4, "network": network()}
    host, _ = quantize("genie_m", **fast, memory=MemoryBudget(host_gib=1))
    disk, _ = quantize("genie_m", **fast, memory=MemoryBudget(host_gib=0), workdir=tmp_path)
    assert same(host, disk)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("unit-")]


def test_half_precision_caches_are_close() -> None:
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        _, report = quantize("genie_m", iterations=0, memory=MemoryBudget(cache_dtype=dtype))  # type: ignore[arg-type]
        losses[dtype] = [unit.loss_start for unit in report.units]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1, abs=1e-4)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.02, abs=1e-5)


def test_the_budget_is_kept(tmp_path: Path) -> None:
    model = QuantModel.build(float_model(Network()), "W3A4")
    data = CalibrationSet(model, images())
    whole = Reconstruction(model, data, "block", MemoryBudget(host_gib=1), None)
    assert whole.store.used["host"] == 21 * 3 * 8 * 8 * 4 and whole.store.used["disk"] == 0
    budget = 10000
    peaks = []
    for size in (2**30, budget):
        said: list[str] = []
        talkative = Progress()
        talkative.say = said.append  # type: ignore[method-assign]
        quantize("qdrop", iterations=2, memory=MemoryBudget(host_gib=size / 2**30), workdir=tmp_path / str(size),
                 progress=talkative)  # fmt: skip
        peaks.append(said[-1])
    assert "host" in peaks[0] and "disk" not in peaks[0] and "disk" in peaks[1]


@pytest.mark.parametrize("name", ["qdrop", "genie_m"])
def test_a_diverging_unit_is_put_back_and_reported(name: str) -> None:
    warned: list[str] = []
    loud = Progress()
    loud.warn = warned.append  # type: ignore[method-assign]
    model, report = quantize(name, activation_lr=1e6, progress=loud)
    assert report.diverged and all(unit.diverged == (unit.name in report.diverged) for unit in report.units)
    assert len(warned) == len(report.diverged) and "got worse" in warned[0]
    with torch.no_grad():
        assert bool(model(model.float_model.example_images(4)).isfinite().all())
    untouched, _ = quantize(name, iterations=0)
    if len(report.diverged) == len(report.units):
        assert same(model, untouched)


@pytest.mark.parametrize("granularity", ["block", "layer", "network"])
def test_every_granularity_works(granularity: str) -> None:
    model, report = quantize("genie_m", granularity=granularity)
    assert [unit.name for unit in report.units] == [unit.name for unit in model.units(granularity)]  # type: ignore[arg-type]
    assert any((unit.loss_end or 1) < (unit.loss_start or 0) for unit in report.units)


@pytest.mark.parametrize("count", [1, 7, 9])
def test_any_number_of_images(count: int) -> None:
    for name in ("qdrop", "genie_m"):
        _, report = quantize(name, data=images(count), iterations=5)
        assert len(report.units) == 4 and all(unit.loss_end is not None for unit in report.units)


def test_broken_images_are_skipped(tmp_path: Path) -> None:
    from PIL import Image

    for index, pixel in enumerate((pixels(5) * 255).byte()):
        Image.fromarray(pixel.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    clean, _ = quantize("genie_m", data=open_images(tmp_path), iterations=5)
    (tmp_path / "2-broken.png").write_bytes(b"nothing")
    data = open_images(tmp_path)
    model, report = quantize("genie_m", data=data, iterations=5)
    assert [entry.name for entry in data.set_aside] == ["2-broken.png"]
    assert len(report.units) == 4 and same(model, clean)


def test_no_images_is_an_error() -> None:
    for name in QUANTIZERS.names():
        model = QuantModel.build(float_model(Network()), "W4A4")
        with pytest.raises(DataError, match="0 images to quantize with"):
            QUANTIZERS.get(name)().apply(model, images(0), Rng(0))


def test_the_float_model_stays_as_it_was() -> None:
    original = float_model(Network())
    before = original.fingerprint
    model = QuantModel.build(original, "W4A4")
    method("genie_m", iterations=3).apply(model, images(), Rng(0))
    assert original.fingerprint == before
