"""The rule for ties, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthquant.core.ranking import top_classes


@pytest.mark.parametrize("classes", [1, 2, 7, 40, 300])
def test_of_equal_logits_the_lower_class_comes_first(classes: int) -> None:
    logits = torch.randint(-2, 3, (200, classes), generator=torch.Generator().manual_seed(classes)).float()
    plain = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    for k in (1, 5):
        assert top_classes(logits, k).tolist() == [order[:k] for order in plain]
    assert top_classes(logits)[:, 0].tolist() == np.argmax(logits.numpy(), 1).tolist()


def test_not_a_number_comes_first() -> None:
    assert top_classes(torch.tensor([[1.0, torch.nan, torch.inf]]), 2).tolist() == [[1, 2]]
