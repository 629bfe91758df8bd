"""What happens where the hub cannot be reached."""

from __future__ import annotations

import builtins
import socket
from pathlib import Path
from typing import Any

import pytest

from synthquant.core.errors import ModelError
from synthquant.core.hub import answers, hub_or_cache
from synthquant.models.open import open_model


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    def refuse(host: str, *_: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def test_a_proxy_is_taken_to_answer(unreachable: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not answers("https://hub.invalid/x") and unreachable == ["hub.invalid"]
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy"})
    assert answers("https://hub.invalid/x")


def test_the_cache_is_used_for_the_time_being(unreachable: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_or_cache():
        assert constants.HF_HUB_OFFLINE and constants.is_offline_mode()
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    unreachable.clear()
    with hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE and not unreachable  # told to stay offline: nobody is asked
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_or_cache():
        assert not constants.HF_HUB_OFFLINE


def test_a_network_whose_weights_cannot_be_fetched_is_one_error_at_once(
    unreachable: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("timm", reason="needs the extra 'models'")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"timm/resnet18\.a1_in1k cannot be opened: .*give --weights FILE"):
        open_model("timm/resnet18.a1_in1k")
    assert not [record for record in caplog.records if "Retrying" in record.message]
    unreachable.clear()
    open_model("zoo/cifar10-resnet20")  # what is here needs no hub
    open_model("timm/resnet18", pretrained=False)
    assert not unreachable


def test_without_its_library_nothing_is_done(unreachable: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with hub_or_cache():
        pass
    assert not unreachable
