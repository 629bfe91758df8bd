"""Schemes: presets, the ends, patterns, and one clear line for what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from synthquant.core.errors import SchemeError
from synthquant.nn.scheme import LayerScheme, QuantScheme, matches

LAYERS = ("stem", "blocks.0.conv1", "blocks.0.down", "blocks.1.conv", "head")


def bits(scheme: LayerScheme) -> tuple[int | None, int | None]:
    return (
        scheme.weights.num_bits if scheme.weights else None,
        scheme.input_activations.num_bits if scheme.input_activations else None,
    )


@pytest.mark.parametrize(
    ("preset", "weight_bits", "activation_bits"),
    [("W8A8", 8, 8), ("w4a4", 4, 4), ("W2A4", 2, 4), ("W3A3", 3, 3), ("W4A16", 4, None), ("w4a16int", 4, 16)],
)
def test_presets(preset: str, weight_bits: int, activation_bits: int | None) -> None:
    scheme = QuantScheme.parse(preset)
    assert scheme.weights is not None
    assert (scheme.weights.num_bits, scheme.weights.strategy) == (weight_bits, "channel")
    assert not scheme.weights.symmetric
    if activation_bits is None:
        assert scheme.input_activations is None
    else:
        assert scheme.input_activations is not None
        assert (scheme.input_activations.num_bits, scheme.input_activations.strategy) == (activation_bits, "tensor")
    assert scheme.name.upper() == preset.upper() and QuantScheme.parse(scheme.name) == scheme


def test_parse_takes_schemes_and_mappings_on_top_of_a_preset() -> None:
    scheme = QuantScheme.parse({"preset": "W4A4", "weights": {"symmetric": True}, "ends": "same"})
    assert scheme.weights is not None and scheme.weights.num_bits == 4
    assert scheme.weights.symmetric and scheme.weights.strategy == "channel"
    assert QuantScheme.parse(scheme) is scheme
    assert QuantScheme.parse({"preset": "W4A4", "weights": None}).name == "W32A4"
    assert QuantScheme.parse({"weights": {"num_bits": 4}, "input_activations": {"num_bits": 16}}).name == "W4A16int"
    assert QuantScheme.parse(scheme.model_dump(mode="json")) == scheme


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("W1A4", "scheme W1A4: weights cannot have 1 bits; choose 2 to 8"),
        ("W33A4", "scheme W33A4: weights cannot have 33 bits; choose 2 to 8"),
        ("W4A1", "scheme W4A1: activations cannot have 1 bits; choose 2 to 8 (or 16)"),
        ("W4A33", "activations cannot have 33 bits"),
        ("W4A4int", "unknown scheme 'W4A4int'"),
        ("int4", "unknown scheme 'int4'; write it as W<bits>A<bits>"),
        ({"weights": {"num_bits": 1}}, "weights cannot have 1 bits"),
        ({"weights": {"num_bits": 16}}, "weights cannot have 16 bits"),
        ({"input_activations": {"num_bits": 33}}, "input_activations cannot have 33 bits"),
        ({}, "nothing to quantize"),
        ({"preset": "W4A4", "wieghts": {"num_bits": 4}}, "did you mean 'weights'?"),
        ({"weights": {"num_bits": 4, "symetric": True}}, "did you mean 'symmetric'?"),
        ({"preset": "W4A4", "ends": "w4a4"}, "ends = 'w4a4'"),
        ({"weights": {"num_bits": 4, "strategy": "group"}}, "group_size belongs to strategy 'group'"),
        ({"weights": {"num_bits": 4, "group_size": 8}}, "group_size belongs to strategy 'group'"),
        ({"preset": "W4A4", "input_activations": {"strategy": "channel"}}, "only 'tensor' is supported"),
        ({"weights": {"num_bits": 4, "observer": "gennie"}}, "did you mean 'genie'?"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(value: str | dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError) as caught:
        QuantScheme.parse(value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ends_at_8_bits() -> None:
    plan = QuantScheme.parse("W4A4").resolve(LAYERS, after_first=LAYERS[1:3])
    assert {name: bits(scheme) for name, scheme in plan.items()} == {
        "stem": (8, 8),
        "blocks.0.conv1": (4, 8),  # what the first layer puts out
        "blocks.0.down": (4, 8),
        "blocks.1.conv": (4, 4),
        "head": (8, 8),
    }


def test_what_reads_the_first_input_is_a_first_layer_whenever_it_runs() -> None:
    """A denoiser embeds the time first."""
    layers = ["time", "conv_in", "body", "conv_out"]
    plan = QuantScheme.parse("W4A4").resolve(layers, after_first=["body"], image_readers=["conv_in"])
    assert [bits(plan[name]) for name in layers] == [(8, 8), (8, 8), (4, 8), (8, 8)]
    same = QuantScheme.parse({"preset": "W4A4", "ends": "same"}).resolve(layers, image_readers=["conv_in"])
    assert [bits(same[name]) for name in layers] == [(4, 8), (4, 8), (4, 4), (4, 4)]


def test_same_bits_everywhere_but_for_the_image() -> None:
    plan = QuantScheme.parse({"preset": "W2A4", "ends": "same"}).resolve(LAYERS, after_first=LAYERS[1:3])
    assert bits(plan["stem"]) == (2, 8)
    assert {bits(plan[name]) for name in LAYERS[1:]} == {(2, 4)}


def test_ends_never_lower_bits_and_leave_float_tensors_alone() -> None:
    wide = QuantScheme.parse({"preset": "W8A8", "input_activations": {"num_bits": 16}}).resolve(LAYERS)
    assert {bits(scheme) for scheme in wide.values()} == {(8, 16)}
    weight_only = QuantScheme.parse("W4A16").resolve(LAYERS)
    assert bits(weight_only["stem"]) == bits(weight_only["head"]) == (8, None)


def test_a_network_of_one_layer() -> None:
    assert bits(QuantScheme.parse("W4A4").resolve(["fc"])["fc"]) == (8, 8)


@pytest.mark.parametrize("pattern", ["blocks.0.*", r"re:blocks\.0\."])
def test_ignore_by_glob_and_regular_expression(pattern: str) -> None:
    plan = QuantScheme.parse({"preset": "W4A4", "ignore": [pattern]}).resolve(LAYERS)
    assert list(plan) == ["stem", "blocks.1.conv", "head"]


def test_overrides_win_over_ends_and_the_last_match_wins() -> None:
    overrides = {
        "*": {"weights": {"num_bits": 5}},
        "blocks.*": {"weights": {"num_bits": 3}, "input_activations": None},
        "re:.*conv$": {"weights": {"symmetric": True}},
    }
    plan = QuantScheme.parse({"preset": "W4A4", "overrides": overrides}).resolve(LAYERS)
    assert bits(plan["stem"]) == (5, 8)
    assert bits(plan["head"]) == (5, 8)
    assert bits(plan["blocks.0.conv1"]) == (3, None)
    last = plan["blocks.1.conv"].weights
    assert last is not None and last.symmetric and last.num_bits == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ignore": ["blocks.7.*"]}, "pattern 'blocks.7.*' matches no layer; layers are stem, "),
        ({"overrides": {"re:nothing": {"weights": None}}}, "pattern 're:nothing' matches no layer"),
        ({"ignore": ["re:("]}, "'re:(' is not a regular expression"),
        ({"overrides": {"head": {"weights": {"num_bits": 33}}}}, "weights cannot have 33 bits"),
        ({"overrides": {"head": {"weights": {"bits": 3}}}}, "did you mean 'num_bits'?"),
        ({"overrides": {"head": {"weigths": None}}}, "did you mean 'weights'?"),
        ({"overrides": {"head": {"input_activations": {"strategy": "channel"}}}}, "only 'tensor' is supported"),
        ({"overrides": {"head": {"weights": {"group_size": 3}}}}, "group_size belongs to strategy 'group'"),
    ],
)
def test_patterns_and_overrides_that_cannot_apply(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError) as caught:
        QuantScheme.parse({"preset": "W4A4", **fields}).resolve(LAYERS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_matches() -> None:
    assert matches("*.conv1", "blocks.0.conv1") and not matches("conv1", "blocks.0.conv1")
    assert matches("re:blocks", "blocks.0.conv1") and not matches("re:conv1", "blocks.0.conv1")


def test_describe_is_one_line_and_tells_the_ends_rule() -> None:
    assert "first and last layer W8A8" in QuantScheme.parse("W4A4").describe()
    other = QuantScheme.parse({"preset": "W4A4", "ends": "same", "ignore": ["a"], "overrides": {"b": {}}}).describe()
    assert "same bits in every layer" in other and "1 ignore patterns; 1 overrides" in other
    assert "\n" not in other
