"""What to do about a result: when something is said, and that it says the right thing."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from synthquant.core.advice import (
    MOST_UNDECIDED,
    about_layers,
    about_rounding,
    about_selection,
    about_training,
    as_option,
    layers_setting,
)
from synthquant.core.quant_report import UnitReport
from synthquant.core.run_metrics import CoverageRow, FineTunePoint, SqnrRow


def units(*undecided: float | None) -> list[UnitReport]:
    return [UnitReport(name=f"unit{index}", undecided=share) for index, share in enumerate(undecided)]


def test_undecided_roundings_are_told_above_a_twentieth() -> None:
    assert about_rounding(units(0.0, None, MOST_UNDECIDED), 20) is None and about_rounding([], None) is None
    advice = about_rounding(units(0.02, 0.0501, 0.25), 80)
    assert str(advice) == (
        "2 of 3 units have more than 5% of their roundings undecided (at most 25.00%, in unit2):"
        " more iterations decide them, for example --set quantize.iterations=320"
    )
    few, unknown = about_rounding(units(0.5), 20), about_rounding(units(0.5), None)
    assert few is not None and few.setting == "quantize.iterations=300"
    assert unknown is not None and unknown.setting == "" and str(unknown).endswith("more iterations decide them")


@pytest.mark.parametrize(
    ("kept", "factor", "told"),
    [(1.0, 1.0, ""), (1.01, 1.0, "a little"), (1.4, 1.5, ""), (1.6, 1.5, "keep more")],
)
def test_a_choice_that_moved_away_from_the_batch_norms_is_told(kept: float, factor: float, told: str) -> None:
    advice = about_selection({"pool": 1.0, "kept": kept}, factor)
    assert (advice is None) is not told and told in str(advice or "")
    assert advice is None or f"({kept:#.3g} against 1.00)" in advice.found
    assert about_selection(None) is None


@pytest.mark.parametrize(("training", "count", "told"), [(0.9, 100, False), (0.97, 100, False), (0.97, 300, True)])
def test_images_learned_by_heart_are_told_where_it_is_not_chance(training: float, count: int, told: bool) -> None:
    points = [
        FineTunePoint(step=0, held_out=0.5, training=0.9, kl=1.0),
        FineTunePoint(step=9, held_out=0.92, training=training, kl=0.1),
    ]
    advice = about_training(points, 9, count)
    assert (advice is not None) is told
    assert advice is None or "97.00% agreement on images that it trains on and 92.00%" in advice.found
    assert about_training(points, 9, None) is None and about_training([], None, count) is None


def layer(name: str, weights: tuple[float | None, int | None], inputs: tuple[float | None, int | None]) -> Any:
    row = SqnrRow(name=name, weights=weights[0], activations=inputs[0], alone=min(weights[0] or 99, inputs[0] or 99))
    return row, CoverageRow(name=name, weight_bits=weights[1], input_bits=inputs[1], parameters=4096, macs=10**6)


def advised(recipe: dict[str, Any], *layers: Any) -> Any:
    return about_layers([row for row, _ in layers], [row for _, row in layers], recipe)


def test_the_weaker_part_of_the_worst_layers_gets_more_bits_or_none() -> None:
    recipe: dict[str, Any] = {"quantize": {"scheme": {}}}
    found = advised(
        recipe,
        layer("wide", (30.0, 4), (40.0, 4)),
        layer("fine", (50.0, 4), (60.0, 4)),
        layer("weights", (5.0, 2), (20.0, 4)),
        layer("inputs", (21.0, 4), (18.0, 4)),
        layer("ends", (25.0, 8), (26.0, 8)),
    )
    assert [(one.layer.name, one.change, one.weakest, one.cost) for one in found] == [
        ("weights", "give its weights 4 bits", "weights, 2 bits: 5.0 dB", "1.00 KiB"),
        ("inputs", "give its inputs 8 bits", "inputs, 4 bits: 18.0 dB", "16.0 M bit operations"),
        ("ends", "leave the layer in floating point", "weights, 8 bits: 25.0 dB", "12.0 KiB"),
    ]
    assert layers_setting(found, recipe).partition("=")[0] == "quantize.scheme.overrides"
    assert json.loads(layers_setting(found, recipe).partition("=")[2]) == {
        "weights": {"weights": {"num_bits": 4}},
        "inputs": {"input_activations": {"num_bits": 8}},
        "ends": {"weights": None, "input_activations": None},
    }


def test_what_the_recipe_says_of_layers_stays() -> None:
    former = {"a[0]": {}, "a[[]0]": {"weights": {"num_bits": 3, "symmetric": True}}, "*": {"weights": {"num_bits": 2}}}
    recipe = {"quantize": {"scheme": {"overrides": former}}}
    setting = layers_setting(advised(recipe, layer("a[0]", (5.0, 2), (None, None))), recipe)
    changed = json.loads(setting.partition("=")[2])
    assert list(changed) == ["a[0]", "*", "a[[]0]"]  # the last one that fits a layer wins
    assert changed["a[[]0]"] == {"weights": {"num_bits": 4, "symmetric": True}} and changed["*"] == former["*"]
    assert shlex.split(as_option(setting)) == ["--set", setting]


def test_nothing_is_said_of_what_cannot_be_changed() -> None:
    worst = layer("a", (5.0, 2), (6.0, 2))
    assert advised({}, worst) == [] and advised({"quantize": {"run": "elsewhere", "scheme": {}}}, worst) == []
    assert advised({"quantize": {}}, layer("a", (None, None), (None, None))) == []
