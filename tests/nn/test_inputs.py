"""Which quantizer a layer's input goes through."""

from __future__ import annotations

from pathlib import Path

from tests.small_networks import small_float_model

from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme


def test_names_own_shared_and_block_entry_quantizers(tmp_path: Path) -> None:
    model = QuantModel.build(small_float_model(tmp_path), "W4A4")
    found = model.reads
    assert found.keys() == model.layers.keys()
    assert found["stem"] == "stem.input_quantizer"
    assert found["blocks.0.conv1"] == "blocks.0.input_quantizer"  # the identity shortcut reads the same tensor
    assert found["blocks.0.conv2"] == "blocks.0.conv2.input_quantizer"
    assert found["blocks.1.conv1"] == found["blocks.1.down"] != "blocks.1.input_quantizer"
    assert set(found.values()) == set(model.quantizers)


def test_float_inputs_have_none(tmp_path: Path) -> None:
    model = QuantModel.build(small_float_model(tmp_path), QuantScheme.parse("W4A16"))
    assert not model.reads
