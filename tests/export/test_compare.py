"""How far a written network is from the one it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model, small_images
from tests.toy_networks import InMemory
from torch import nn

from synthquant.core.errors import VerificationError
from synthquant.core.rng import Rng
from synthquant.export.compare import difference, require_close, run_beside
from synthquant.export.flat import flat_output
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize import Rtn

REFERENCE = torch.tensor([[3.0, 0.0, -3.0], [0.0, 2.0, 1.99], [1.0, -1.0, 0.5]])


def test_differences_are_in_spreads_and_steps() -> None:
    logits = REFERENCE + torch.tensor([0.5, 0.0, 0.0])
    found = difference(logits, REFERENCE, step=0.25)
    spread = float(REFERENCE.std())
    assert found.mean_error == pytest.approx(0.5 / 3 / spread) and found.max_error == pytest.approx(0.5 / spread)
    assert (found.mean_steps, found.max_steps) == (pytest.approx(2 / 3), pytest.approx(2.0))
    assert found.agreement == 1 and found.differing == 0
    assert difference(logits, REFERENCE).max_steps is None


def test_a_tie_is_no_error_and_another_class_is() -> None:
    tied, wrong = REFERENCE.clone(), REFERENCE.clone()
    tied[1, 2] = 2.01
    wrong[0, 2] = 9.0
    assert (difference(tied, REFERENCE).differing, difference(tied, REFERENCE).ties) == (1, 1)
    found = difference(wrong, REFERENCE)
    assert (found.differing, found.ties) == (1, 0)
    require_close({"logits": difference(tied, REFERENCE)}, "it", 3, min_agreement=1.0, max_mean_error=1.0)
    with pytest.raises(VerificationError, match=r"it gives 3 of 3 images another top class .*0.00% agree"):
        require_close({"logits": difference(-REFERENCE, REFERENCE)}, "it", 3, min_agreement=1.0, max_mean_error=9.0)
    with pytest.raises(VerificationError, match=r"it gives logits that differ .* \(1.00% is allowed\)"):
        require_close(
            {"logits": difference(REFERENCE + 0.5, REFERENCE)}, "it", 3, min_agreement=1.0, max_mean_error=0.01
        )


def test_not_a_number_fails() -> None:
    logits = REFERENCE.clone()
    logits[0, 1] = torch.nan
    with pytest.raises(VerificationError):
        require_close({"logits": difference(logits, REFERENCE)}, "it", 3, min_agreement=0.0, max_mean_error=1.0)


def test_images_are_spread_over_the_set(tmp_path: Path) -> None:
    model = calibrated_model(small_float_model(tmp_path))
    beside = run_beside(model, {"same": lambda tensors: [model(*tensors)]}, small_images(12), count=5)
    assert beside.count == 5 and beside.reference["logits"].shape == (5, 7)
    assert torch.equal(beside.reference["logits"], beside.outputs["same"]["logits"])


def test_one_number_for_a_whole_batch_is_compared_batch_by_batch() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.fc(x)
            return {"size": y.square().mean(), "best": y.sum().argmax(), "y": y}

    samples = InMemory(Inputs((torch.randn(40, 4),)))
    takes, source = samples.inputs.rows(0, 4), ModelSource(source="mean")
    float_model = FloatModel(Mean().eval().requires_grad_(False), takes, "mean", source, task="other")
    model = QuantModel.build(float_model, "W8A8")
    Rtn(calibration_images=16).apply(model, samples, Rng(0))

    def other(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        size, best, y = flat_output(model(*tensors))
        return [size + 1, best, y]

    beside = run_beside(model, {"other": other}, samples, 40)
    assert beside.reference["size"].shape == (3,) and beside.reference["y"].shape == (40, 3)
    assert (beside.count, beside.noun) == (40, "samples")
    found = beside.differences("other")
    assert found["y"].max_error == 0 == found["best"].differing
    assert found["size"].mean_error * float(beside.reference["size"].double().std()) == pytest.approx(1, rel=1e-4)
