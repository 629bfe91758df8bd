"""A target's scheme is one that its exporter takes, whatever ranges turn out to be."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.small_networks import small_float_model
from torch import nn

from synthquant import targets
from synthquant.core.errors import RecipeError, SchemeError, UnknownNameError, UnsupportedModelError
from synthquant.core.progress import Progress
from synthquant.export.grids import activation_grid, weight_grid
from synthquant.export.onnx import Onnx
from synthquant.export.presets import PRESETS
from synthquant.make import build, require_quantizable
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.nn.activation_quantizers import new_quantizer
from synthquant.nn.layers import weight_layout
from synthquant.nn.observers import OBSERVERS
from synthquant.nn.scheme import QuantScheme
from synthquant.nn.weight_quantizers import WeightQuantizer
from synthquant.recipe import QuantizeSection
from synthquant.targets import default_scheme, network_scheme, require_exportable, scheme_for, target_names

RANGES = ((0.0, 3.0), (-2.0, 2.0), (-3.0, 0.0), (-0.01, 9.0), (-9.0, 0.01), (2.0, 2.0001), (0.0, 0.0))
INTEGER = [name for name, preset in PRESETS.items() if preset.runs_integers and preset.packed_bits is None]


@pytest.mark.parametrize(("target", "bits"), [*itertools.product(INTEGER, (8, 7, 4, 2))])
def test_grids_of_a_targets_scheme_fit_whatever_the_range(target: str, bits: int) -> None:
    scheme, preset = scheme_for(target, f"W{bits}A{bits}"), PRESETS[target]
    assert scheme.deploy == "full" and scheme.input_activations is not None and scheme.weights is not None
    for low, high in RANGES:
        quantizer = new_quantizer(scheme.input_activations)
        quantizer.cover(low, high)
        assert activation_grid(quantizer, "one", preset) is not None
        layer = nn.Linear(8, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(low, high, 16).reshape(2, 8))
        for observer in OBSERVERS.names():
            weights = WeightQuantizer(weight_layout(layer), scheme.weights)
            weights.calibrate(layer.weight.detach(), observer)
            assert weight_grid(weights, "one", preset).codes.dtype == torch.int8


def test_a_signed_grid_has_zero_in_its_middle_where_nothing_is_negative() -> None:
    scheme = scheme_for("tensorrt", "W8A8")
    assert scheme.input_activations is not None
    quantizer = new_quantizer(scheme.input_activations)
    quantizer.cover(0.0, 3.0)
    grid = quantizer.affine_grid()
    assert (grid.zero_point, float(grid.scale)) == (128, pytest.approx(6 / 255))
    assert "signed" in scheme.model_dump()["input_activations"]
    assert "signed" not in QuantScheme.parse("W8A8").model_dump()["input_activations"]


def test_what_is_said_wins_and_what_is_open_is_the_targets() -> None:
    assert scheme_for("ort-cpu").name in ("W8A8", "W7A8")
    assert scheme_for("ort-cpu", QuantScheme.parse("W8A8")) == scheme_for("ort-cpu", "W8A8")
    papers = scheme_for("ort-cpu", {"preset": "W8A8", "deploy": "papers", "weights": {"strategy": "tensor"}})
    assert papers.deploy == "papers" and papers.weights is not None
    assert (papers.weights.strategy, papers.weights.symmetric) == ("tensor", True)
    for target in target_names():  # a resolved recipe is read again
        once = scheme_for(target, "W8A8")
        assert scheme_for(target, once.model_dump(mode="json")) == once
    assert scheme_for("torch", "W4A4") == scheme_for("simulate", "W4A4") == QuantScheme.parse("W4A4")


def test_without_vnni_sums_cannot_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "has_vnni", lambda: False)
    assert default_scheme("ort-cpu") == {"preset": "W7A8", "ends": "same"}
    assert default_scheme("simulate") == default_scheme(None) == {"preset": "W4A4"}
    monkeypatch.setattr(targets, "has_vnni", lambda: True)
    assert default_scheme("tensorrt") == {"preset": "W8A8"}


def section(**values: Any) -> QuantizeSection:
    return QuantizeSection.parse({"method": "rtn", **values}, "here")


def test_a_section_names_its_target() -> None:
    assert section(target="ort-cpu", scheme="W8A8").scheme == scheme_for("ort-cpu", "W8A8")
    assert section(target="ort-cpu", scheme={"ends": "same"}).scheme.ends == "same"
    assert section(target="openvino").scheme == scheme_for("openvino")
    assert "target" not in section(scheme="W4A4", export_preset=None).model_dump()
    with pytest.raises(UnknownNameError, match="ort-cpu"):
        section(target="ort-gpu")
    with pytest.raises(SchemeError, match="W4A16 leaves activations in floating point"):
        section(target="ort-cpu", scheme="W4A16")
    with pytest.raises(RecipeError, match=r"unknown setting 'quantize\.export_preset'"):
        section(scheme="W8A8", export_preset="ort-cpu")


@pytest.mark.parametrize(
    ("target", "change", "reason"),
    [
        ("ort-cpu", {"weights": {"symmetric": False}}, "may not express the weights of stem: "),
        (
            "ort-cpu",
            {"overrides": {"fc": {"weights": {"strategy": "group", "group_size": 2}}}},
            "weights of fc: .*groups",
        ),
        ("tensorrt", {"input_activations": {"signed": False}}, "int8 with zero point 0"),
        ("ort-cpu-w4", {"weights": {"num_bits": 8}}, "packs weights of 4 bits"),
    ],
)
def test_what_may_not_fit_is_refused_before_anything_is_made(
    target: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    wanted = section(target=target, scheme={"preset": "W8A8", **change})
    with pytest.raises(SchemeError, match=reason):
        require_quantizable(small_float_model(tmp_path), wanted)


LINEAR = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, plain):
        super().__init__()
        self.plain = plain
        self.stem, self.wide, self.odd, self.head = (
            nn.Linear(12, 64), nn.Linear(64, 40), nn.Linear(40, 8), nn.Linear(8, 3)
        )

    def forward(self, x):
        x = x.reshape(int(x.shape[0] / 1) if self.plain else x.shape[0], -1)
        return self.head(self.odd(self.wide(self.stem(x).relu()).relu()))


def build():
    return Network(False)


def with_plain_size():
    return Network(True)
"""


def linear_model(folder: Path, function: str = "build") -> FloatModel:
    (folder / "linear.py").write_text(LINEAR)
    return open_model(f"{folder / 'linear.py'}:{function}", input_size=2, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_linear_layers_are_packed_by_name_in_groups_where_these_fit(tmp_path: Path) -> None:
    model, wanted = linear_model(tmp_path), section(target="ort-cpu-w4")
    found = network_scheme("ort-cpu-w4", model, wanted.scheme)
    assert found.overrides == {
        "wide": {
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            "input_activations": None,
        },
        "odd": {"weights": {"num_bits": 4}, "input_activations": None},
    }
    quant_model = build(model, wanted)
    assert [quant_model.input_bits(name) for name in ("stem", "wide", "odd", "head")] == [8, None, None, 8]
    low = section(target="ort-cpu-w4", scheme={"preset": "W4A8", "overrides": {"odd": {"weights": {"num_bits": 8}}}})
    assert build(model, low).scheme.overrides == {"wide": {"input_activations": None}} | low.scheme.overrides


def test_an_export_is_rehearsed_before_anything_is_made(tmp_path: Path) -> None:
    told: list[str] = []
    progress = cast(Progress, SimpleNamespace(say=told.append, warn=told.append))
    require_quantizable(linear_model(tmp_path), section(target="torch"), progress)
    assert told == ["rehearse the export to torch"]
    with pytest.raises(UnsupportedModelError, match="computes the batch size as a plain number"):
        require_quantizable(linear_model(tmp_path, "with_plain_size"), section(target="torch"))


def test_on_a_cpu_without_vnni_eight_bits_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    progress = cast(Progress, SimpleNamespace(say=lambda _: None, warn=told.append))
    monkeypatch.setattr(Onnx, "rehearse", lambda *_: None)
    for vnni, count in ((True, 0), (False, 1)):
        monkeypatch.setattr(targets, "has_vnni", lambda vnni=vnni: vnni)
        model = small_float_model(tmp_path)
        require_exportable(build(model, section(target="ort-cpu", scheme="W8A8")), "ort-cpu", progress)
        assert len(told) == count
