"""Finished units on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.damage import Warned, damages
from tests.nn.networks import Network, float_model

from synthquant.core.errors import DataError
from synthquant.core.quant_report import UnitReport
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import calibrate_weights
from synthquant.quantize.unit_files import Parts, UnitFiles, finite, snapshot


def parts() -> Parts:
    model = QuantModel.build(float_model(Network()), "W4A4")
    calibrate_weights(model, "minmax")
    for quantizer in model.quantizers.values():
        quantizer.set_grid(torch.tensor([0.1]), torch.tensor([3.0]))
    return list(model.layers.values()), list(model.quantizers.values())


def test_a_unit_comes_back(tmp_path: Path) -> None:
    saved = parts()
    files = UnitFiles(tmp_path, "weights", lambda: "x")
    report = UnitReport(name="blocks.0", layers=("a",), loss_start=2.0, loss_end=1.0, steps=(1, 2), losses=(2.0, 1.0))
    assert files.load(3, saved) is None
    files.save(3, saved, report)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["unit-0003.safetensors"]
    other = parts()
    for layer in other[0]:
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.codes.zero_()
        layer.weight_quantizer.scale.fill_(9)
    other[1][0].set_grid(torch.tensor([7.0]), torch.tensor([0.0]))
    assert UnitFiles(tmp_path, "weights", lambda: "x").load(3, other) == report
    for left, right in zip(snapshot(*saved).tensors.items(), snapshot(*other).tensors.items(), strict=True):
        assert left[0] == right[0] and torch.equal(left[1], right[1])


def test_a_damaged_unit_is_not_taken_up_and_that_is_said(tmp_path: Path) -> None:
    report = UnitReport(name="a", losses=(1.0,), steps=(1,))
    UnitFiles(tmp_path, "weights", lambda: "x").save(0, parts(), report)
    path, target = tmp_path / "weights/unit-0000.safetensors", parts()
    data, before = path.read_bytes(), snapshot(*target).tensors
    for what, content in damages(data, 150):
        path.write_bytes(content)
        progress = Warned()
        found = UnitFiles(tmp_path, "weights", lambda: "x", progress=progress).load(0, target)
        if found is None:
            assert progress.warnings == [
                f"{path} is not as it was written (its hash does not fit); it is learned again"
            ], what
            now = snapshot(*target).tensors
            assert all(torch.equal(now[name], before[name]) for name in before), what
        else:
            assert found == report and not progress.warnings, what


def test_a_unit_that_follows_from_others_is_not_taken_up(tmp_path: Path) -> None:
    other = parts()
    other[1][0].set_grid(torch.tensor([7.0]), torch.tensor([0.0]))
    files = UnitFiles(tmp_path, "weights", lambda: "x")
    files.save(0, parts(), UnitReport(name="a"))
    files.save(1, parts(), UnitReport(name="b"))
    assert UnitFiles(tmp_path, "weights", lambda: "x").load_all([parts(), parts()]) is not None
    progress = Warned()
    again = UnitFiles(tmp_path, "weights", lambda: "x", progress=progress)
    again.save(0, other, UnitReport(name="a"))
    assert again.load_all([parts(), parts()]) is None
    assert again.load(1, parts()) is None
    assert "unit-0001.safetensors was learned after other units than those before it" in progress.warnings[0]
    later = UnitFiles(tmp_path, "weights", lambda: "x", after="another phase before", progress=progress)
    assert later.load(0, parts()) is None and len(progress.warnings) == 2


def test_a_unit_of_another_run_is_refused(tmp_path: Path) -> None:
    saved = parts()
    UnitFiles(tmp_path, "weights", lambda: "x").save(0, saved, UnitReport(name="a"))
    with pytest.raises(DataError, match="holds units of another run"):
        UnitFiles(tmp_path, "weights", lambda: "y").load(0, saved)


def test_without_a_folder_nothing_is_kept() -> None:
    files = UnitFiles(None, "weights", lambda: (1 / 0,))
    files.save(0, parts(), UnitReport(name="a"))
    assert files.load(0, parts()) is None


def test_a_snapshot_restores_and_is_not_changed_by_what_follows() -> None:
    layers, quantizers = parts()
    first = layers[0].weight_quantizer
    assert first is not None
    before = snapshot(layers, quantizers)
    codes = first.codes.clone()
    first.codes.zero_()
    quantizers[0].set_grid(torch.tensor([7.0]), torch.tensor([0.0]))
    before.restore(layers, quantizers)
    assert torch.equal(first.codes, codes) and float(quantizers[0].scale) == pytest.approx(0.1)


def test_finite() -> None:
    assert finite(1.5) == 1.5 and finite(float("nan")) is None and finite(float("-inf")) is None
