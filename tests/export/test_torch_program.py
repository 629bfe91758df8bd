"""`torch.export` of the deployed network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model, small_images

from synthquant.core.errors import UnsupportedModelError, VerificationError
from synthquant.export.torch_program import TorchProgram
from synthquant.models.open import open_model
from synthquant.models.zoo import ZOO
from synthquant.nn.quant_model import QuantModel

BRANCHING = """
import torch
from torch import nn


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 7)

    def forward(self, x):
        x = self.fc(x.mean(dim=(2, 3)))
        return x if x.sum() > 0 else -x


def build():
    torch.manual_seed(0)
    return Branching()
"""


@pytest.fixture(scope="module", params=["W4A4", {"preset": "W8A8", "deploy": "full"}], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantModel, Path]:
    """A network and its program."""
    folder = tmp_path_factory.mktemp("program")
    model = calibrated_model(small_float_model(folder), request.param)
    return model, TorchProgram().export(model, folder / "program.pt2", origin={"recipe_sha256": "0"})


def test_a_program_is_the_network_with_integer_weights_and_any_batch(written: tuple[QuantModel, Path]) -> None:
    model, path = written
    program = torch.export.load(path)
    x = model.float_model.example_images(5)
    with torch.no_grad():
        assert torch.allclose(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    tensors = [*program.state_dict.values(), *program.constants.values()]
    assert {torch.int8, torch.uint8} & {value.dtype for value in tensors}
    assert TorchProgram().verify(model, path, small_images())["loaded"]["agreement"] == 1


@pytest.mark.parametrize("name", [name for name in ZOO.names() if not name.endswith("-half")])  # the same, narrower
def test_every_bundled_network_takes_any_batch(name: str) -> None:
    model = open_model(f"zoo/{name}")
    images = torch.rand(5, 3, 32, 32)
    program = torch.export.export(
        model.module, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    with torch.no_grad():
        assert torch.allclose(program.module()(images), model.module(images), rtol=1e-4, atol=1e-4)


def test_another_network_fails_verification(written: tuple[QuantModel, Path], tmp_path: Path) -> None:
    _, path = written
    other = calibrated_model(small_float_model(tmp_path, "build_other"))
    with pytest.raises(VerificationError, match="the program gives"):
        TorchProgram().verify(other, path, small_images())


def test_a_network_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(BRANCHING)
    source = f"{tmp_path / 'branching.py'}:build"
    float_model = open_model(source, input_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    with pytest.raises(UnsupportedModelError, match=r"\w+: torch\.export cannot follow it: "):
        TorchProgram().export(calibrated_model(float_model), tmp_path / "program.pt2")
    assert not (tmp_path / "program.pt2").exists()
