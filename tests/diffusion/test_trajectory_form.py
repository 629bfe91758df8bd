from __future__ import annotations

from typing import Any

import pytest
import torch

from synthquant.core.errors import UnsupportedModelError
from synthquant.diffusion.trajectory_form import form_of, packed, rows_of
from synthquant.models.signature import Inputs

NOISE = torch.Generator().manual_seed(0)
IDS = torch.randn(7, 2, generator=NOISE)


def call(time: float, sample: torch.Tensor, text: torch.Tensor) -> Inputs:
    """Two images with guidance, and a tree of conditions as Stable Diffusion XL has it."""
    kwargs: dict[str, Any] = {
        "sample": torch.cat([sample, sample]),
        "timestep": torch.full((4,), time),
        "added": {"text": text, "more": [torch.arange(4), (torch.ones(4, 1),)]},
        "ids": IDS,
        "scale": 0.5,
        "return_dict": False,
    }
    return Inputs((), kwargs, frozenset({"ids"}))


def test_a_part_gives_back_each_row_of_each_call() -> None:
    text = torch.randn(4, 3, generator=NOISE)
    samples = torch.randn(3, 2, 5, generator=NOISE)
    calls = [call(time, sample, text) for time, sample in zip((799.2, 399.6, 0.3), samples, strict=True)]
    part, form = packed(calls, 2, torch.float16), form_of(calls[0])
    shapes = {name: tuple(tensor.shape[:3]) for name, tensor in part.items() if not name.startswith("constant")}
    assert shapes == {
        "sample": (2, 3, 1),  # of each image and step, whether with condition or without
        "timestep": (2, 3, 1),
        "added.text": (2, 1, 2),  # of each image, once
        "added.more.0": (2, 1, 2),
        "added.more.1.0": (2, 1, 1),
    }
    places = [(image, step, repeat) for image in range(2) for step in range(3) for repeat in range(2)]
    found = rows_of(part, places, form)
    found.require(calls[0].signature)
    for row, (image, step, repeat) in enumerate(places):
        expected = calls[step].rows(2 * repeat + image, 2 * repeat + image + 1)
        for (name, value), (_, wanted) in zip(found.rows(row, row + 1).named(), expected.named(), strict=True):
            half = wanted.is_floating_point() and name != "timestep"  # 799.2 is none in half precision
            assert torch.equal(value, wanted.half().float() if half else wanted), name
    assert found.kwargs["scale"] == 0.5 and torch.equal(found.kwargs["ids"], IDS)


def test_what_no_file_holds() -> None:
    inputs = Inputs((), {"sample": torch.zeros(1, 2), "kind": torch.float32})
    with pytest.raises(UnsupportedModelError, match="given kind, a dtype, which the file of a trajectory cannot hold"):
        form_of(inputs)
