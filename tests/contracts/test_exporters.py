"""What holds for every exporter: its suffix is its own, and what it writes is what it opens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model

from synthquant.core.errors import UnknownNameError
from synthquant.methods import EXPORTERS
from synthquant.runtimes import exporter_of, runtime_exporters

pytest.importorskip("onnxruntime")


def test_every_exporter_is_found_by_its_own_suffix() -> None:
    suffixes = [cls.suffix for _, cls in EXPORTERS.items() if cls.suffix]  # those that have none write folders
    assert len(set(suffixes)) == len(suffixes) >= 2
    assert all(suffix.startswith(".") for suffix in suffixes)
    for exporter in runtime_exporters():
        assert exporter_of(Path(f"net{exporter.suffix}")) is exporter
    assert exporter_of("net.unknown") is None and exporter_of("net.pt2") is None


@pytest.mark.parametrize("exporter", runtime_exporters(), ids=str)
def test_what_is_written_is_opened_by_every_runtime(exporter, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    # Seven bits and the same ends: no sum of products overflows in 16 bits, as CPUs without VNNI add them.
    scheme = {"preset": "W7A8", "weights": {"symmetric": True}, "ends": "same"}
    model = calibrated_model(small_float_model(tmp_path), scheme)
    path = exporter().export(model, tmp_path / f"net{exporter.suffix}")
    images = model.float_model.example_images(3)
    for runtime in exporter.runtimes:
        if runtime == "openvino" and find_spec("openvino") is None:
            continue
        opened = exporter.open(path, runtime, threads=1)
        with torch.no_grad():
            assert (opened.run(images) - model(images)).abs().max() < 0.1 * model(images).std(), runtime
        assert opened.scheme == model.scheme and opened.preprocess == model.float_model.preprocess
        assert opened.fingerprint == model.float_model.fingerprint and opened.num_classes == 7
    with pytest.raises(UnknownNameError, match="unknown runtime 'none'"):
        exporter.open(path, "none")
