"""The page: complete, self-contained, escaped, the same each time, and honest about what is missing."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.run_folders import LAYERS, accuracy_rows, make_run, real_images

from synthquant.core.errors import InputError, OutputError
from synthquant.core.files import write_sealed_json
from synthquant.core.progress import QUIET
from synthquant.core.record import RunRecord
from synthquant.report import html
from synthquant.report.html import write_report
from synthquant.report.run_files import open_runs
from synthquant.report.side_by_side import accuracy_lines, differences

VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """Collects tags, text and addresses, and checks that elements are closed in order and ids are unique."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.cells: list[list[str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        assert len(set(self.ids)) == len(self.ids), "an id is used twice"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")
        ]
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> while {self.open[-3:]} are open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
            if {"td", "th"} & set(self.open):
                self.cells[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The cells of the first row that starts with `first`."""
        return next([cell.strip() for cell in cells] for cells in self.cells if cells and cells[0].strip() == first)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(*runs: Path, out: Path) -> tuple[str, Page]:
    text = write_report(runs, out).read_text(encoding="utf-8")
    return text, Page(text)


def test_one_run(tmp_path: Path) -> None:
    text, page = page_of(make_run(tmp_path / "run", real_images(tmp_path / "real")), out=tmp_path / "report.html")
    assert page.row("float")[1] == "91.23"
    row = page.row("genie_m")
    assert row[1] == "90.82" and "89.60" in row[2] and "99.55" in row and "97.00" in row and "140\u202fKiB" in row
    assert "\u22120.41" in page.words  # points lost
    (layer,) = [cells for cells in page.cells if cells[0] == "blocks.0.conv1" and len(cells) == 11]
    assert layer[-3:-1] == ["14.0", "11.0"]  # alone, cumulative
    assert page.words.count("diverged, restored") == 1
    assert [row[:4] for row in page.cells if len(row) == 6 and row[3].startswith(("give", "leave"))] == [
        ["fc", "12.0", "inputs, 8 bits: 18.0 dB", "leave the layer in floating point"],
        ["blocks.0.conv2", "13.0", "inputs, 4 bits: 18.0 dB", "give its inputs 8 bits"],
        ["blocks.0.conv1", "14.0", "inputs, 4 bits: 18.0 dB", "give its inputs 8 bits"],
    ]
    assert "1 more set aside (broken.png: truncated)" in page.words
    assert page.tags.count("img") == 9 + 6
    assert len(re.findall(r'<svg role="img"', text)) == 3
    assert page.row("torch") == ["torch", "2.15"]
    assert "Not in this run" not in page.words


def assert_only_its_own_script(text: str, page: Page) -> None:
    """The page runs the script that sorts tables, which it names by its hash, and can load nothing."""
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert script == (Path(html.__file__).parent / "sort.js").read_text(encoding="utf-8")
    assert page.tags.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    allowed = ("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'")
    assert policy == "; ".join(allowed)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text, page = page_of(make_run(tmp_path / "run"), make_run(tmp_path / "run2"), out=tmp_path / "report.html")
    assert all(address.startswith(("data:", "#")) for address in page.addresses), page.addresses
    assert_only_its_own_script(text, page)
    outside = {found for found in re.findall(r"(?:https?:)?//[^\s\"'<>)]+", text) if "www.w3.org" not in found}
    assert outside == set()
    assert not re.search(r"@import|url\((?!#|&quot;#)", text)


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model__name="<script>alert(1)</script>")
    text, page = page_of(run, out=tmp_path / "report.html")
    assert_only_its_own_script(text, page)
    assert "<script>alert(1)</script>" in page.words and "b" in page.tags
    assert "<b>not bold</b>" in page.words and "<cat>" in page.words
    assert "<b>not bold" not in text


def test_same_run_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report([run], tmp_path / "a.html").read_bytes()
    assert write_report([run], tmp_path / "b.html").read_bytes() == first


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "one" / "run")
    second = make_run(tmp_path / "two" / "run", seed=3, quantize__method="rtn")
    text, page = page_of(first, second, out=tmp_path / "report.html")
    assert "2 runs side by side" in page.words
    assert page.row("seed") == ["seed", "0", "3"]  # what differs comes before the environments
    assert "one/run" in page.words and "two/run" in page.words
    assert 'id="compare-' in text and len(re.findall(r'<svg role="img"', text)) == 7
    assert sum(cells[:1] == ["float"] for cells in page.cells) == 1  # which both runs measured alike
    assert [cells[0] for cells in page.cells if cells[0].startswith("genie_m")] == [
        "genie_m one/run",
        "genie_m two/run",
    ]


def test_only_what_differs_is_shown_to_differ(tmp_path: Path) -> None:
    rows = accuracy_rows()
    rows[1] |= {"top1": 0.8, "name": "rtn"}
    first = make_run(tmp_path / "one", evaluate__accuracy=rows)
    second = make_run(tmp_path / "two")
    for run, quantize in ((first, {"method": "rtn"}), (second, {"method": "genie_m", "iterations": 300})):
        record = RunRecord.load(run / "run.json")
        record.recipe["quantize"] |= quantize
        record.save(run / "run.json")
    runs = open_runs([first, second])
    found = differences(runs)
    assert found.figures == [("top-1 %", ["80.00", "90.82"])]
    assert found.settings == [("quantize.method", ["rtn", "genie_m"])]
    assert found.own == [("quantize.iterations", ["\u2013", "300"])]
    _, page = page_of(first, second, out=tmp_path / "report.html")
    assert page.row("top-1 %") == ["top-1 %", "80.00", "90.82"]
    assert "1 settings that only some of the runs have" in page.words
    names = [(line.run, line.row.name, line.first) for line in accuracy_lines(runs)]
    assert names == [(None, "float", True), (0, "rtn", False), (1, "genie_m", False)]
    other = make_run(tmp_path / "three", evaluate__accuracy=[rows[0] | {"top1": 0.5}, rows[1]])
    assert [line.run for line in accuracy_lines(open_runs([first, other]))] == [0, 0, 1, 1]


def test_equal_recipes_are_said_to_be_equal(tmp_path: Path) -> None:
    _, page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"), out=tmp_path / "report.html")
    assert "The recipes are the same." in page.words


def test_a_bare_run_still_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"version": 1, "stages": {}}', encoding="utf-8")
    text, page = page_of(tmp_path / "run", out=tmp_path / "report.html")
    assert (
        "Not in this run: accuracy, per-layer SQNR, coverage, loss curves, images, recipe, environment." in page.words
    )
    assert "<svg" not in text


def test_parts_without_data_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluate__sqnr=None, quantize__units=[])
    _, page = page_of(run, out=tmp_path / "report.html")
    assert "Not in this run: per-layer SQNR, loss curves." in page.words
    assert page.row("fc")[0] == "fc" and "Reconstruction" not in page.words


def test_layers_left_in_float_are_shown_with_the_reason(tmp_path: Path) -> None:
    coverage = [{"name": "fc", "kind": "Linear", "parameters": 10, "macs": 10, "reason": "left out by the scheme"}]
    _, page = page_of(make_run(tmp_path / "run", quantize__coverage=coverage), out=tmp_path / "report.html")
    row = page.row("fc")
    assert row[4:6] == ["float", "float"] and row[-1] == "left out by the scheme"
    assert page.row(LAYERS[0])[4:6] == ["\u2013", "\u2013"]


def test_real_images_that_are_gone_become_a_note(tmp_path: Path) -> None:
    gone = make_run(tmp_path / "gone", data=str(tmp_path / "nowhere.parquet"))
    _, page = page_of(gone, out=tmp_path / "report.html")
    assert "The evaluation images are not shown: " in page.words and "is not on this machine" in page.words
    (tmp_path / "empty").mkdir()
    _, page = page_of(make_run(tmp_path / "none", data=str(tmp_path / "empty")), out=tmp_path / "report.html")
    assert "The evaluation images are not shown: " in page.words


def test_given_images_are_shown_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images__source=real_images(tmp_path / "given"), images__method="given")
    shutil.rmtree(run / "images")
    _, page = page_of(run, out=tmp_path / "report.html")
    assert page.tags.count("img") == 6 and "Calibration images, given" in page.words
    assert "Distance of features 1.75 Effective rank 4.25 of 9" in page.words


def test_agreement_alone_makes_a_page(tmp_path: Path) -> None:
    rows = [{"name": "float"}, {"name": "W4A4", "agreement": 0.9, "kl": 0.1, "count": 9}]
    _, page = page_of(make_run(tmp_path / "run", evaluate__accuracy=rows), out=tmp_path / "report.html")
    assert "90.00 % same answer as float" in page.words and "5 000 calibration images" in page.words


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"is not a run folder: it has no run\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="a run folder is given twice"):
        write_report([run, run], tmp_path / "report.html")
    text = (run / "run.json").read_text(encoding="utf-8")
    (run / "run.json").write_text(text.replace("0.9082", "0.9182"), encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json was changed or damaged since it was written"):
        write_report([run], tmp_path / "report.html")
    (run / "run.json").write_text(text, encoding="utf-8")
    for config in ({"preprocess": {"input_size": [0, 0]}}, {"float_model": 3}):
        write_sealed_json(run / "model" / "quant_config.json", config)
        with pytest.raises(InputError, match=r"quant_config\.json: "):
            write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(OutputError, match="cannot write"):
        write_report([run], tmp_path / "run" / "run.json" / "report.html")


def test_without_matplotlib_the_page_has_no_plots_and_page_and_terminal_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    assert "Plots are left out" not in page_of(run, out=tmp_path / "with.html")[1].words
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = []
    monkeypatch.setattr(QUIET, "warn", told.append, raising=False)
    text, page = page_of(run, out=tmp_path / "report.html")
    assert '<svg role="img"' not in text and page.row("genie_m")[1] == "90.82"
    missing = "matplotlib is not installed; install it with: pip install 'synthquant[report]'"
    assert f"Plots are left out: {missing}" in page.words
    assert told == [f"{tmp_path / 'report.html'} has no plots: {missing}"]
