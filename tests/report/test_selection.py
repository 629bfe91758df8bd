"""The page about a selection: complete, escaped, the same each time, alone and inside a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tests.report.run_folders import make_run
from tests.report.test_html import Page, assert_only_its_own_script
from tests.small_networks import small_float_model, small_images

from synthquant.core.errors import InputError
from synthquant.core.files import read_sealed_json, write_sealed_json
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.report import figures
from synthquant.report.html import write_report
from synthquant.select import BatchNormSensitivity, Energy, write_selection


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    """Six of twenty images, chosen by two filters, with real images beside; one image is there twice."""
    images = torch.stack([small_images(20)[index].image for index in (*range(19), 0)])
    pool = ImageSet.from_tensors(images, labels=torch.arange(20) % 3).save(tmp_path / "pool")
    filters = [Energy(keep=12), BatchNormSensitivity(keep=0.5)]
    write_selection(
        tmp_path / "chosen", pool, small_float_model(tmp_path), filters, Rng(3), real=small_images(7, seed=5)
    )
    return tmp_path / "chosen"


def page_of(*folders: Path, out: Path) -> tuple[str, Page]:
    text = write_report(folders, out).read_text(encoding="utf-8")
    return text, Page(text)


def test_a_selection_alone(selection: Path, tmp_path: Path) -> None:
    text, page = page_of(selection, out=tmp_path / "page.html")
    assert "6 of 20 images were kept, scored by Network." in page.words
    assert page.row("energy")[3:] == ["20", "12", "60.0"]
    assert page.row("bn_sensitivity")[3:] == ["12", "6", "50.0"]
    assert page.tags.count("img") == 6 + 14
    found = json.loads((selection / "selection.json").read_text())
    pool, kept, real = (page.row(name) for name in ("pool", "kept", "real images"))
    assert [row[1] for row in (pool, kept, real)] == ["20", "6", "7"]
    assert pool[5] == "1" and kept[5] in ("0", "1") and real[5] == "\u2013"
    for row, name in ((pool, "pool"), (kept, "kept"), (real, "real")):
        assert float(row[4]) == pytest.approx(sum(found["batch_norm"][name]), rel=1e-3)
        assert row[2] == ", ".join(f"{value:.3f}" for value in found["pixels"][name]["mean"])
    assert "Of the 3 classes in the pool, between" in page.words
    assert len(re.findall(r'<svg role="img"', text)) == 4  # two scores, gaps, classes
    assert "seed 3" in page.words


def test_the_numbers_are_those_of_the_images(selection: Path) -> None:
    found = json.loads((selection / "selection.json").read_text())
    images = ImageSet.open(selection)
    pixels = torch.stack([images[index].image for index in range(6)]).double() / 255
    assert found["pixels"]["kept"]["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert found["pixels"]["kept"]["std"] == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-5)
    assert images.labels is not None
    assert found["classes"]["kept"] == torch.bincount(images.labels, minlength=3).tolist()
    assert found["classes"]["pool"] == [7, 7, 6]
    for step, count in zip(found["steps"], (12, 6), strict=True):
        assert sum(step["kept_counts"]) == count == step["kept"]
        assert sum(step["rejected_counts"]) == step["entered"] - count
        scores = images.column(step["column"])
        assert step["edges"][0] <= min(scores) and max(scores) <= step["edges"][-1]


def test_the_page_of_a_selection_needs_nothing_else_and_is_the_same_each_time(selection: Path, tmp_path: Path) -> None:
    text, page = page_of(selection, out=tmp_path / "page.html")
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert_only_its_own_script(text, page)
    assert write_report([selection], tmp_path / "again.html").read_text() == text


def test_a_run_shows_its_selection(selection: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, plain = page_of(run, out=tmp_path / "plain.html")
    selection.rename(run / "selected")
    text, page = page_of(run, out=tmp_path / "page.html")
    assert "6 of 20 images were kept" in page.words and "6 of 20" not in plain.words
    assert "Pool of images by genie_d" in page.words and "Calibration images by genie_d" in plain.words
    assert 'id="run-1-selection-score-0-' in text


def test_a_selection_without_labels_real_images_or_batch_norm_filter(tmp_path: Path) -> None:
    pool = ImageSet.from_tensors(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    write_selection(tmp_path / "chosen", pool, small_float_model(tmp_path), [Energy(keep=1.0)], Rng(0))
    text, page = page_of(tmp_path / "chosen", out=tmp_path / "page.html")
    assert page.row("pool")[4:] == ["\u2013", "\u2013"] and page.row("kept")[4:] == ["\u2013", "0"]
    assert "Rejected" not in page.words and "classes" not in page.words
    assert len(re.findall(r'<svg role="img"', text)) == 1


def test_what_comes_from_the_file_is_escaped(selection: Path, tmp_path: Path) -> None:
    path = selection / "selection.json"
    write_sealed_json(path, read_sealed_json(path) | {"model": {"name": "<script>alert(1)</script>"}})
    _, page = page_of(selection, out=tmp_path / "page.html")
    assert page.tags.count("script") == 1 and "<script>alert(1)</script>" in page.words


def test_a_selection_beside_a_run_and_a_damaged_one_are_refused(selection: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a selection of images; a report shows runs, or one selection alone"):
        write_report([selection, make_run(tmp_path / "run")], tmp_path / "page.html")
    path = selection / "selection.json"
    content = read_sealed_json(path)
    content["steps"][0]["entered"] = "many"
    write_sealed_json(path, content)
    with pytest.raises(InputError, match=r"selection.json: steps.0.entered: Input should be a valid integer"):
        write_report([selection], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_many_classes_are_told_not_drawn(selection: Path, tmp_path: Path) -> None:
    path = selection / "selection.json"
    content = read_sealed_json(path)
    content["classes"] = {"pool": [2] * 150, "kept": [1] * 149 + [0]}
    write_sealed_json(path, content)
    text, page = page_of(selection, out=tmp_path / "page.html")
    assert "Of the 150 classes in the pool, between 0% and 50% of the images were kept; 1 classes" in page.words
    assert 'id="selection-classes' not in text


def test_figures_of_a_selection_are_fixed_and_use_the_pages_colours() -> None:
    def draw() -> list[str]:
        return [
            figures.score_histogram([0.0, 0.5, 1.0], [3, 1], [0, 2], "energy@net-1", "f1"),
            figures.class_balance(["a", "b"], [4, 4], [2, 1], "f2"),
            figures.batch_norm_gaps(["bn1", "bn2"], {"pool": [3.0, 0.0], "kept": [0.2, 1.0]}, "f3"),
        ]

    first = draw()
    assert first == draw()
    assert all("#0102" not in figure and "var(--" in figure for figure in first)
