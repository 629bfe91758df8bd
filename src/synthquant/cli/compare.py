"""`compare`: drawn images beside reference images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthquant import compare as comparisons
from synthquant.cli import options
from synthquant.cli.output import print_json
from synthquant.core.formatting import count
from synthquant.core.overrides import apply_overrides
from synthquant.core.progress import ConsoleProgress
from synthquant.core.quality_file import as_quality
from synthquant.core.settings import parse_settings
from synthquant.evaluate.image_quality import QualitySettings
from synthquant.evaluate.torch_metrics import INCEPTION
from synthquant.recipe import SourceSection
from synthquant.report.html import require_page, write_comparison

_SOURCE = options.setting_help(SourceSection, "source")
Images = Annotated[str, typer.Argument(metavar="IMAGES", help=f"Drawn images. {_SOURCE}", show_default=False)]
Reference = Annotated[
    str,
    typer.Argument(metavar="REFERENCE", help="Real images, or those of the float pipeline.", show_default=False),
]
Baseline = Annotated[
    str | None,
    typer.Option(
        metavar="IMAGES",
        help="Images of the float pipeline where REFERENCE is real: the distance is put in relation to theirs, and"
        " pairs of the same seed are with them.",
    ),
]
Features = Annotated[
    str,
    typer.Option(
        metavar=f"MODEL|{INCEPTION}",
        help=f"A classifier, of which the input of the last layer is taken; or {INCEPTION}, for the usual FID.",
    ),
]


def compare(
    images: Images,
    reference: Reference,
    baseline: Baseline = None,
    features: Features = comparisons.DEFAULT_FEATURES,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page with the numbers, and pairs side by side.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Keep the result in this run's folder, for its report and model card."),
    ] = None,
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Compare drawn images with reference images: FID, KID, precision and recall, and pairs of the same seed.

    --set takes resamples, subsets, subset_size, neighbours and batch_size, for example --set resamples=1000.
    """
    how = parse_settings(QualitySettings, apply_overrides({}, settings or []), "command line")
    if out is not None:
        require_page(out)
    if run is not None:
        comparisons.require_run(run)
    progress = ConsoleProgress()
    found = comparisons.compare(
        images,
        reference,
        baseline=baseline,
        features=features,
        settings=how,
        max_pixels=max_pixels,
        device=device,
        seed=seed,
        progress=progress,
    )
    if run is not None:
        comparisons.keep_with_run(found, run)
    if out is not None:
        write_comparison(found, out, progress)
    print_json(found) if json else _print(found)


def _print(found: dict[str, Any]) -> None:
    print(found["features"])
    print(f"{count(found['count'])} images, {count(found['reference_count'])} of {found['reference']}")
    for one in as_quality(found, "the comparison").measures():
        beside = "; ".join(filter(None, (one.interval, one.remark)))
        print(f"{one.name:<22}{one.value}" + (f" ({beside})" if beside else ""))
