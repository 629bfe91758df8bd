"""The part of the page about drawn images: its numbers, pairs side by side, the growth of the error, what is gone."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.report.run_folders import make_run
from tests.report.test_html import Page

from synthquant.core.errors import InputError, OutputError
from synthquant.core.quality_file import as_quality, read_quality, write_quality
from synthquant.data.image_set import ImageSet
from synthquant.report.html import write_comparison, write_report
from synthquant.report.quality import quality_section


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.25, "high": value + 0.125}


def comparison(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "images": str(root / "w4a8" / "images"),
        "reference": "real",
        "baseline": str(root / "float" / "images"),
        "features": "zoo/<net>, its last (64 numbers)",
        "count": 40,
        "reference_count": 50,
        "frechet": estimate(7.125),
        "kernel": {"value": -0.5, "std": 0.25, "subsets": 100, "subset_size": 40},
        "precision": estimate(0.75),
        "recall": estimate(0.5),
        "class_agreement": {"images": estimate(0.875), "reference": None, "difference": None},
        "same_seed": {
            "pairs": 40,
            "identical": 3,
            "psnr": estimate(31.5),
            "ssim": estimate(0.95),
            "feature_distance": estimate(0.375),
            "same_class": estimate(0.85),
        },
        "relative": {"baseline": estimate(6.5), "ratio": estimate(1.1), "paired": True},
        "step_errors": [{"step": step, "timestep": 900 - step, "error": estimate(1 + step)} for step in range(5)],
        "seed": 3,
        **changes,
    }


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Images of one colour each, which tells them apart; the seeds of one set come in another order."""
    colours = torch.arange(8, dtype=torch.uint8).mul(30).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    order = [5, 2, 0, 7, 1, 3, 6, 4]
    for name, places in (("float", list(range(8))), ("w4a8", order)):
        images = colours[places] + (0 if name == "float" else 1)
        ImageSet.from_tensors(images.contiguous(), columns={"seed": places}).save(tmp_path / name / "images")
    return tmp_path


def colour(uri: str) -> int:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return int(image.convert("RGB").getpixel((3, 3))[0])


def test_pairs_of_the_same_seed_stand_side_by_side_the_float_one_left(sets: Path) -> None:
    section = quality_section(as_quality(comparison(sets), "x"), "q")
    assert section.names == ("float/images", "w4a8/images") and not section.notes
    assert [(colour(a.uri), colour(b.uri)) for a, b in section.pairs] == [
        (30 * seed, 30 * seed + 1) for seed in range(8)
    ]
    assert section.pairs[5][0].caption == "seed 5"


def test_the_page_of_a_comparison_shows_every_number(sets: Path, tmp_path: Path) -> None:
    out = write_comparison(comparison(sets), tmp_path / "page.html")
    text = out.read_text()
    page = Page(text)
    cells = {row[0]: row[1:] for row in page.cells if len(row) == 4}
    assert cells["Frechet distance"][:2] == ["7.12", "6.88 to 7.25"]
    assert cells["as a share of that"][:2] == ["1.10", "0.85 to 1.23"] or cells["as a share of that"][0] == "1.10"
    assert cells["Kernel distance"][0] == "-0.500" and "100 subsets of 40" in cells["Kernel distance"][2]
    assert cells["Precision %"][0] == "75.00" and cells["In their class %"][0] == "87.50"
    assert cells["PSNR [dB]"][0] == "31.50" and "3 of them identical" in text
    assert "zoo/&lt;net&gt;" in text and "<net>" not in text
    assert page.tags.count("img") == 16 and "comparison-growth" in text
    assert out.read_bytes() == write_comparison(comparison(sets), tmp_path / "again.html").read_bytes()


def test_what_a_comparison_lacks_is_left_out(sets: Path, tmp_path: Path) -> None:
    bare = comparison(sets, baseline=None, class_agreement=None, same_seed=None, relative=None, step_errors=[])
    text = write_comparison(bare, tmp_path / "page.html").read_text()
    assert "same seed" not in text and "Same class" not in text and "share of that" not in text
    assert "growth" not in text and "Frechet distance" in text


def test_images_that_are_gone_become_a_note(sets: Path, tmp_path: Path) -> None:
    shutil.rmtree(sets / "float")
    text = write_comparison(comparison(sets), tmp_path / "page.html").read_text()
    assert "Pairs of the same seed are not shown" in text and "is not on this machine" in text


def test_the_report_of_a_run_has_what_was_kept_with_it(sets: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = write_report([run], tmp_path / "page.html").read_text()
    write_quality(run, comparison(sets))
    found = read_quality(run)
    assert found is not None and found.relative is not None and found.relative.ratio.value == 1.1
    text = write_report([run], tmp_path / "page.html").read_text()
    assert "Image quality" in text and "Image quality" not in before
    Page(text)


def test_a_file_that_was_changed_or_is_none_is_one_line(sets: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_quality(run, comparison(sets))
    path.write_text(path.read_text().replace("7.125", "1.125"))
    with pytest.raises(InputError, match="was changed or damaged"):
        write_report([run], tmp_path / "page.html")
    write_quality(run, comparison(sets) | {"version": 9})
    with pytest.raises(InputError, match="has format version 9"):
        read_quality(run)
    with pytest.raises(InputError, match=r"is not what a comparison found: frechet\.value"):
        write_comparison(comparison(sets, frechet={"value": "x", "low": 0, "high": 0}), tmp_path / "page.html")
    with pytest.raises(OutputError, match=r"must end in \.html"):
        write_comparison(comparison(sets), tmp_path / "page.txt")
    assert read_quality(tmp_path) is None
    assert json.loads(path.read_text())["version"] == 9
