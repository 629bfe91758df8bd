"""ONNX files: integers inside, the same logits outside, every preset, every refusal."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.damage import same_or_refused
from tests.small_networks import calibrated_model, small_float_model, small_images

from synthquant.core.errors import (
    MissingExtraError,
    ModelError,
    RecipeError,
    UnknownNameError,
    UnsupportedModelError,
    VerificationError,
)
from synthquant.core.files import sha256_file
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.onnx import Onnx, verify
from synthquant.export.onnx.metadata import seal
from synthquant.export.onnx.runtime import ort_network, read_metadata, session
from synthquant.export.quant_config import WEIGHTS_NAME
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SYMMETRIC = {"weights": {"symmetric": True}}
# on the CPU a float sum in another order may move a value to the next step of a grid
LOOSE = 0.1


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def error(path: Path, model: QuantModel, *, optimized: bool) -> float:
    x = model.float_model.example_images(6)
    with torch.no_grad():
        expected = model(x)
    return float((ort_network(session(path, optimized=optimized))(x) - expected).abs().mean() / expected.std())


def test_a_file_holds_integers_only(full_file: Path) -> None:
    floats = {name: value for name, value in initializers(full_file).items() if value.dtype.kind == "f"}
    # batch norm `after` follows a ReLU and cannot be folded; no runtime has integer transposed convolutions in groups
    left = [name for name, value in floats.items() if not name.endswith("scale") and value.size > 1]
    assert all(name.startswith(("after.", "up.bias")) for name in left), left
    codes = {name: value.dtype.name for name, value in initializers(full_file).items() if "codes" in name}
    assert codes["fc.weight_codes"] == "int8" and codes["fc.bias_codes"] == "int32"
    assert sum(name.endswith("weight_codes") for name in codes) == 8


def test_a_file_is_opset_21_with_any_batch_and_says_what_it_is(full_file: Path, full_model: QuantModel) -> None:
    file = onnx.load(str(full_file))
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 21)]
    assert file.graph.input[0].name == "images" and file.graph.output[0].name == "logits"
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert file.producer_name == "synthquant" and file.producer_version
    metadata = read_metadata(full_file)
    assert metadata.preset == "ort-cpu" and metadata.scheme == full_model.scheme
    assert metadata.preprocess == full_model.float_model.preprocess
    assert metadata.origin == {"recipe_sha256": "abc"}
    assert metadata.float_model.fingerprint == full_model.float_model.fingerprint
    network = Onnx.open(full_file).run
    for batch in (1, 3):
        assert network(full_model.float_model.example_images(batch)).shape == (batch, 7)


def test_no_path_of_this_machine_is_in_a_file(full_file: Path) -> None:
    data = full_file.read_bytes()
    assert b"site-packages" not in data and str(Path(torch.__file__).parent).encode() not in data
    assert b"stack_trace" not in data


def test_every_layer_runs_on_integers_and_verification_says_so(full_file: Path, full_model: QuantModel) -> None:
    found = Onnx().verify(full_model, full_file, small_images())
    # ONNX Runtime has no integer kernel for transposed convolutions
    assert found["layers"]["integer"] == 7 and found["layers"]["float_layers"] == ("up/ConvTranspose",)
    assert found["images"] == 12
    assert found["as_written"]["max_steps"] < 1e-3 and found["optimized"]["mean_error"] < LOOSE


def test_integer_kernels_are_within_a_step_where_no_sum_overflows(tmp_path: Path) -> None:
    """Weights of 7 bits in all layers: two of their products fit into 16 bits on any CPU."""
    scheme = {"preset": "W7A8", "ends": "same", "weights": {"symmetric": True}, "deploy": "full"}
    model = calibrated_model(small_float_model(tmp_path), scheme)
    found = Onnx().verify(model, Onnx().export(model, tmp_path / "x.onnx"), small_images())
    assert found["optimized"]["max_steps"] <= 1


@pytest.mark.parametrize("vnni", [True, False])
def test_a_refusal_names_sums_that_overflow_on_cpus_without_vnni(
    full_file: Path, full_model: QuantModel, monkeypatch: pytest.MonkeyPatch, vnni: bool
) -> None:
    monkeypatch.setattr(verify, "has_vnni", lambda: vnni)
    images = small_images()
    plain = verify.run_beside

    def spoilt(*arguments: Any) -> Any:
        beside = plain(*arguments)
        beside.outputs["optimized"]["logits"] = beside.outputs["optimized"]["logits"].roll(1, 1)
        return beside

    monkeypatch.setattr(verify, "run_beside", spoilt)
    with pytest.raises(VerificationError) as refusal:
        Onnx().verify(full_model, full_file, images)
    assert ("has no VNNI" in str(refusal.value)) is not vnni


def test_nodes_are_named_after_modules(full_file: Path) -> None:
    names = {node.name for node in onnx.load(str(full_file)).graph.node}
    assert {"stem/Conv", "blocks.1.conv2/Conv", "up/ConvTranspose", "fc/MatMul"} <= names


def test_a_shared_quantizer_is_one_pair_of_nodes(tmp_path: Path) -> None:
    model = calibrated_model(small_float_model(tmp_path), {"preset": "W8A8", **SYMMETRIC})
    nodes = onnx.load(str(Onnx().export(model, tmp_path / "papers.onnx"))).graph.node
    assert Counter(node.op_type for node in nodes)["QuantizeLinear"] == len(model.quantizers)


@pytest.mark.parametrize(
    "scheme",
    [
        {"preset": "W3A5", "ends": "same", "deploy": "full"},
        {
            "preset": "W4A4",
            "ignore": ["blocks.0.conv2"],
            "overrides": {
                "blocks.0.conv1": {"weights": {"num_bits": 2}, "input_activations": None},
                "blocks.1.conv?": {"weights": {"strategy": "tensor"}, "input_activations": {"num_bits": 16}},
                "fc": {"weights": {"strategy": "group", "group_size": 6}},
            },
        },
    ],
    ids=["full", "mixed"],
)
def test_simulate_is_exact_at_both_levels_for_any_scheme(tmp_path: Path, scheme: dict[str, Any]) -> None:
    model = calibrated_model(small_float_model(tmp_path), scheme)
    path = Onnx(preset="simulate").export(model, tmp_path / "simulate.onnx")
    for optimized in (False, True):
        assert error(path, model, optimized=optimized) < 1e-3


def test_openvino_and_onnxruntime_agree(full_file: Path, full_model: QuantModel) -> None:
    pytest.importorskip("openvino")
    x = full_model.float_model.example_images(6)
    with torch.no_grad():
        expected = full_model(x)
    for runtime in ("openvino", "onnxruntime"):
        network = Onnx.open(full_file, runtime, threads=1).run
        assert float((network(x) - expected).abs().mean() / expected.std()) < LOOSE


@pytest.mark.parametrize("deploy", ["papers", "full"])
def test_tensorrt_has_int8_with_zero_point_0_and_float_biases(tmp_path: Path, deploy: str) -> None:
    activations = {"symmetric": True, "num_bits": 7}
    scheme = {"preset": "W8A8", **SYMMETRIC, "input_activations": activations, "ends": "same", "deploy": deploy}
    model = calibrated_model(small_float_model(tmp_path), scheme)
    path = Onnx(preset="tensorrt").export(model, tmp_path / "tensorrt.onnx")
    found = initializers(path)
    assert not any(value.any() for name, value in found.items() if name.endswith("zero_point"))
    assert not any("bias_codes" in name for name in found)
    assert error(path, model, optimized=False) < LOOSE and error(path, model, optimized=True) < LOOSE


def test_w4_packs_linear_weights_to_half_a_byte(tmp_path: Path) -> None:
    overrides = {"fc": {"weights": {"num_bits": 4}, "input_activations": None}}
    model = calibrated_model(small_float_model(tmp_path), {"preset": "W8A8", **SYMMETRIC, "overrides": overrides})
    path = Onnx(preset="ort-cpu-w4").export(model, tmp_path / "w4.onnx")
    (fc,) = (tensor for tensor in onnx.load(str(path)).graph.initializer if tensor.name == "fc.weight_codes")
    assert fc.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    assert len(fc.raw_data) == 6 * 7 // 2
    assert error(path, model, optimized=True) < LOOSE
    layers = Onnx(preset="ort-cpu-w4").verify(model, path, small_images())["layers"]
    assert layers["operators"].get("MatMulNBits") == 1


def test_a_checkpoint_that_was_loaded_gives_the_same_bytes(
    full_model: QuantModel, full_file: Path, tmp_path: Path
) -> None:
    folder = save_checkpoint(full_model, tmp_path / "model")
    path = Onnx().export(
        load_checkpoint(folder, trust_code=True), tmp_path / "loaded.onnx", origin={"recipe_sha256": "abc"}
    )
    assert path.read_bytes() == full_file.read_bytes()
    assert read_metadata(path).checkpoint_sha256 == sha256_file(folder / WEIGHTS_NAME)


def test_another_network_fails_verification(full_file: Path, tmp_path: Path) -> None:
    other = calibrated_model(small_float_model(tmp_path, "build_other"))
    with pytest.raises(VerificationError, match=r"ONNX Runtime without optimisation gives .* another top class"):
        Onnx().verify(other, full_file, small_images())


def test_a_broken_graph_fails_verification(full_file: Path, full_model: QuantModel, tmp_path: Path) -> None:
    file = onnx.load(str(full_file))
    file.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(file, str(tmp_path / "broken.onnx"))
    with pytest.raises(VerificationError, match="the file is not valid ONNX"):
        Onnx().verify(full_model, tmp_path / "broken.onnx", small_images())


def unsealed(path: Path, version: str) -> Any:
    """A file without its hash."""
    file = onnx.load(str(path))
    entries = {entry.key: entry.value for entry in file.metadata_props}
    del entries["synthquant.sha256"]
    onnx.helper.set_model_props(file, {**entries, "synthquant.format_version": version})
    return file


def test_a_file_that_a_runtime_cannot_load_is_named(full_file: Path, tmp_path: Path) -> None:
    file = unsealed(full_file, "2")
    file.graph.node[0].op_type = "NoSuchOperator"
    (tmp_path / "broken.onnx").write_bytes(seal(file.SerializeToString()))
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load .*broken\.onnx"):
        Onnx.open(tmp_path / "broken.onnx")
    pytest.importorskip("openvino")
    with pytest.raises(ModelError, match=r"OpenVINO cannot load .*broken\.onnx"):
        Onnx.open(tmp_path / "broken.onnx", "openvino")


def test_no_damage_to_a_file_changes_the_network(full_file: Path, full_model: QuantModel, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(full_file.read_bytes())
    inputs = full_model.float_model.example_images(2)

    def logits() -> list[float]:
        network = Onnx.open(path).run
        return network(inputs).flatten().tolist()

    assert same_or_refused(path, logits, flips=120) == 120 + 6
    end = len(path.read_bytes()) - 87
    for place in range(end, end + 87):
        data = full_file.read_bytes()
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ModelError, match=r"net\.onnx"):
            read_metadata(path)


def test_a_file_that_was_written_again_by_others_is_refused(full_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    file = onnx.load(str(full_file))
    file.doc_string = "mine"
    onnx.save(file, str(path))
    with pytest.raises(ModelError, match=r"net\.onnx was changed or damaged .* hash does not fit\); export it again"):
        read_metadata(path)
    onnx.save(unsealed(full_file, "2"), str(path))
    with pytest.raises(ModelError, match=r"net\.onnx lacks the hash that synthquant export writes"):
        read_metadata(path)
    onnx.save(unsealed(full_file, "3"), str(path))
    with pytest.raises(ModelError, match="metadata of version 3, this release reads 1 to 2"):
        read_metadata(path)
    onnx.save(unsealed(full_file, "1"), str(path))
    assert read_metadata(path).preset == "ort-cpu", "the first version had no hash"


SPECTRAL = """
import torch
from torch import nn


class Spectral(nn.Module):
    def forward(self, x):
        return CALL


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.odd = Spectral()
        self.fc = nn.Linear(4 * 14, 7)

    def forward(self, x):
        return self.fc(self.odd(self.stem(x)).flatten(1))


def build():
    torch.manual_seed(0)
    return Network()
"""


@pytest.mark.parametrize(
    ("call", "name"), [("torch.linalg.svdvals(x)", "svd"), ("torch.special.bessel_j0(x).amax(-1)", "bessel")]
)
def test_an_operator_that_onnx_lacks_is_named_with_its_module(tmp_path: Path, call: str, name: str) -> None:
    (tmp_path / "spectral.py").write_text(SPECTRAL.replace("CALL", call))
    source = f"{tmp_path / 'spectral.py'}:build"
    model = calibrated_model(open_model(source, input_size=16, mean=(0.5,) * 3, std=(0.25,) * 3))
    with pytest.raises(UnsupportedModelError, match=rf"module 'odd': .*{name}") as caught:
        Onnx(preset="simulate").export(model, tmp_path / "odd.onnx")
    assert "\n" not in str(caught.value) and not (tmp_path / "odd.onnx").exists()


def test_wrong_presets_files_and_runtimes_are_named(full_file: Path, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, ValueError), match=r"unknown preset 'ort_cpu'; did you mean 'ort-cpu'"):
        Onnx(preset="ort_cpu")
    with pytest.raises(ModelError, match="no such file"):
        Onnx.open(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello, this is no graph")
    with pytest.raises(ModelError, match=r"text\.onnx (is not an ONNX file|was not exported by synthquant)"):
        Onnx.open(tmp_path / "text.onnx")
    with pytest.raises(UnknownNameError, match="unknown runtime 'tvm'; available: onnxruntime, openvino"):
        Onnx.open(full_file, "tvm")
    foreign = onnx.load(str(full_file))
    del foreign.metadata_props[:]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    with pytest.raises(ModelError, match="was not exported by synthquant: it does not say how images are prepared"):
        Onnx.open(tmp_path / "foreign.onnx")


def test_a_missing_package_names_the_extra(
    full_model: QuantModel, full_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"openvino.*pip install 'synthquant\[openvino\]'"):
        Onnx.open(full_file, "openvino")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"onnxscript.*pip install 'synthquant\[onnx\]'"):
        Onnx().export(full_model, tmp_path / "file.onnx")
    assert not (tmp_path / "file.onnx").exists()
