"""`synthesize`, `quantize` and `evaluate`: one stage at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthquant import make, measure, pipeline
from synthquant.cli import options
from synthquant.cli.output import print_next, print_outputs, print_result, print_run, print_table
from synthquant.core.device import resolve_device
from synthquant.core.errors import RecipeError
from synthquant.core.files import require_writable
from synthquant.core.overrides import apply_overrides
from synthquant.core.progress import ConsoleProgress
from synthquant.core.settings import parse_settings
from synthquant.data.image_set import ImageSet
from synthquant.data.quality import outside_in_words
from synthquant.evaluate.data import Data
from synthquant.evaluate.section import EvaluateSection
from synthquant.models.float_model import ModelSource
from synthquant.models.open import open_model
from synthquant.recipe import Recipe, SynthesizeSection
from synthquant.runtimes import exporter_of, runtime_exporters
from synthquant.targets import DEFAULT_SCHEME, default_scheme

_RUNTIMES = [name for exporter in runtime_exporters() for name in exporter.runtimes]
ModelOrRun = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN|FILE", help="A network, the folder of a run, or an exported file.", show_default=False
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help=f"Bits, as W<bits>A<bits> [default: {DEFAULT_SCHEME}, or what the target runs fastest]; more with"
        " --set scheme.FIELD=VALUE."
    ),
]
Runtime = Annotated[
    str | None, typer.Option(help=f"For an exported file: what runs it, on the CPU: {', '.join(_RUNTIMES)}.")
]


def synthesize(
    model: options.Model,
    out: options.ImagesOut,
    method: options.SynthesisMethod = "genie_d",
    count: options.Count = options.COUNT,
    weights: options.Weights = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    task: options.ModelTask = None,
    ray: options.RayAddress = None,
    ray_workers: options.RayCount = None,
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Make images from a trained network alone; the same command again goes on where a killed one stopped.

    --set takes any field of the method, for example --set iterations=1000; `synthquant show METHOD` lists them.
    """
    values = apply_overrides({"method": method, "count": count}, settings or [])
    section = SynthesizeSection.parse(values, "command line")
    source = options.model_source(
        model, task=task, weights=weights, input_size=input_size, mean=mean, std=std, num_classes=num_classes
    )
    place, workers = resolve_device(device), options.workers(ray, ray_workers)
    require_writable(out)
    float_model = open_model(source, device=place, progress=ConsoleProgress())
    images = make.synthesize(float_model, section, seed, out, ConsoleProgress(), ray=workers)
    result = {"out": str(out), "count": len(images), "fingerprint": images.fingerprint, "method": section.method}
    noun = "images" if isinstance(images, ImageSet) else "rows of a trajectory"
    if json:
        print_result(result, device)
        return
    print(f"{len(images)} {noun} in {out}")
    if isinstance(images, ImageSet) and (outside := outside_in_words(images)):
        print(outside)
    given: dict[str, object] = {
        "--task": task,
        "--weights": weights,
        "--input-size": input_size,
        "--mean": mean,
        "--std": std,
    }
    given |= {"--num-classes": num_classes}
    print_next("quantize", model, {"--images": out, **given, "--out": "RUN"})


def quantize(
    model: options.Model,
    out: options.RunOut,
    images: options.OptionalImages = None,
    method: options.QuantMethod = "genie_m",
    scheme: Scheme = None,
    target: options.Target = None,
    data: options.OptionalData = None,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    weights: options.Weights = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    task: options.ModelTask = None,
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Quantize a network with images that exist, or that the method makes; with --data also measure it on these.

    --set takes any field of the method, for example --set iterations=1000; `synthquant show METHOD` lists them.
    """
    bits = default_scheme(target) if scheme is None else {"preset": scheme}
    section = apply_overrides({"method": method, "target": target, "scheme": bits}, settings or [])
    values = {
        "model": options.model_section(
            model, task=task, weights=weights, input_size=input_size, mean=mean, std=std, num_classes=num_classes
        ),
        "images": None if images is None else {"source": images, "max_pixels": max_pixels},
        "quantize": section,
        "evaluate": None if data is None else {"data": data, "max_pixels": max_pixels},
        "device": device,
        "seed": seed,
    }
    record = pipeline.run(Recipe.parse(values, "command line"), out, ConsoleProgress())
    print_run(out, record, as_json=json)


def evaluate(
    model: ModelOrRun,
    data: options.Data,
    metric: options.UserMetric = None,
    limit: options.Limit = None,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    weights: options.Weights = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    task: options.ModelTask = None,
    quantized: options.QuantizedModel = None,
    trust_code: options.TrustCode = False,
    runtime: Runtime = None,
    device: options.Device = options.DEVICE,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Measure a network, a run's quantized network or an exported file on labelled images.

    --set takes the settings of a recipe's `evaluate` section, such as --set batch_size=32 or --set targets=COLUMN.
    """
    values = apply_overrides({"data": data, "max_pixels": max_pixels, "limit": limit, "metric": metric}, settings or [])
    section = parse_settings(EvaluateSection, values, "command line")
    resolve_device(device)
    exporter = exporter_of(model)
    if runtime is not None and exporter is None:
        raise RecipeError(f"--runtime belongs to an exported file, not to {model}")
    source: ModelSource | Path = Path(model)
    if exporter or Path(model).is_dir():
        options.require_not_given(
            f"{model} brings its network with it",
            {
                "weights": weights,
                "input-size": input_size,
                "mean": mean,
                "std": std,
                "num-classes": num_classes,
                "task": task,
                "device": device if exporter and device not in ("auto", "cpu") else None,
            },
        )
    else:
        options.require_not_given(
            f"{model} is no folder of a run and no exported file",
            {"model": quantized, "trust-code": trust_code or None},
        )
        source = options.model_source(
            model, task=task, weights=weights, input_size=input_size, mean=mean, std=std, num_classes=num_classes
        )
    measured_on = Data.of(section)
    if exporter is not None:
        row = measure.evaluate_exported(
            exporter, Path(model), measured_on, runtime, ConsoleProgress(), model=quantized, trust_code=trust_code
        )
    else:
        row = measure.evaluate(source, measured_on, device, ConsoleProgress(), model=quantized, trust_code=trust_code)
    if json:
        print_result(row, device)
        return
    beside = [{"name": "float", "metrics": row["float_metrics"]}] if "float_metrics" in row else []
    print_table([*beside, row])
    if "outputs" in row:
        print_outputs(row["outputs"])
