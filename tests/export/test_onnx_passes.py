"""Passes over hand-written graphs: biases as integers, moves on codes, means as pooling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthquant.export.deploy import LAYER_KEY
from synthquant.export.presets import PRESETS

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")


def graph(body: str, inputs: str = "float[B, 4, 6, 6] images", outputs: str = "logits", **constants: Any) -> Any:
    """A model from ONNX text, its constants as initialisers and the DequantizeLinear of each weight marked."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        net ({inputs}) => (float[B, ?] {outputs}) {{ {body} }}"""
    model = ir.from_onnx_text(text, initializers=[ir.tensor(value, name=name) for name, value in constants.items()])
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and str(node.inputs[0].name).startswith("w"):
            node.metadata_props[LAYER_KEY] = "conv"
    return model


QUANTIZED = "q = QuantizeLinear(images, xs, xz) x = DequantizeLinear(q, xs, xz)"


def constants(rng: np.random.Generator, **more: Any) -> dict[str, Any]:
    return {
        "xs": np.float32(0.05),
        "xz": np.uint8(120),
        "w": rng.integers(-127, 128, (5, 4, 3, 3)).astype(np.int8),
        "ws": (rng.random(5) * 0.01 + 0.001).astype(np.float32),
        "b": rng.standard_normal(5).astype(np.float32),
    } | more


def run(model: Any, tmp_path: Path, x: np.ndarray, *, optimized: bool = False) -> np.ndarray:
    from synthquant.export.onnx.runtime import ort_network, session

    ir.save(model, tmp_path / "net.onnx")
    return ort_network(session(tmp_path / "net.onnx", optimized=optimized))(torch.from_numpy(x)).numpy()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


CONV = f"{QUANTIZED} wd = DequantizeLinear<axis = 0>(w, ws) y = Conv(x, wd, b) logits = Flatten(y)"


@pytest.mark.parametrize("preset", ["ort-cpu", "simulate", "tensorrt"])
def test_a_bias_becomes_integers_where_the_preset_wants_it(
    rng: np.random.Generator, tmp_path: Path, preset: str
) -> None:
    from synthquant.export.onnx.bias import quantize_biases

    values = constants(rng)
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    before = run(graph(CONV, **values), tmp_path, x)
    model = graph(CONV, **values)
    assert quantize_biases(model, PRESETS[preset]) == ()
    after = run(model, tmp_path, x)
    found = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    if preset == "tensorrt":
        assert "conv.bias_codes" not in found and np.array_equal(after, before)
    elif preset == "simulate":
        assert np.array_equal(found["conv.bias_codes"] * found["conv.bias_scale"], values["b"])
        assert np.array_equal(after, before)
    else:
        assert np.array_equal(found["conv.bias_scale"], values["xs"] * values["ws"])
        assert found["conv.bias_codes"].dtype == np.int32
        assert np.abs(after - before).max() <= (values["xs"] * values["ws"]).max() * 0.51


def test_a_bias_that_does_not_fit_makes_only_its_channel_coarser(rng: np.random.Generator, tmp_path: Path) -> None:
    from synthquant.export.onnx.bias import quantize_biases

    scales = np.array([0.01, 1e-9, 0.01, 0.01, 1e-12], np.float32)
    values = constants(rng, ws=scales, b=np.array([1, 3, -1, 2, 0.5], np.float32))
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    before = run(graph(CONV, **values), tmp_path, x)
    model = graph(CONV, **values)
    assert quantize_biases(model, PRESETS["ort-cpu"]) == ("conv",)
    found = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    changed = found["conv.coarse_scale"] != scales
    assert changed.tolist() == [False, True, False, False, True]
    assert np.array_equal(found["conv.coarse_codes"][0], values["w"][0])
    assert np.allclose(run(model, tmp_path, x), before, atol=0.51 * 0.05 * 0.01)


def test_a_layer_that_reads_floats_keeps_its_bias(rng: np.random.Generator) -> None:
    from synthquant.export.onnx.bias import quantize_biases

    body = "wd = DequantizeLinear<axis = 0>(w, ws) y = Conv(images, wd, b) logits = Flatten(y)"
    model = graph(body, **{name: value for name, value in constants(rng).items() if name in ("w", "ws", "b")})
    assert quantize_biases(model, PRESETS["ort-cpu"]) == ()
    assert "conv.bias_codes" not in model.graph.initializers


@pytest.mark.parametrize(
    ("step", "is_move"),
    [
        ("m = MaxPool<kernel_shape = [2, 2]>(x)", True),
        ("e = Identity(x) m = Transpose<perm = [0, 1, 3, 2]>(e)", True),
        ("m = Mul(x, x)", False),
    ],
)
def test_a_bias_behind_what_only_moves_values_has_the_grid_of_what_was_moved(
    rng: np.random.Generator, step: str, is_move: bool
) -> None:
    from synthquant.export.onnx.bias import quantize_biases

    body = f"{QUANTIZED} {step} wd = DequantizeLinear<axis = 0>(w, ws) y = Conv(m, wd, b) logits = Flatten(y)"
    values = constants(rng)
    model = graph(body, **values)
    quantize_biases(model, PRESETS["ort-cpu"])
    scale = model.graph.initializers.get("conv.bias_scale")
    assert (scale is not None) == is_move
    assert scale is None or np.array_equal(scale.const_value.numpy(), values["xs"] * values["ws"])


def test_moves_are_named_by_operators_that_exist() -> None:
    from onnx import defs

    from synthquant.export.onnx.moves import BYTE_MOVES
    from synthquant.nn.moves import MOVES

    assert all(defs.has(operator) for operator in MOVES) and MOVES.keys() >= BYTE_MOVES
    functions = [name for names in MOVES.values() for name in names]
    assert len(functions) == len(set(functions))


def test_a_bias_of_two_layers_is_written_twice(rng: np.random.Generator) -> None:
    from synthquant.export.onnx.bias import quantize_biases

    body = f"{QUANTIZED} wd = DequantizeLinear<axis = 0>(w, ws) y = Conv(x, wd, b) z = Conv(x, wd, b)"
    model = graph(f"{body} s = Add(y, z) logits = Flatten(s)", **constants(rng))
    quantize_biases(model, PRESETS["ort-cpu"])
    assert {"conv.bias_codes", "conv.bias_codes_2"} <= set(model.graph.initializers)


def test_moves_are_done_on_codes_and_nothing_changes(rng: np.random.Generator, tmp_path: Path) -> None:
    from synthquant.export.onnx.moves import move_codes

    body = f"""{QUANTIZED} t = Transpose<perm = [0, 2, 3, 1]>(x) p = Pad(t, pads)
        g = Gather<axis = 1>(p, index) s, r = Split<axis = 2, num_outputs = 2>(g)
        c = Concat<axis = 1>(s, r) f = Flatten(c) logits = Relu(f)"""
    values = {
        "xs": np.float32(0.05),
        "xz": np.uint8(120),
        "pads": np.array([0, 1, 0, 0, 0, 1, 0, 0], np.int64),
        "index": np.int64(0),
    }
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    body = body.replace("axis = 2, num", "axis = 1, num")  # after Gather: [B, 6, 4]
    before = run(graph(body, **values), tmp_path, x)
    model = graph(body, **values)
    assert move_codes(model) == 6
    relu = next(node for node in model.graph if node.op_type == "Relu")
    assert relu.inputs[0].producer().op_type == "DequantizeLinear"
    assert np.array_equal(run(model, tmp_path, x), before)


def test_padding_with_something_else_and_other_grids_stay(rng: np.random.Generator) -> None:
    from synthquant.export.onnx.moves import move_codes

    values = {"xs": np.float32(0.05), "xz": np.uint8(120)}
    pads, one = np.array([0, 0, 1, 0, 0, 0, 1, 0], np.int64), np.float32(1)
    padded = graph(f"{QUANTIZED} p = Pad(x, pads, one) logits = Flatten(p)", **values, pads=pads, one=one)
    assert move_codes(padded) == 0
    two = f"{QUANTIZED} q2 = QuantizeLinear(images, ys, xz) y = DequantizeLinear(q2, ys, xz) c = Concat<axis = 1>(x, y)"
    assert move_codes(graph(f"{two} logits = Relu(c)", **values, ys=np.float32(0.07))) == 0


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_spatial_mean_is_pooling(rng: np.random.Generator, tmp_path: Path, keepdims: int) -> None:
    from synthquant.export.onnx.graph import pool_by_name

    end = "logits = Flatten(m)" if keepdims else "logits = Relu(m)"
    body = f"r = Relu(images) m = ReduceMean<keepdims = {keepdims}>(r, axes) {end}"
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    axes = np.array([-1, -2], np.int64)
    before = run(graph(body, axes=axes), tmp_path, x)
    model = graph(body, axes=axes)
    relu = next(node for node in model.graph if node.op_type == "Relu")
    relu.outputs[0].shape = ir.Shape(["B", 4, 6, 6])
    pool_by_name(model)
    assert {node.op_type for node in model.graph} >= {"GlobalAveragePool"}
    assert "ReduceMean" not in {node.op_type for node in model.graph}
    assert np.allclose(run(model, tmp_path, x), before, atol=1e-6)


def test_a_mean_over_channels_is_none() -> None:
    from synthquant.export.onnx.graph import pool_by_name

    model = graph("m = ReduceMean<keepdims = 0>(images, axes) logits = Flatten(m)", axes=np.array([1], np.int64))
    pool_by_name(model)
    assert "ReduceMean" in {node.op_type for node in model.graph}


def test_packed_weights_that_share_zero_points_leave_those_of_other_weights_as_they_are() -> None:
    from synthquant.export.deploy import PACKED_KEY
    from synthquant.export.onnx.graph import pack_weights

    names = ("a", "b", "c")
    body = " ".join(f"{name}d = DequantizeLinear<axis = 0>({name}, s, z)" for name in names)
    codes = {name: np.arange(-8, 8, dtype=np.int8).reshape(2, 8) for name in names}
    model = graph(f"{body} logits = Sum(ad, bd, cd)", s=np.ones(2, np.float32), z=np.zeros(2, np.int8), **codes)
    for node, _ in zip(model.graph, range(2), strict=False):
        node.metadata_props[PACKED_KEY] = "4"
    assert pack_weights(model) == 2
    types = [tuple(node.inputs[at].const_value.dtype.name for at in (0, 2)) for node in list(model.graph)[:3]]
    assert types == [("INT4", "INT4"), ("INT4", "INT4"), ("INT8", "INT8")]
    assert [int(value) for value in model.graph.initializers["a"].const_value.numpy().reshape(-1)] == list(range(-8, 8))
