"""Write one self-contained HTML page about one or several run folders, or about a selection of images.

The page is made from the files of the run folders alone: `run.json` (a `RunRecord`), `recipe.yaml`,
`model/quant_config.json`, `images/` (an `ImageSet`), `selected/` (another, with its `selection.json`) and
`quality.json` (`core.quality_file.Quality`). Everything
else is optional: a part of the record that a run did not write is left out of the page and named there as missing.

Keys of `run.json` that are read, all under `stages.<stage>.metrics` (every key may be absent; units in brackets):

`model`
    `name` str, `num_classes` int | null, `class_names` list[str] | null, `parameters` int.
`images`
    `method` str, `count` int; `source` str for images that were given, in the form `open_images` takes. (The sheet,
    pixel statistics and quality come from `images/manifest.json`.) `diversity`: `of` ("features" or "pixels"), `count`,
    `distance` and `effective_rank` [both may be null] (`Diversity.row()` makes it).
`quantize`
    `method` str and `units`: the fields of a `QuantReport` as JSON (`report.model_dump(mode="json")`); of each unit
    `name`, `loss_start`, `loss_end`, `undecided`, `diverged`, `seconds`, and the sampled curve: `steps` and `losses`.
    `scheme` str (one line, `QuantScheme.describe()`).
    `coverage`: list of `{name, kind, weight_bits, input_bits, parameters, macs, reason, input_kind, output_bits}` in
    execution order; bits are int | null (null: left in float), `macs` for one image, `reason` str | null. Weights,
    matrix products and other operations outside of layers have rows too. `coverage_summary`: the fields of a
    `CoverageSummary`.
`finetune`
    `method` str, `steps`, `best_step`, `held_out_count` int, `diverged` bool, `points`: list of `{step, loss, held_out,
    training, kl}`, see `core.run_metrics.FineTunePoint`.
`evaluate`
    `data` str, the source the accuracy was measured on, in the form `open_images` takes (real images of the sheet).
    `count` int, `set_aside` list of `{name, reason}`, `set_aside_count` int, `changed` object of int.
    `accuracy`: list of rows `{name, top1, top5, interval, agreement, kl, recovery, size_bytes, bit_operations,
    seconds}`, the float network first; `top1`, `top5`, `agreement`, `recovery` are shares 0..1, `interval` is `[low,
    high]` for top1, `kl` [nats]. Any value but `name` may be null. (`Evaluation.row()` and `Cost.row()` make these.)
    `sqnr`: list of rows `{name, weights, activations, alone, cumulative}` [dB] in execution order, null where nothing
    is quantized or no error was made. (`SqnrRow.row()` makes these.)

Also read: `seed`, `version`, `environment`, `recipe`, and `status`, `seconds`, `peak_memory_bytes` of every stage.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from synthquant.core import formatting
from synthquant.core.advice import (
    Advice,
    LayerAdvice,
    about_held_out,
    about_layers,
    about_rounding,
    about_selection,
    about_training,
    as_option,
    held_out_in_words,
    layers_setting,
)
from synthquant.core.errors import InputError, OutputError
from synthquant.core.files import write_text
from synthquant.core.progress import QUIET, Progress
from synthquant.core.run_metrics import AccuracyRow, CoverageRow, SelectMetrics, SqnrRow
from synthquant.core.settings import parse_settings
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import MANIFEST_NAME
from synthquant.data.preprocess import Preprocess
from synthquant.data.sources import open_images
from synthquant.diffusion.trajectory import is_trajectory, open_trajectory
from synthquant.models.class_labels import Classes, in_classes_of
from synthquant.report import figures
from synthquant.report.quality import QualitySection, comparison_section, quality_section
from synthquant.report.run_files import RunFiles, open_runs
from synthquant.report.selection import SelectionSection, is_selection, selection_section
from synthquant.report.sheet import Sheet, make_sheet
from synthquant.report.side_by_side import accuracy_axis, accuracy_lines, differences, place_on

_BEFORE_UNIT = re.compile(r"(?<=\d) (?!to )")
_KINDS = {
    "black": "Black",
    "constant": "Constant",
    "nan": "NaN",
    "duplicate": "Duplicate",
    "outside": "Far outside 0..1",
    "saturated": "Saturated",
}


@dataclass(frozen=True)
class LayerRow:
    """One line of the layer table: coverage and SQNR of the layer, either of which may be missing."""

    name: str
    coverage: CoverageRow | None
    sqnr: SqnrRow | None


@dataclass
class RunSection:
    """All that the page shows about one run."""

    run: RunFiles
    anchor: str
    synthetic: Sheet | None = None
    selection: SelectionSection | None = None
    real: Sheet | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loss_figure: Markup = field(default_factory=Markup)
    tuning_figure: Markup = field(default_factory=Markup)
    quality: QualitySection | None = None
    sqnr_figure: Markup = field(default_factory=Markup)
    bits_figure: Markup = field(default_factory=Markup)
    layers: list[LayerRow] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)
    worst: list[LayerAdvice] = field(default_factory=list)
    worst_setting: str = ""
    """That changes the worst layers as advised."""


def write_report(runs: Sequence[Path | str], out: Path | str, progress: Progress = QUIET) -> Path:
    """Write the page about `runs`, or about one image set or selection of images, to the file `out`, and return `out`.

    Reads only files of the run folders and, for the sheet of real images, the evaluation data named there; what cannot
    be read of the latter is said on the page. Without matplotlib the page has no plots and says so, and so does
    `progress`.

    Raises:
        InputError: no run folder, not a run folder, images beside something else, or a table of `run.json` or
            `selection.json` with a wrong value.
        OutputError: `out` cannot be written.
    """
    folders, out = [Path(folder) for folder in runs], Path(out)
    require_page(out)
    selections = [folder for folder in folders if is_selection(folder) and not (folder / "run.json").is_file()]
    sets = [folder for folder in folders if (folder / MANIFEST_NAME).is_file() and folder not in selections]
    if not sets and not figures.available():
        progress.warn(f"{out} has no plots: {figures.NO_PLOTS}")
    if selections:
        if len(folders) > 1:
            raise InputError(f"{selections[0]} is a selection of images; a report shows runs, or one selection alone")
        write_text(out, render_selection(selection_section(folders[0], (), "selection"), folders[0].name))
        return out
    if sets:
        if len(folders) > 1:
            raise InputError(f"{sets[0]} is an image set; a report shows runs, or one image set alone")
        write_text(out, render_images(ImageSet.open(folders[0]), folders[0].name))
        return out
    opened = open_runs(folders)
    write_text(out, render_report([_section(run, f"run-{index + 1}") for index, run in enumerate(opened)]))
    return out


def require_page(out: Path) -> None:
    """Raise `OutputError` unless the name is one of a page."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{out} must end in .html: it is a page that a browser opens")


def render_report(sections: Sequence[RunSection]) -> str:
    """Return the page as HTML text; the same sections give the same text."""
    environment = _environment("" if figures.available() else figures.NO_PLOTS)
    runs = [section.run for section in sections]
    comparison = Markup()
    if len(runs) > 1:
        comparison = figures.compare_cumulative({run.label: run.sqnr for run in runs if run.sqnr}, "compare")
    page = environment.get_template("page.html.jinja").render(
        sections=sections,
        comparison=comparison,
        differences=differences(runs),
        accuracy=accuracy_lines(runs),
        axis=accuracy_axis(runs),
        metric_names=list(dict.fromkeys(name for run in runs for row in run.accuracy for name in row.metrics)),
    )
    return formatting.printable(page)


def write_comparison(found: dict[str, Any], out: Path, progress: Progress = QUIET) -> Path:
    """Write the page about a comparison of image sets, as `synthquant.compare` returns it, and return `out`.

    Images of the same seed stand side by side, as far as their sets are still there. Without matplotlib the page has no
    plots and says so, and so does `progress`.

    Raises:
        InputError: `found` is no comparison.
        OutputError: `out` cannot be written.
    """
    require_page(out)
    section = comparison_section(found, progress)
    write_text(out, render_comparison(section))
    return out


def render_comparison(section: QualitySection) -> str:
    """Return the page about a comparison as HTML text."""
    environment = _environment("" if figures.available() else figures.NO_PLOTS)
    title = " beside ".join(reversed(section.names))
    page = environment.get_template("comparison_page.html.jinja").render(section=section, title=title)
    return formatting.printable(page)


def render_images(images: ImageSet, title: str) -> str:
    """Return the page about an image set as HTML text; raises `DataError` if none of the images shown can be read."""
    manifest = images.manifest.model_dump(mode="json")
    page = _environment("").get_template("images_page.html.jinja")
    text = page.render(
        title=title,
        shown=make_sheet(images, None, images.manifest.class_names or ()),
        manifest=manifest,
        problems=_problems(manifest),
        settings=yaml.safe_dump(manifest["settings"], sort_keys=False, allow_unicode=True),
    )
    return formatting.printable(text)


def render_selection(section: SelectionSection, title: str) -> str:
    """Return the page about a selection alone as HTML text."""
    environment = _environment("" if figures.available() else figures.NO_PLOTS)
    page = environment.get_template("selection_page.html.jinja").render(section=section, title=title)
    return formatting.printable(page)


@cache
def _environment(no_plots: str) -> Environment:
    """The templates, which are compiled once; `no_plots` stands where figures would."""
    environment = Environment(
        loader=PackageLoader("synthquant.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "signed_percent", "number", "significant", "count", "size", "quantity", "duration"):
        environment.filters[name] = _unbroken(getattr(formatting, name))
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["cell"] = _cell
    environment.filters["as_option"] = as_option
    environment.filters["held_out_in_words"] = held_out_in_words
    environment.globals["layers_setting"] = layers_setting
    environment.globals["columns"] = formatting.ACCURACY_COLUMNS
    environment.globals["span"] = place_on
    environment.globals["no_plots"] = no_plots
    script = files("synthquant.report").joinpath("sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    return environment


def _cell(row: AccuracyRow, name: str) -> str:
    """What stands in a column of the accuracy table."""
    value = getattr(row, name)
    return formatting.MISSING if value is None else _unbroken(formatting.ACCURACY_COLUMNS[name].form)(value)


def _unbroken(form: Callable[..., str]) -> Callable[..., str]:
    """The same with thin spaces that no line breaks at, between a number and its unit."""
    return lambda *args, **kwargs: _BEFORE_UNIT.sub("\u202f", form(*args, **kwargs))


def _section(run: RunFiles, anchor: str) -> RunSection:
    section = RunSection(run, anchor)
    _add_images(section)
    if run.selected_folder is not None:
        section.selection = selection_section(run.selected_folder, run.class_names, f"{anchor}-selection")
    if run.quality is not None:
        section.quality = quality_section(run.quality, f"{anchor}-quality")
    section.loss_figure = figures.loss_curves(run.units, f"{anchor}-loss")
    section.tuning_figure = figures.fine_tuning(run.finetune.points or (), f"{anchor}-finetune")
    section.sqnr_figure = figures.layer_sqnr(run.sqnr, f"{anchor}-sqnr")
    section.bits_figure = figures.layer_bits([row for row in run.coverage if row.macs != 0], f"{anchor}-bits")
    coverage = {row.name: row for row in run.coverage}
    sqnr = {row.name: row for row in run.sqnr}
    section.layers = [LayerRow(name, coverage.get(name), sqnr.get(name)) for name in {**coverage, **sqnr}]
    section.advice = _advice(run)
    section.worst = about_layers(run.sqnr, run.coverage, run.record.recipe)
    if section.worst:
        section.worst_setting = layers_setting(section.worst, run.record.recipe)
    return section


def _advice(run: RunFiles) -> list[Advice]:
    """What to do about a run as a whole."""
    quantize = run.record.recipe.get("quantize")
    iterations = quantize.get("iterations") if isinstance(quantize, dict) else None
    tuned = run.finetune
    found = (
        about_rounding(run.units, iterations if isinstance(iterations, int) else None),
        about_selection(run.record.metrics("select", SelectMetrics).bn_distance),
        about_held_out(run.held_out),
        about_training(tuned.points or (), tuned.best_step, tuned.held_out_count),
    )
    return [advice for advice in found if advice is not None]


def _add_images(section: RunSection) -> None:
    """Fill in both sheets; images that are not there any more become a note."""
    run = section.run
    classes: tuple[int, ...] = ()
    given = run.text("images", "source")
    recorded = run.trajectory_folder or (Path(given) if given is not None and is_trajectory(given) else None)
    if recorded is not None:
        section.notes.append(_about_trajectory(recorded))
    elif run.images_folder is not None:
        images = ImageSet.open(run.images_folder)
        section.manifest = images.manifest.model_dump(mode="json")
        section.problems = _problems(section.manifest)
        section.synthetic = make_sheet(images, _preprocess(run), run.class_names)
    elif given is not None:
        section.synthetic = _sheet_of(section, given, "calibration", classes)
    if section.synthetic is not None:
        classes = section.synthetic.classes
    source = run.text("evaluate", "data")
    if source is not None:
        section.real = _sheet_of(section, source, "evaluation", classes)


def _about_trajectory(folder: Path) -> str:
    """What a denoiser was quantized with, in words; raises `DataError` if the folder is not whole."""
    found = open_trajectory(folder).manifest
    guidance = f" with guidance {found.guidance:g}, each without and with its condition" if found.repeats > 1 else ""
    return (
        f"Quantized with {found.rows} rows that {found.source} sampled of itself: {len(found.seeds)} images at"
        f" {len(found.steps)} of {len(found.timesteps)} steps of {found.scheduler['class']}{guidance}."
    )


def _sheet_of(section: RunSection, source: str, what: str, classes: tuple[int, ...]) -> Sheet | None:
    """The sheet of images that are kept elsewhere; if they cannot be had, nothing, and a note that says why."""
    run = section.run
    if not source.startswith("bundled/") and not Path(source).expanduser().exists():
        # a name on the hub: a report does not download anything
        section.notes.append(f"The {what} images are not shown: {source} is not on this machine.")
        return None
    try:
        images = in_classes_of(open_images(source), Classes(run.label, run.class_names, None), source, None)
        return make_sheet(images, _preprocess(run), run.class_names, classes=classes)
    except InputError as error:
        section.notes.append(f"The {what} images are not shown: {error}")
        return None


def _preprocess(run: RunFiles) -> Preprocess | None:
    values = run.checkpoint.preprocess
    if values is None:
        return None
    try:
        return parse_settings(Preprocess, values, "preprocess")
    except InputError as error:
        raise InputError(f"{run.folder / 'model' / 'quant_config.json'}: {error}") from error


def _problems(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """Kind and number of the images that the quality check found fault with."""
    quality = manifest.get("quality") or {}
    counted = [(_KINDS.get(kind, str(kind)), len(found)) for kind, found in quality.items() if isinstance(found, list)]
    return [*counted, ("Set aside", len(manifest.get("set_aside") or []))]
