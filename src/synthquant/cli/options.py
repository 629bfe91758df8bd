"""Options that several commands share; their help is the docstring of the setting they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from synthquant.core.errors import RecipeError
from synthquant.core.settings import LARGEST_INT, Settings, parse_settings
from synthquant.data.codec import MOST_PIXELS
from synthquant.distributed.ray_workers import RayWorkers
from synthquant.evaluate.section import EvaluateSection
from synthquant.methods import FINE_TUNERS, QUANTIZERS, SYNTHESIZERS
from synthquant.models.float_model import ModelSource, Task
from synthquant.recipe import QuantizeSection, Recipe, SelectSection, SourceSection, SynthesizeSection
from synthquant.targets import target_names


def setting_help(settings: type[Settings], field: str) -> str:
    """Return the docstring of a setting as the help of an option."""
    return " ".join((settings.model_fields[field].description or "").split()).replace("`", "")


# Defaults have one source, the settings; here they only get names.
COUNT: int = SynthesizeSection.model_fields["count"].default
SELECT_BATCH_SIZE: int = SelectSection.model_fields["batch_size"].default
MAX_PIXELS: int = SourceSection.model_fields["max_pixels"].default
DEVICE: str = Recipe.model_fields["device"].default
SEED: int = Recipe.model_fields["seed"].default

Model = Annotated[str, typer.Argument(metavar="MODEL", help=setting_help(ModelSource, "source"), show_default=False)]
Weights = Annotated[str | None, typer.Option(metavar="FILE", help=setting_help(ModelSource, "weights"))]
InputSize = Annotated[
    str | None, typer.Option(metavar="H,W", help=f"{setting_help(ModelSource, 'input_size')} One number for a square.")
]
Mean = Annotated[str | None, typer.Option(metavar="R,G,B", help=setting_help(ModelSource, "mean"))]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help=setting_help(ModelSource, "std"))]
NumClasses = Annotated[int | None, typer.Option(help=setting_help(ModelSource, "num_classes"))]
ModelTask = Annotated[Task | None, typer.Option(help=setting_help(ModelSource, "task"), show_default=False)]

QuantizedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The network that was quantized, as it was named then: where that is FILE.py:FUNCTION, it may run.",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Run the Python file that a run, checkpoint or exported file names as its network; know it first.",
    ),
]

OptionalImages = Annotated[
    str | None,
    typer.Option(
        metavar="IMAGES",
        help=f"{setting_help(SourceSection, 'source')} Only a method that makes its own can do without.",
    ),
]
Data = Annotated[str, typer.Option(metavar="DATA", help=setting_help(EvaluateSection, "data"), show_default=False)]
OptionalData = Annotated[str | None, typer.Option(metavar="DATA", help=setting_help(EvaluateSection, "data"))]
UserMetric = Annotated[
    str | None, typer.Option("--metric", metavar="FILE.py:NAME", help=setting_help(EvaluateSection, "metric"))
]
Limit = Annotated[int | None, typer.Option(min=1, help=setting_help(EvaluateSection, "limit"))]
MaxPixels = Annotated[int, typer.Option(min=1, max=MOST_PIXELS, help=setting_help(SourceSection, "max_pixels"))]
SynthesisMethod = Annotated[str, typer.Option("--method", help=f"One of {', '.join(SYNTHESIZERS.names())}.")]
FineTuneMethod = Annotated[str, typer.Option("--method", help=f"One of {', '.join(FINE_TUNERS.names())}.")]
QuantMethod = Annotated[str, typer.Option("--method", help=f"One of {', '.join(QUANTIZERS.names())}.")]

Target = Annotated[
    str | None, typer.Option(help=f"{setting_help(QuantizeSection, 'target')} One of {', '.join(target_names())}.")
]
Count = Annotated[int, typer.Option(min=1, help=setting_help(SynthesizeSection, "count"))]
Device = Annotated[str, typer.Option(help=setting_help(Recipe, "device"))]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_INT, help=setting_help(Recipe, "seed"))]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else there.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change a setting; may be given several times.", show_default=False
    ),
]
ImagesOut = Annotated[Path, typer.Option(metavar="IMAGES", help="Folder of the image set.", show_default=False)]
RunOut = Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run.", show_default=False)]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|local",
        help="Spread the work over the workers of a Ray cluster: drawing (text_to_image, self_sampling), or scoring.",
    ),
]
RayCount = Annotated[
    int | None, typer.Option(min=1, help="Workers on Ray [one for each GPU; without GPUs one for each machine].")
]


def workers(address: str | None, count: int | None) -> RayWorkers | None:
    """Return the workers of the cluster at `address`, if there is one. Raises `RecipeError` for a count alone."""
    if address is None and count is not None:
        raise RecipeError("--ray-workers needs --ray ADDRESS, or --ray local")
    return None if address is None else RayWorkers(address, count)


def require_not_given(why: str, values: Mapping[str, object]) -> None:
    """Raise `RecipeError` naming the options, whose names stand without dashes, that were given and change nothing."""
    given = [f"--{name}" for name, value in values.items() if value is not None]
    if given:
        raise RecipeError(
            f"{why}: {', '.join(given)} would change nothing; leave {'it' if len(given) == 1 else 'them'} out"
        )


def model_section(source: str, **given: str | int | None) -> dict[str, Any]:
    """Return the `model` section of a recipe from the model options, by the names of settings; none was not given."""
    values: dict[str, Any] = {"source": source}
    for name, value in given.items():
        if name == "input_size" and isinstance(value, str):
            size = _numbers("--input-size", value, (1, 2), int)
            values[name] = size * 2 if len(size) == 1 else size
        elif name in ("mean", "std") and isinstance(value, str):
            values[name] = _numbers(f"--{name}", value, (), float)
        elif value is not None:
            values[name] = value
    return values


def model_source(source: str, **given: str | int | None) -> ModelSource:
    """Return the network that the model options name."""
    return parse_settings(ModelSource, model_section(source, **given), "command line")


def _numbers(option: str, text: str, counts: tuple[int, ...], kind: type[int] | type[float]) -> list[float]:
    try:
        values = [kind(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        values = []
    if not values or (counts and len(values) not in counts):
        wanted = f"{' or '.join(map(str, counts))} numbers" if counts else "a number for each channel,"
        raise RecipeError(f"{option} {text!r}: give {wanted} separated by commas")
    return list(values)
