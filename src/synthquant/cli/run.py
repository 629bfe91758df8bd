"""`run` and `demo`: the whole flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthquant import pipeline
from synthquant.cli import options
from synthquant.cli.output import accuracy_rows, print_json, print_run, print_table
from synthquant.core.progress import ConsoleProgress
from synthquant.recipe import Recipe, apply_overrides
from synthquant.report.html import write_report

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to do.", show_default=False)]
DemoOut = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the three runs and the report go.")]

# Small enough for two CPU cores in minutes, large enough for the order of the methods to be the usual one.
_DEMO = {
    "model": {"source": "zoo/cifar10-resnet20"},
    "evaluate": {"data": "bundled/cifar10-test"},
}
_DEMO_IMAGES = {"method": "genie_d", "count": 256, "iterations": 100}
_DEMO_QUANTIZE = {"method": "genie_m", "scheme": "W4A4", "iterations": 200}


def run(
    recipe: RecipeFile,
    out: options.RunOut,
    device: Annotated[str | None, typer.Option(help="Wins over the recipe's `device`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Wins over the recipe's `seed`.")] = None,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Do what a recipe says; the same command again goes on where a killed run stopped.

    `--set` takes the path of any setting of the recipe, for example `--set quantize.iterations=500`.
    """
    given = [f"{name}={value}" for name, value in (("device", device), ("seed", seed)) if value is not None]
    record = pipeline.run(Recipe.load(recipe, [*(settings or []), *given]), out, ConsoleProgress())
    print_run(out, record, as_json=json)


def demo(
    out: DemoOut = Path("runs/demo"),
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Quantize the bundled ResNet-20 to W4A4 without data, beside two simpler ways, and measure on 5,000 real images.

    `--set` takes the path of any setting of the Genie run's recipe, for example `--set images.count=1024`.
    """
    progress = ConsoleProgress()
    common = _DEMO | {"device": device, "seed": seed}
    genie = apply_overrides(common | {"images": _DEMO_IMAGES, "quantize": _DEMO_QUANTIZE}, settings or [])
    rtn = genie | {"quantize": {"method": "rtn", "scheme": genie["quantize"]["scheme"]}}
    runs = {
        "Genie (synthetic images)": ("genie", genie),
        "rtn on synthetic images": ("rtn-on-genie_d", rtn | {"images": {"source": str(out / "genie" / "images")}}),
        "rtn on noise": ("rtn-on-noise", rtn | {"images": {"method": "noise", "count": genie["images"]["count"]}}),
    }
    rows: dict[str, dict[str, Any]] = {}
    for title, (folder, values) in runs.items():
        progress.say(title)
        record = pipeline.run(Recipe.parse(values, "demo"), out / folder, progress)
        float_row, quantized_row = accuracy_rows(record)
        rows |= {"float": float_row, title: quantized_row}
    report = write_report([out / folder for folder, _ in runs.values()], out / "report.html")
    ordered = ["float", *reversed(runs)]
    if json:
        print_json({"rows": [rows[name] | {"name": name} for name in ordered], "report": str(report)})
        return
    print_table([rows[name] | {"name": name} for name in ordered])
    print(f"report: {report}")
