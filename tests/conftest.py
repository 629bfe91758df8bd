from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markupsafe import Markup

# No test may wait for, or depend on, what a hub answers.
os.environ["HF_HUB_OFFLINE"] = "1"


# Several processes (`pytest --numprocesses`) have a core each; read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell without job control starts what runs in the background with interrupts ignored, and children inherit that;
# tests of stopped commands send them one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


OPERATORS = "get_torchlib_ops"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let torch's exporter list onnxscript's operators once: a fifth of the time of every small file, each alike."""
    if "onnxscript._framework_apis" in sys.modules:
        for name, module in list(sys.modules.items()):
            if name.startswith("onnxscript._framework_apis.torch_") and OPERATORS in vars(module):
                listed = vars(module)[OPERATORS]
                if not hasattr(listed, "cache_info"):
                    setattr(module, OPERATORS, functools.cache(listed))


@pytest.fixture(scope="module", autouse=True)
def figures_where_they_are_looked_at(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pages of runs in this process have figures in tests/report only: drawing them takes longer than small runs."""
    figures = importlib.import_module("synthquant.report.figures")
    with pytest.MonkeyPatch.context() as patch:
        if "report" not in request.path.parts:
            for name, function in list(vars(figures).items()):
                if hasattr(function, "__wrapped__") and not name.startswith("_"):
                    patch.setattr(figures, name, lambda *_, **__: Markup())
        yield


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text-to-image pipeline with random weights, as a folder."""
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from tests.small_pipeline import save_small_pipeline

    return save_small_pipeline(tmp_path_factory.mktemp("generator") / "small")
