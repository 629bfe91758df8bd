"""How far a written network is from the one it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model, small_images

from synthquant.core.errors import VerificationError
from synthquant.export.compare import difference, require_close, run_beside

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
