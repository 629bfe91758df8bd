"""The demo with the bundled network and real images, at a budget of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthquant.cli import main
from synthquant.core.record import environment
from synthquant.data.sources import open_images


def test_the_demo_measures_three_ways_beside_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_images("bundled/cifar10-test").subset(range(150)).save(tmp_path / "data")
    small = {"images.count": 32, "images.iterations": 15, "quantize.iterations": 10, "evaluate.data": tmp_path / "data"}
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path / "demo"), "--json", "--device", "cpu", *settings])
    assert stop.value.code == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["float", "rtn on noise", "rtn on synthetic images", "Genie on synthetic images"]
    assert rows["float"]["top1"] > 0.8  # the card says 0.88 on all 5,000
    genie, rtn = rows["Genie on synthetic images"], rows["rtn on synthetic images"]
    # What a reader is to see on any machine, here with a twentieth of the budget.
    assert genie["agreement"] > rtn["agreement"] + 0.1 and genie["kl"] < 0.7 * rtn["kl"]
    assert result["environment"] == environment("cpu")
    assert rows["Genie on synthetic images"]["size_bytes"] < rows["float"]["size_bytes"] / 6
    page = Path(result["report"]).read_text()
    assert all(name in page for name in ("genie", "rtn", "rtn-on-noise"))
