"""`select`: keep what resembles the training data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from synthquant import make
from synthquant.cli import options
from synthquant.cli.output import print_next, print_result
from synthquant.core.device import resolve_device
from synthquant.core.errors import RecipeError
from synthquant.core.files import require_outside
from synthquant.core.overrides import apply_overrides
from synthquant.core.progress import ConsoleProgress
from synthquant.data.sources import open_images
from synthquant.methods import SELECTORS
from synthquant.models.class_labels import classes_of, in_classes_of
from synthquant.models.float_model import ModelSource
from synthquant.models.open import open_model
from synthquant.recipe import SelectSection, SourceSection, expand_filter
from synthquant.select.sequence import require_pool
from synthquant.select.write import selection_metrics

Pool = Annotated[
    str, typer.Argument(metavar="IMAGES", help=options.setting_help(SourceSection, "source"), show_default=False)
]
By = Annotated[
    list[str],
    typer.Option(
        metavar="METHOD:KEEP",
        help=f"One of {', '.join(SELECTORS.names())}, with a share (energy:0.7) or a count (energy:500) to keep; "
        "may be given several times, each chooses from what those before it kept.",
        show_default=False,
    ),
]
Network = Annotated[
    str,
    typer.Option("--model", metavar="MODEL", help=options.setting_help(ModelSource, "source"), show_default=False),
]
Real = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Real images that the report puts beside the pool; they do not change the choice."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help=options.setting_help(SelectSection, "batch_size"))]


def select(
    images: Pool,
    model: Network,
    by: By,
    out: options.ImagesOut,
    per_class: Annotated[bool, typer.Option("--per-class", help="KEEP is meant for each class by itself.")] = False,
    data: Real = None,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    batch_size: BatchSize = options.SELECT_BATCH_SIZE,
    weights: options.Weights = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    ray: options.RayAddress = None,
    ray_workers: options.RayCount = None,
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Keep the images that resemble what a network was trained on; the same command again reads what is there.

    --set takes any field of a filter, for example --set energy.temperature=2; `synthquant show METHOD` lists them. It
    also takes table_gib, the GiB of memory for sums of all images, beyond which they go to a temporary file.
    """
    of_pass = [text for text in settings or [] if text.partition("=")[0].strip() in ("batch_size", "table_gib")]
    filters = _filters(by, per_class, [text for text in settings or [] if text not in of_pass])
    values = apply_overrides({"by": filters, "batch_size": batch_size}, of_pass)
    section = SelectSection.parse(values, "command line")
    require_outside(out, (images, data))
    place = resolve_device(device)
    workers = options.workers(ray, ray_workers)
    pool = open_images(images, max_pixels=max_pixels)
    require_pool(section.build(), pool)
    real = None if data is None else open_images(data, max_pixels=max_pixels)
    source = options.model_source(
        model, weights=weights, input_size=input_size, mean=mean, std=std, num_classes=num_classes
    )
    float_model = open_model(source, device=place, progress=ConsoleProgress())
    progress = ConsoleProgress()
    pool = in_classes_of(pool, classes_of(float_model), images, progress)
    kept = make.select(pool, float_model, section, seed, out, progress, real=real, ray=workers)
    metrics = selection_metrics(out)
    if json:
        counts = {"count": len(kept), "pool": len(pool), "rejected": len(pool) - len(kept)}
        print_result({"out": str(out), **counts, "fingerprint": kept.fingerprint, **metrics}, device)
        return
    for step in metrics["filters"]:
        print(f"{step['method']:<18}{step['kept']:>8} of {step['entered']}")
    if metrics["bn_distance"]:
        distances = ", ".join(f"{name} {value:.4g}" for name, value in metrics["bn_distance"].items())
        print(f"distance to the batch norms: {distances}")
    print(f"{len(kept)} of {len(pool)} images in {out}")
    given: dict[str, object] = {"--weights": weights, "--input-size": input_size, "--mean": mean, "--std": std}
    given |= {"--num-classes": num_classes}
    print_next("quantize", model, {"--images": out, **given, "--out": "RUN"})


def _filters(by: list[str], per_class: bool, settings: list[str]) -> list[dict[str, Any]]:
    """The filters as a recipe writes them; a setting goes to the filter it names, or to all if it names none."""
    filters = [{**expand_filter(text, "--by"), **({"per_class": True} if per_class else {})} for text in by]
    for text in settings:
        path = text.partition("=")[0].strip()
        method, dot, _ = path.partition(".")
        places = [place for place, values in enumerate(filters) if not dot or values["method"] == method]
        if not places:
            raise RecipeError(f"--set {text!r}: no --by names {method!r}; write --set METHOD.FIELD=VALUE")
        for place in places:
            filters[place] = apply_overrides(filters[place], [text[len(method) + 1 :] if dot else text])
    return filters
