"""Checkpoints: exact, strict, small, the same bytes each time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.damage import same_or_refused
from tests.nn.networks import Network, float_model
from tests.small_networks import calibrated_model, small_float_model

from synthquant.core.errors import ModelError, OutputError
from synthquant.core.files import read_sealed_json, sha256_file, write_json, write_sealed_json
from synthquant.evaluate.cost import quantized_cost
from synthquant.export.checkpoint import Checkpoint, checkpoint_hash, load_checkpoint, save_checkpoint
from synthquant.export.grids import weight_grid
from synthquant.export.presets import find_preset
from synthquant.export.quant_config import CONFIG_NAME, WEIGHTS_NAME
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.weight_sources import SoftRounding

SCHEMES = [
    "W4A4",
    "W8A8",
    "W2A16",
    {"preset": "W3A5", "ends": "same"},
    {"preset": "W4A4", "weights": {"strategy": "tensor", "symmetric": True}},
    {"preset": "W4A4", "weights": {"strategy": "group", "group_size": 6}, "ignore": ["blocks.1.*"], "ends": "same"},
    {"preset": "W4A4", "input_activations": {"num_bits": 16}, "overrides": {"up": {"weights": None}}},
]


@pytest.fixture
def model(tmp_path: Path) -> QuantModel:
    return calibrated_model(small_float_model(tmp_path))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_logits_are_bit_identical(tmp_path: Path, scheme: str | dict[str, object]) -> None:
    model = calibrated_model(small_float_model(tmp_path), _fitting(scheme))
    inputs = model.float_model.example_images(5)
    folder = save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(folder, trust_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))
    assert loaded.scheme == model.scheme
    assert loaded.float_model.preprocess == model.float_model.preprocess
    assert loaded.float_model.fingerprint == model.float_model.fingerprint


def _fitting(scheme: str | dict[str, object]) -> str | dict[str, object]:
    """Groups of 6 divide the rows of the block layers only."""
    if isinstance(scheme, dict) and "group_size" in str(scheme):
        return {**scheme, "ignore": ["fc", "stem", "up", "blocks.0.conv*", "blocks.1.down"], "ends": "same"}
    return scheme


def test_weights_that_training_changed_do_not_matter(tmp_path: Path) -> None:
    """The architecture is rebuilt from its source; the weights of that source may be others by now."""
    model = calibrated_model(small_float_model(tmp_path))
    folder = save_checkpoint(model, tmp_path / "model")
    path = tmp_path / "small_network.py"
    path.write_text(path.read_text(encoding="utf-8").replace("* 0.3", "* 0.1"), encoding="utf-8")
    inputs = model.float_model.example_images(3)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(folder, trust_code=True)(inputs), model(inputs))


def test_same_network_same_bytes(model: QuantModel, tmp_path: Path) -> None:
    first, second = save_checkpoint(model, tmp_path / "a"), save_checkpoint(model, tmp_path / "b")
    again = save_checkpoint(load_checkpoint(first, trust_code=True), tmp_path / "c")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (first / name).read_bytes() == (second / name).read_bytes() == (again / name).read_bytes()


def test_saving_replaces_what_is_there(model: QuantModel, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    (folder / "left over").write_text("x")
    save_checkpoint(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", WEIGHTS_NAME, CONFIG_NAME]


def test_codes_take_their_bits(model: QuantModel, tmp_path: Path) -> None:
    """The tensors in the file take exactly the bytes that the cost says; codes are packed, scales float32."""
    folder = save_checkpoint(model, tmp_path / "model")
    data = (folder / WEIGHTS_NAME).read_bytes()
    (header_size,) = struct.unpack("<Q", data[:8])
    assert len(data) - 8 - header_size == quantized_cost(model).size_bytes
    tensors = load_file(folder / WEIGHTS_NAME)
    assert tensors["blocks.0.conv1.weight_packed"].shape == (8 * 8 * 9 * 4 // 8,)
    assert tensors["blocks.0.conv1.weight_scale"].dtype == torch.float32
    assert tensors["blocks.0.conv1.weight_zero_point"].dtype == torch.uint8


def test_zero_points_outside_a_byte_survive(model: QuantModel, tmp_path: Path) -> None:
    quantizer = model.layers["up"].weight_quantizer
    assert quantizer is not None
    quantizer.zero_point[0] = -300.0
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "model"), trust_code=True)
    inputs = model.float_model.example_images(2)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))


def test_config_describes_every_layer(model: QuantModel, tmp_path: Path) -> None:
    config = json.loads((Checkpoint().export(model, tmp_path / "model") / CONFIG_NAME).read_text(encoding="utf-8"))
    layers = {entry["name"]: entry for entry in config["layers"]}
    assert list(layers) == list(model.layers)
    assert layers["stem"]["weights"]["num_bits"] == 8 and layers["up"]["weights"]["num_bits"] == 4
    assert layers["up"]["kind"] == "ConvTranspose2d" and layers["up"]["shape"] == [12, 3, 2, 2]
    assert layers["blocks.0.conv1"]["input_quantizer"] == "blocks.0.input_quantizer"
    assert layers["blocks.1.conv1"]["input_quantizer"] == layers["blocks.1.down"]["input_quantizer"]
    assert set(config["quantizers"]) == set(model.quantizers)
    assert config["scheme_summary"] == model.scheme.describe()
    assert config["float_model"]["fingerprint"] == model.float_model.fingerprint
    assert config["weights_sha256"] == sha256_file(tmp_path / "model" / WEIGHTS_NAME)


def test_the_float_model_can_be_given_and_is_checked(model: QuantModel, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    assert load_checkpoint(folder, float_model=model.float_model).float_model is model.float_model
    other = small_float_model(tmp_path, "build_other")
    with pytest.raises(ModelError, match="the checkpoint was made from other weights of Network than"):
        load_checkpoint(folder, float_model=other)


def test_uncalibrated_models_are_not_saved(tmp_path: Path) -> None:
    model = QuantModel.build(small_float_model(tmp_path), "W4A4")
    with pytest.raises(ModelError, match="Network: not calibrated yet; apply a quantization method first"):
        save_checkpoint(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_failed_save_leaves_nothing(model: QuantModel, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        save_checkpoint(model, tmp_path / "model")
    quantizer = model.layers["up"].weight_quantizer
    assert quantizer is not None
    quantizer.zero_point.fill_(0.5)
    with pytest.raises(ModelError, match=r"up\.weight_zero_point is not a whole number"):
        save_checkpoint(model, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("__")) == [
        "model",
        "small_network.py",
    ]


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_files_are_named(model: QuantModel, tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"is not a checkpoint: it has no {name}"):
        load_checkpoint(folder, trust_code=True)


def test_damaged_weights_are_found(model: QuantModel, tmp_path: Path) -> None:
    path = save_checkpoint(model, tmp_path / "model") / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: its hash is not the one in"):
        load_checkpoint(path.parent, trust_code=True)


@pytest.mark.parametrize(("name", "least"), [(CONFIG_NAME, 40), (WEIGHTS_NAME, 30 + 6)])
def test_no_damage_to_a_checkpoint_changes_the_network(
    model: QuantModel, tmp_path: Path, name: str, least: int
) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    inputs = model.float_model.example_images(2)

    def logits() -> list[float]:
        with torch.no_grad():
            return load_checkpoint(folder, float_model=model.float_model)(inputs).flatten().tolist()

    assert same_or_refused(folder / name, logits, flips=least if name == CONFIG_NAME else 30) >= least - 2


def test_a_checkpoint_of_the_first_version_is_read(model: QuantModel, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    fields = read_sealed_json(folder / CONFIG_NAME)
    write_json(folder / CONFIG_NAME, {**fields, "format_version": 1})
    inputs = model.float_model.example_images(2)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(folder, float_model=model.float_model)(inputs), model(inputs))
    write_json(folder / CONFIG_NAME, fields)
    with pytest.raises(ModelError, match=r"quant_config\.json lacks the hash that this package writes"):
        load_checkpoint(folder, trust_code=True)


def test_a_file_of_another_kind_is_refused(model: QuantModel, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    (folder / WEIGHTS_NAME).write_bytes(b"not safetensors at all")
    _rewrite(folder)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file"):
        load_checkpoint(folder, trust_code=True)


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> None:
    """Change tensors or fields of the description, with the hashes made right again."""
    if tensors is not None:
        save_file(tensors, folder / WEIGHTS_NAME)
    content = read_sealed_json(folder / CONFIG_NAME)
    content |= {"weights_sha256": sha256_file(folder / WEIGHTS_NAME), **config}
    write_sealed_json(folder / CONFIG_NAME, content)


def test_missing_unexpected_and_misshapen_tensors_are_named(model: QuantModel, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS_NAME)
    packed = tensors.pop("up.weight_packed")
    _rewrite(folder, tensors)
    with pytest.raises(ModelError, match=r"does not fit Network: missing up\.weight_codes"):
        load_checkpoint(folder, trust_code=True)
    _rewrite(folder, {**tensors, "up.weight_packed": packed, "extra": torch.zeros(1)})
    with pytest.raises(ModelError, match="does not fit Network: unexpected extra"):
        load_checkpoint(folder, trust_code=True)
    _rewrite(folder, {**tensors, "up.weight_packed": packed[:-1]})
    with pytest.raises(ModelError, match=r"up\.weight_packed: packed codes are torch\.uint8 \(71,\)"):
        load_checkpoint(folder, trust_code=True)
    _rewrite(folder, {**tensors, "up.weight_packed": packed, "fc.bias": torch.zeros(8)})
    with pytest.raises(ModelError, match=r"wrong shape of fc\.bias"):
        load_checkpoint(folder, trust_code=True)


def test_other_formats_are_refused(model: QuantModel, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "model")
    config = read_sealed_json(folder / CONFIG_NAME)
    _rewrite(folder, format_version=7)
    with pytest.raises(ModelError, match="has version 7, this release reads 1 to 6"):
        load_checkpoint(folder, trust_code=True)
    _rewrite(folder, format_version=2, format="other")
    with pytest.raises(ModelError, match="its format is not 'synthquant-packed'"):
        load_checkpoint(folder, trust_code=True)
    last = config["layers"][-1]
    _rewrite(folder, format="synthquant-packed", layers=[*config["layers"][:-1], last | {"shape": [7, 5]}])
    with pytest.raises(ModelError, match="layer fc is not what Network has"):
        load_checkpoint(folder, trust_code=True)
    _rewrite(folder, layers=config["layers"][:-1])
    with pytest.raises(ModelError, match="layer fc is missing, an earlier release"):
        load_checkpoint(folder, trust_code=True)
    _rewrite(folder, layers=[*config["layers"], last | {"name": "more"}])
    with pytest.raises(ModelError, match="Network has no layer more"):
        load_checkpoint(folder, trust_code=True)
    _rewrite(folder, layers=config["layers"], unknown=1)
    with pytest.raises(ModelError, match="unknown"):
        load_checkpoint(folder, trust_code=True)
    (folder / CONFIG_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=CONFIG_NAME):
        load_checkpoint(folder, trust_code=True)


def test_a_checkpoint_of_an_earlier_release_gives_the_logits_that_it_gave() -> None:
    """`checkpoint_v2` was written before quantizers had kinds and weights sources."""
    folder = Path(__file__).parent / "checkpoint_v2"
    loaded = load_checkpoint(folder, float_model=float_model(Network(), size=16))
    with torch.no_grad():
        logits = loaded(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))
    assert logits[0].tolist() == pytest.approx(json.loads((folder / "logits.json").read_text()), abs=1e-4)
    assert sha256_file(folder / WEIGHTS_NAME) == checkpoint_hash(loaded)


def test_unclipped_codes_come_back_as_they_were(tmp_path: Path) -> None:
    """Version 4; what is computed and exported is what clipped codes give."""
    float_model = small_float_model(tmp_path)
    plain, unclipped = calibrated_model(float_model, "W2A4"), calibrated_model(float_model, "W2A4")
    for layer in unclipped.layers.values():
        assert layer.weight_quantizer is not None
        layer.weight_source = SoftRounding(layer.weight_quantizer, layer.float_weight, learn_scale=False)
        layer.harden_weight(unclipped=True)
        with torch.no_grad():
            layer.weight_quantizer.codes[0] += 9
    for name, layer in plain.layers.items():
        codes, wanted = layer.weight_quantizer, unclipped.layers[name].weight_quantizer
        assert codes is not None and wanted is not None
        codes.load_codes(wanted.clipped_codes)
        grids = [weight_grid(one, name, find_preset("simulate")) for one in (codes, wanted)]
        assert torch.equal(grids[0].codes, grids[1].codes)
    folder = save_checkpoint(unclipped, tmp_path / "model")
    assert read_sealed_json(folder / CONFIG_NAME)["format_version"] == 4
    loaded = load_checkpoint(folder, float_model=float_model)
    x = float_model.example_images(3)
    with torch.no_grad():
        assert torch.equal(loaded(x), plain(x)) and torch.equal(unclipped(x), plain(x))
    for name, value in unclipped.state().items():
        assert torch.equal(loaded.state()[name], value) and loaded.state()[name].dtype == value.dtype
    weights = sum(value.numel() for name, value in plain.state().items() if name.endswith("codes"))
    packed = sum((p.numel() * b + 7) // 8 for p, b in _codes_and_bits(plain))
    assert quantized_cost(unclipped).size_bytes - quantized_cost(plain).size_bytes == 2 * weights - packed


def _codes_and_bits(model: QuantModel) -> list[tuple[torch.Tensor, int]]:
    quantizers = [layer.weight_quantizer for layer in model.layers.values()]
    return [(one.codes, one.num_bits) for one in quantizers if one is not None]
