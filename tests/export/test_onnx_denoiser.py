"""A quantized denoiser as an ONNX file: it computes the same on integers, and the example samples with it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from PIL import Image
from tests import small_diffusion as small
from tests.small_quantized import Recorded, quantized, tiny

import synthquant as sq
from synthquant.diffusion.pipelines import DiffusionPipeline, Sampling, open_pipeline
from synthquant.nn.quant_model import QuantModel

ROOT = Path(__file__).parents[2]
# Seven bits: no sum of two products overflows in 16 bits, as CPUs without VNNI add them.
SCHEME: dict[str, Any] = {"preset": "W7A8", "weights": {"symmetric": True}, "ends": "same", "deploy": "full"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_with_onnx", ROOT / "examples" / "sample_with_onnx.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantModel, Recorded, Path]:
    root = tmp_path_factory.mktemp("onnx")
    source = small.saved(tiny(), root / "pipeline")
    quant_model, recorded = quantized(source, scheme=SCHEME)
    return source, quant_model, recorded, sq.Onnx().export(quant_model, root / "denoiser.onnx")


def test_the_file_computes_the_same_on_integers(exported: tuple[Path, QuantModel, Recorded, Path]) -> None:
    _, quant_model, recorded, path = exported
    found = sq.Onnx().verify(quant_model, path, recorded)
    assert found["samples"] == len(recorded) and found["optimized"]["mean_error"] < 0.05
    layers = found["layers"]
    assert layers["floating"] == 0 and layers["integer"] == len(quant_model.layers), layers["float_layers"]
    assert layers["products_integer"] == 2 and layers["products_floating"] == 0, "of the attention in the middle"


class InTorch:
    """The quantized network behind the interface of a session."""

    def __init__(self, session: Any, quant_model: QuantModel) -> None:
        self.get_inputs = session.get_inputs
        self._quant_model = quant_model

    @torch.no_grad()
    def run(self, names: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self._quant_model(**{name: torch.from_numpy(value) for name, value in given.items()}).sample.numpy()]


def test_the_example_draws_what_the_quantized_pipeline_draws(
    exported: tuple[Path, QuantModel, Recorded, Path], example: ModuleType
) -> None:
    source, quant_model, _, path = exported
    session, scheduler, seeds = example.open_denoiser(path, 1), example.open_scheduler(str(source)), [3, 4, 5]
    pipeline = open_pipeline(str(source))

    def wanted(one: DiffusionPipeline, steps: int) -> np.ndarray:
        return one.draw(None, seeds, Sampling(steps=steps)).images.permute(0, 2, 3, 1).numpy().astype(int)

    same = example.sample(InTorch(session, quant_model), scheduler, seeds, 6)
    assert same.dtype == np.uint8 and np.array_equal(same, wanted(pipeline.replaced(quant_model), 6))
    # A network that was never trained carries every other rounding on, so that few steps tell more than many.
    found = example.sample(session, scheduler, seeds, 2).astype(int)
    apart = [np.abs(found - wanted(one, 2)).mean() for one in (pipeline.replaced(quant_model), pipeline)]
    assert found.shape == (3, 8, 8, 3) and apart[0] < 0.8 * apart[1], apart


def test_the_example_writes_a_grid(
    exported: tuple[Path, QuantModel, Recorded, Path],
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, _, _, path = exported
    given = ["x", path, "--pipeline", source, "--count", 5, "--steps", 2, "--threads", 1, "--out", tmp_path / "i.png"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in given])
    example.main()
    assert capsys.readouterr().out == f"5 images in {tmp_path / 'i.png'}\n"
    with Image.open(tmp_path / "i.png") as image:
        assert image.size == (24, 16)
        assert np.asarray(image)[8:, 16:].max() == 0, "the sixth place is empty"
