"""Markup in any string of a run or a selection is text on the page, in templates, figures and attributes alike."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.report.run_folders import make_run
from tests.report.test_html import Page
from tests.small_networks import small_float_model, small_images

from synthquant.core.files import SEAL, read_json, write_json, write_sealed_json, write_text
from synthquant.core.rng import Rng
from synthquant.core.run_metrics import SqnrRow
from synthquant.report import figures
from synthquant.report.html import write_report
from synthquant.select import Energy, write_selection

MARKUP = (
    "\"'><script>alert(1)</script></svg></style></title><img src=x onerror=alert(1)> &lt;&amp;javascript:alert(1)"
    '--> ]]> {{ 7 * 7 }} id="x" url(#x) #010203 \ud83d\x07\x00 \u732b $x_1$ '
)
SHOWN = MARKUP.replace("\ud83d\x07\x00", "\ufffd\ufffd\ufffd")
# Values of a fixed set, or that name a file that is there: nothing else is accepted for them.
_FIXED = {"status", "dtype", "framing", "sha256", "fingerprint", "model_fingerprint", "kind_of_hash"}


class Attributes(Page):
    """A page that also collects every attribute, and what the page is built of outside its figures."""

    def __init__(self, text: str) -> None:
        self.attributes: list[tuple[str, str]] = []
        self.structure: list[tuple[str, ...]] = []
        super().__init__(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if "svg" not in self.open:
            self.structure.append((tag, *(name for name, _ in attrs)))
        super().handle_starttag(tag, attrs)


def filled(value: Any, text: str, number: count[int], key: str = "") -> Any:
    """The value with `text` in place of every text, and in the keys of tables whose keys are shown."""
    if isinstance(value, str):
        return value if key in _FIXED else f"{text}{next(number)}"
    if isinstance(value, list):
        return [filled(entry, text, number, key) for entry in value]
    if isinstance(value, dict):
        free = key in ("environment", "recipe", "settings")
        return {
            f"{text}{next(number)}" if free else name: filled(entry, text, number, name)
            for name, entry in value.items()
        }
    return value


def fill(run: Path, text: str) -> Path:
    """Rewrite the files of a run with `text` in every string, their hashes of themselves included."""
    number = count()
    for name in ("run.json", "images/manifest.json", "selected/manifest.json", "selected/selection.json"):
        fields = read_json(run / name)
        sealed = fields.pop(SEAL, None) is not None
        parts = {"parts": fields["parts"]} if "parts" in fields else {}
        # Settings, such as those of a manifest, hold no characters that are none.
        readable = text.replace("\ud83d", "\x07").replace("\x00", "\x07") if "manifest" in name else text
        (write_sealed_json if sealed else write_json)(run / name, filled(fields, readable, number) | parts)
    write_text(run / "recipe.yaml", text.replace("\ud83d", "\x07"))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with every part that a page can have: sheets, units, layers, a selection, images set aside."""
    run = make_run(tmp_path / "run", data="nowhere.parquet")
    pool = small_images(20)
    write_selection(
        run / "selected", pool, small_float_model(tmp_path), [Energy(keep=6)], Rng(0), real=small_images(7, seed=5)
    )
    return run


def test_markup_in_every_string_of_a_run_is_text(run: Path, tmp_path: Path) -> None:
    clean, page = (
        Attributes(write_report([fill(run, text)], tmp_path / "page.html").read_text(encoding="utf-8"))
        for text in ("word ", MARKUP)
    )
    assert page.structure == clean.structure
    assert set(page.tags) == set(clean.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in clean.attributes}
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    # Names, the environment, captions of images, the title of a figure: all is there as it was written.
    assert "".join(page.text).count(SHOWN) == "".join(clean.text).count("word ") > 50
    for name in ("title", "alt", "aria-label"):
        values = [value for key, value in page.attributes if key == name and SHOWN in value]
        assert len(values) == len([value for key, value in clean.attributes if key == name and "word " in value]) > 0


def test_a_figure_holds_names_as_text_only() -> None:
    svg = figures.score_histogram([0.0, 0.5, 1.0], [3, 1], [0, 2], MARKUP, "f")
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == f"Histogram of {SHOWN}"
    assert not [element for element in root.iter() if element.tag.rpartition("}")[2] in ("script", "img", "image")]
    drawn = [figures.class_balance([MARKUP, "b"], [4, 4], [2, 1], "f")]
    rows = [SqnrRow(name=MARKUP, cumulative=9.0), SqnrRow(name="fc", cumulative=8.0)]
    drawn.append(figures.compare_cumulative({MARKUP: rows, "other": rows}, "f"))
    drawn.append(figures.batch_norm_gaps([MARKUP, "b"], {MARKUP: [3.0, 0.0]}, "f"))
    for figure in drawn:
        assert SHOWN in [element.text for element in ElementTree.fromstring(figure).iter()]
