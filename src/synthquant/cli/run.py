"""`run` and `demo`: the whole flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthquant import pipeline
from synthquant.cli import options
from synthquant.cli.output import accuracy_rows, print_json, print_run, print_table
from synthquant.core.device import resolve_device
from synthquant.core.errors import RecipeError
from synthquant.core.files import require_writable
from synthquant.core.overrides import apply_overrides
from synthquant.core.processes import launched
from synthquant.core.progress import ConsoleProgress
from synthquant.recipe import QuantizeSection, Recipe, SourceSection, SynthesizeSection
from synthquant.report.html import write_report

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to do.", show_default=False)]
DemoOut = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the three runs and the report go.")]

# Small enough for two CPU cores in minutes. Two-bit weights, because there the methods differ by far more than a
# processor or the number of threads changes the images, which begin with the last bit of a sum.
_DEMO = {
    "model": {"source": "zoo/cifar10-resnet20"},
    "images": {"method": "genie_d", "count": 256, "iterations": 200},
    "quantize": {"method": "genie_m", "scheme": "W2A4", "iterations": 200},
    "evaluate": {"data": "bundled/cifar10-test"},
}


def run(
    recipe: RecipeFile,
    out: options.RunOut,
    device: Annotated[str | None, typer.Option(help="Wins over the recipe's `device`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Wins over the recipe's `seed`.")] = None,
    target: options.Target = None,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Do what a recipe says; the same command again goes on where a killed run stopped.

    `--set` takes the path of any setting of the recipe, for example `--set quantize.iterations=500`.
    """
    options_given = {"device": device, "seed": seed, "quantize.target": target}
    given = [f"{name}={value}" for name, value in options_given.items() if value is not None]
    record = pipeline.run(Recipe.load(recipe, [*(settings or []), *given]), out, ConsoleProgress())
    if launched().is_first:
        print_run(out, record, as_json=json)


def demo(
    out: DemoOut = Path("runs/demo"),
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Quantize the bundled ResNet-20 to W2A4 without data, beside two simpler ways, and measure on 5,000 real images.

    `--set` takes the path of any setting of the Genie run's recipe, for example `--set images.count=1024`.
    """
    require_writable(out)
    progress = ConsoleProgress()
    values = apply_overrides(_DEMO | {"device": device, "seed": seed}, settings or [])
    genie = Recipe.parse(values, "demo")
    resolve_device(genie.device)
    runs = _demo_runs(genie, out)
    rows: dict[str, dict[str, Any]] = {}
    environments: list[dict[str, str]] = []
    for title, (folder, recipe) in runs.items():
        progress.say(title)
        record = pipeline.run(recipe, folder, progress)
        environments.append(record.environment)
        float_row, quantized_row = accuracy_rows(record)
        rows |= {"float": float_row | {"name": "float"}, title: quantized_row | {"name": title}}
    report = write_report([folder for folder, _ in runs.values()], out / "report.html", progress)
    ordered = [rows[name] for name in ("float", *reversed(runs))]
    if json:
        print_json({"rows": ordered, "report": str(report), "environment": environments[0]})
        return
    print_table(ordered)
    print(f"report: {report}")


def _demo_runs(genie: Recipe, out: Path) -> dict[str, tuple[Path, Recipe]]:
    """Return the runs by title, in the order they are done: Genie first, for the second one uses its images."""
    if not isinstance(genie.images, SynthesizeSection):
        raise RecipeError("demo: it makes its own images; use `synthquant quantize` for images that exist")
    rtn = QuantizeSection.parse({"method": "rtn", "scheme": genie.quantize.scheme}, "demo")
    made = SourceSection(source=str(out / "genie" / "images"))
    noise = SynthesizeSection.parse({"method": "noise", "count": genie.images.count}, "demo")
    return {
        "Genie on synthetic images": (out / "genie", genie),
        "rtn on synthetic images": (out / "rtn", genie.model_copy(update={"quantize": rtn, "images": made})),
        "rtn on noise": (out / "rtn-on-noise", genie.model_copy(update={"quantize": rtn, "images": noise})),
    }
