from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

Run = Callable[..., None]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of 40 small random images of ten classes, as the training scripts read it."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": ""})
    path = tmp_path_factory.mktemp("images") / "images.parquet"
    pq.write_table(pa.table({"image": rows, "label": [i % 10 for i in range(40)]}), path)
    return path


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the `main` of a script with arguments, on the CPU."""

    def run(script: ModuleType, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments), "--device", "cpu"])
        script.main()

    return run
