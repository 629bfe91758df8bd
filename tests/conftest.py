from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path

import pytest

# No test may wait for, or depend on, what a hub answers.
os.environ["HF_HUB_OFFLINE"] = "1"


# A shell without job control starts what runs in the background with interrupts ignored, and children inherit that;
# tests of stopped commands send them one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let torch's exporter list onnxscript's operators once: a quarter of the time of every small file, each alike."""
    operators = sys.modules.get("onnxscript._framework_apis.torch_2_5")
    if operators is not None and not hasattr(operators.get_torchlib_ops, "cache_info"):
        operators.get_torchlib_ops = functools.cache(operators.get_torchlib_ops)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text-to-image pipeline with random weights, as a folder."""
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from tests.small_pipeline import save_small_pipeline

    return save_small_pipeline(tmp_path_factory.mktemp("generator") / "small")
