from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.small_networks import calibrated_model, small_float_model

from synthquant.export.onnx import Onnx
from synthquant.nn.quant_model import QuantModel

FULL: dict[str, Any] = {"preset": "W8A8", "weights": {"symmetric": True}, "deploy": "full"}


@pytest.fixture(scope="session")
def full_model(tmp_path_factory: pytest.TempPathFactory) -> QuantModel:
    """The small network with every tensor between integer kernels quantized; do not change it."""
    return calibrated_model(small_float_model(tmp_path_factory.mktemp("full")), FULL)


@pytest.fixture(scope="session")
def full_file(full_model: QuantModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That network for ONNX Runtime."""
    return Onnx().export(full_model, tmp_path_factory.mktemp("file") / "full.onnx", origin={"recipe_sha256": "abc"})
