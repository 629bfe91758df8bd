from __future__ import annotations

import pytest
import torch

from synthquant.core.device import resolve_device
from synthquant.core.errors import InputError


@pytest.mark.parametrize("name", ["cpu:7", "cuda:99", "mps:3", "meta", "toaster", "", "0", "cuda:-1", "cuda:"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"^device '{name}' cannot be used: .*; choose "):
        resolve_device(name)


def test_names_of_devices_that_are_there() -> None:
    assert resolve_device("cpu") == resolve_device("cpu:0") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_accelerators_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [resolve_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(InputError, match="there are 2; choose auto, cpu, cuda"):
        resolve_device("cuda:2")
