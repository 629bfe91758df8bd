"""Figures: fixed bytes, the page's colours and font, unique ids, nothing of matplotlib left behind."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from synthquant.core.run_metrics import CoverageRow, SqnrRow, UnitRow
from synthquant.report import figures

UNITS = [
    UnitRow(name="a", loss_start=2.0, steps=(0, 10, 20), losses=(2.0, 1.0, 0.5)),
    UnitRow(name="b", steps=(0, 10, 20), losses=(4.0, None, 1.0)),
    UnitRow(name="no curve"),
]
SQNR = [SqnrRow(name="$x_1$ & <y>", weights=20.0, alone=11.0, cumulative=9.0), SqnrRow(name="fc", weights=30.0)]
COVERAGE = [CoverageRow(name="stem", weight_bits=8, input_bits=8), CoverageRow(name="fc", weight_bits=4)]


def all_figures() -> list[str]:
    return [
        figures.loss_curves(UNITS, "f1"),
        figures.layer_sqnr(SQNR, "f2"),
        figures.layer_bits(COVERAGE, "f3"),
        figures.compare_cumulative({"one": SQNR, "_two": SQNR[::-1]}, "f4"),
    ]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


def test_figures_are_xml_with_their_own_ids_and_the_pages_colours() -> None:
    ids: list[str] = []
    for number, svg in enumerate(all_figures(), start=1):
        root = ElementTree.fromstring(svg)
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert own and all(name.startswith(f"f{number}-") for name in own)
        ids += own
        assert "#0102" not in svg and "#0103" not in svg, "a placeholder colour is left"
        assert "var(--muted)" in svg and "var(--font)" in svg and "<style" not in svg and "metadata" not in svg
        assert "width" not in root.attrib and "viewBox" in root.attrib
    assert len(ids) == len(set(ids))


def test_same_data_same_bytes() -> None:
    assert all_figures() == all_figures()


def test_names_are_shown_as_they_are() -> None:
    assert "$x_1$ & <y>" in texts(figures.layer_sqnr(SQNR, "f"))
    assert "\u200b_two" in texts(figures.compare_cumulative({"_two": SQNR}, "f"))


def test_a_users_settings_do_not_matter_and_are_kept() -> None:
    import matplotlib

    before = all_figures()
    with matplotlib.rc_context({"axes.grid": True, "lines.linewidth": 9.0, "svg.hashsalt": "other"}):
        assert all_figures() == before
        assert matplotlib.rcParams["lines.linewidth"] == 9.0 and matplotlib.rcParams["svg.hashsalt"] == "other"


def test_drawing_loads_no_pyplot() -> None:
    """In a process of its own: other libraries of the tests may have loaded it in this one."""
    code = (
        "import sys; from synthquant.core.run_metrics import SqnrRow; from synthquant.report import figures; "
        "assert figures.layer_sqnr([SqnrRow(name='a', weights=20.0)], 'f'); print('matplotlib.pyplot' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_nothing_to_draw_is_nothing() -> None:
    assert figures.loss_curves(UNITS[2:], "f") == ""
    assert figures.layer_sqnr([SqnrRow(name="fc")], "f") == ""
    assert figures.layer_bits([], "f") == "" and figures.compare_cumulative({}, "f") == ""


def test_bits_of_float_layers_are_on_the_axis() -> None:
    assert {"2", "4", "8", "float"} <= set(texts(figures.layer_bits(COVERAGE, "f")))
    assert "float" not in texts(figures.layer_bits(COVERAGE[:1], "f"))


def test_long_networks_name_only_some_layers() -> None:
    rows = [SqnrRow(name=f"layer{index}", weights=20.0) for index in range(200)]
    shown = [text for text in texts(figures.layer_sqnr(rows, "f")) if text.startswith("layer")]
    assert shown[:2] == ["layer0", "layer4"] and len(shown) == 50


def test_without_matplotlib_there_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures.available()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not figures.available()
    assert figures.loss_curves(UNITS, "f") == figures.layer_bits(COVERAGE, "f") == ""
    assert figures.score_histogram([0, 1], [1], [1], "energy", "f") == figures.class_balance(["a"], [1], [1], "f") == ""
