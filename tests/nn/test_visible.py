"""Functions that hide several operations, step by step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from synthquant.nn.visible import KERNELS, visible_silu


@pytest.mark.parametrize("inplace", [False, True])
def test_silu_is_a_product_with_a_sigmoid(inplace: bool) -> None:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * 5
    wanted, given = F.silu(x), x.clone()
    result = visible_silu(given, inplace=inplace)
    assert torch.allclose(result, wanted, atol=1e-6)
    assert (result is given) == inplace
    assert torch.equal(given, x) != inplace


def test_hidden_functions_go_by_the_names_that_torch_gives_them() -> None:
    assert all(callable(getattr(F, name)) for name in KERNELS)
