"""`finetune`: train the quantized network of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthquant import pipeline
from synthquant.cli import options
from synthquant.cli.output import print_run
from synthquant.core.errors import InputError
from synthquant.core.overrides import apply_overrides
from synthquant.core.processes import launched
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import RunRecord
from synthquant.core.run_folder import RECORD_NAME, images_of
from synthquant.core.settings import parse_settings
from synthquant.models.float_model import RecordedSource
from synthquant.recipe import Recipe

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
Images = Annotated[
    str | None, typer.Option(metavar="IMAGES", help="Images to train on; without it those the run quantized with.")
]
Data = Annotated[
    str | None, typer.Option(metavar="DATA", help="Labelled images to measure on; without it those of the run.")
]


def finetune(
    run: Run,
    out: options.RunOut,
    method: options.FineTuneMethod = "distill",
    images: Images = None,
    data: Data = None,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    model: options.QuantizedModel = None,
    trust_code: options.TrustCode = False,
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Train a run's quantized network with the float network as its teacher; the result is a run of its own.

    --set takes any field of the method, for example --set iterations=5000; `synthquant show distill` lists them.
    """
    recorded = RunRecord.load(run / RECORD_NAME).recipe
    where = str(run / RECORD_NAME)
    source = parse_settings(RecordedSource, _section(recorded, "model", where), where)
    values = {
        "model": source.confirmed(where, model=model, trust_code=trust_code).model_dump(mode="json"),
        "images": _images(run, recorded, where) if images is None else {"source": images, "max_pixels": max_pixels},
        "quantize": {**_section(recorded, "quantize", where), "run": str(run)},
        "finetune": apply_overrides({"method": method}, settings or []),
        "evaluate": recorded.get("evaluate") if data is None else {"data": data, "max_pixels": max_pixels},
        "memory": recorded.get("memory", {}),
        "device": device,
        "seed": seed,
    }
    record = pipeline.run(Recipe.parse(values, "command line"), out, ConsoleProgress())
    if launched().is_first:
        print_run(out, record, as_json=json)


def _images(run: Path, recorded: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The section of the images that a run quantized with; none if it had none."""
    made = images_of(run)
    if made is not None:
        return {"source": str(made)}
    images = recorded.get("images")
    if isinstance(images, dict) and "source" not in images:
        raise InputError(f"{run} keeps no images any more; give some with --images")
    return None if images is None else _section(recorded, "images", where)


def _section(recorded: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    section = recorded.get(name)
    if not isinstance(section, dict):
        raise InputError(f"{where} has no recipe with a section {name!r}; make the run again")
    return section
