"""`export` and `benchmark`: files for runtimes, and how fast they run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from synthquant.cli import options
from synthquant.cli.output import print_json
from synthquant.core.errors import ModelError, RecipeError
from synthquant.core.formatting import size
from synthquant.core.method_settings import build_method
from synthquant.core.overrides import apply_overrides
from synthquant.core.progress import ConsoleProgress
from synthquant.core.settings import Settings, parse_settings
from synthquant.export.write import export_run
from synthquant.methods import EXPORTERS
from synthquant.runtimes import SpeedTest, exporter_of, runtime_exporters


def _with_field(field: str) -> list[tuple[str, type[Settings]]]:
    """Names and classes of the exporters that have a field of this name."""
    exporters = [(name, cast(type[Settings], cls)) for name, cls in EXPORTERS.items()]
    return [(name, cls) for name, cls in exporters if field in cls.model_fields]


Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or of a checkpoint.", show_default=False)]
To = Annotated[str, typer.Option(help=f"One of {', '.join(EXPORTERS.names())}.")]
_PRESETS = "; ".join(f"for --to {name}: {options.setting_help(cls, 'preset')}" for name, cls in _with_field("preset"))
PresetName = Annotated[str | None, typer.Option(help=f"As --set preset=NAME, {_PRESETS}")]
Out = Annotated[Path, typer.Option(metavar="FILE", help="The file to write.", show_default=False)]
VerifyData = Annotated[
    str | None, typer.Option(metavar="DATA", help="Images to verify on; without it those the run quantized with.")
]
Exported = Annotated[Path, typer.Argument(metavar="FILE", help="A file that export wrote.", show_default=False)]

_NAMED = 5


def export(
    run: Run,
    out: Out,
    to: To = "onnx",
    preset: PresetName = None,
    data: VerifyData = None,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    verify: Annotated[bool, typer.Option(help="Run the file and compare it with the quantized network.")] = True,
    model: options.QuantizedModel = None,
    trust_code: options.TrustCode = False,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Write a run's quantized network as a file for a runtime, and verify that it computes the same.

    --set takes any field of the exporter, for example --set min_agreement=0.995; `synthquant show onnx` lists them.
    """
    if not verify:
        options.require_not_given("--no-verify looks at no images", {"data": data})
    values: dict[str, Any] = {}
    if preset is not None:
        if to in EXPORTERS and to not in dict(_with_field("preset")):
            raise RecipeError(f"--preset belongs to --to {' or '.join(dict(_with_field('preset')))}, not to --to {to}")
        values["preset"] = preset
    exporter = build_method(EXPORTERS, to, apply_overrides(values, settings or []), "export")
    result = export_run(
        run,
        exporter,
        out,
        data=data,
        max_pixels=max_pixels,
        verify=verify,
        model=model,
        trust_code=trust_code,
        progress=ConsoleProgress(),
    )
    print_json(result) if json else _print_export(result)


def benchmark(
    file: Exported,
    batch: Annotated[int, typer.Option(help=options.setting_help(SpeedTest, "batch"))] = 1,
    threads: Annotated[int, typer.Option(help=options.setting_help(SpeedTest, "threads"))] = 2,
    seconds: Annotated[float, typer.Option(help=options.setting_help(SpeedTest, "seconds"))] = 10.0,
    model: options.QuantizedModel = None,
    trust_code: options.TrustCode = False,
    json: options.Json = False,
) -> None:
    """Measure an exported network beside the float export of the same architecture, in turns, in its runtime."""
    test = parse_settings(SpeedTest, {"batch": batch, "threads": threads, "seconds": seconds}, "benchmark")
    exporter = exporter_of(file)
    if exporter is None:
        known = ", ".join(exporter.suffix for exporter in runtime_exporters())
        raise ModelError(f"{file} is no file that a runtime executes here; their names end in {known}")
    result = exporter.benchmark(file, test, model=model, trust_code=trust_code, progress=ConsoleProgress())
    if json:
        print_json(result)
        return
    for name in ("float", "quantized"):
        row = result[name]
        print(
            f"{name:<10}{row['milliseconds']:9.2f} ms{row['images_per_second']:10.1f} images/s{size(row['bytes']):>12}"
        )
    print(f"speed {result['speedup']:.2f}x, size {result['size_ratio']:.3f}x, batch {batch}, {threads} threads")
    print(result["environment"]["cpu"] + ("" if result["vnni"] else ", no 8-bit dot products (VNNI)"))


def _print_export(result: dict[str, Any]) -> None:
    print(result["scheme"])
    print(f"{result['out']}: {size(result['bytes'])}")
    found = result["verification"]
    if found is None:
        print("not verified")
        return
    count = found.get("samples", found.get("images"))  # a trajectory's rows are no images
    for name in ("loaded", "as_written", "optimized"):
        if name in found:
            for output, row in found[name].get("outputs", {"": found[name]}).items():
                print(f"{name.replace('_', ' '):<11} {_difference(output, row, count)}")
    if "layers" in found:
        layers = found["layers"]
        print(f"{layers['integer']} of {layers['integer'] + layers['floating']} layers run on integers")
        if layers["float_layers"]:
            print(f"in float: {_some(layers['float_layers'])}")
        products = layers["products_integer"] + layers["products_floating"]
        if products:
            print(f"{layers['products_integer']} of {products} products of two activations run on integers")
        print(", ".join(f"{name} {count}" for name, count in layers["operators"].items()))


def _difference(output: str, row: dict[str, Any], count: int) -> str:
    """How far one output is from the quantized network's, in a line; the name of a lone one is empty."""
    steps = "" if row["max_steps"] is None else f", at most {row['max_steps']:.1f} steps of the output's grid"
    if output or row["agreement"] is None:
        alike = "" if row["agreement"] is None else f"agreement {row['agreement']:.2%}, "
        what = f"output {output}: " if output else ""
        return f"{what}{alike}mean difference {row['mean_error']:.2%} of its spread on {count} samples{steps}"
    ties = f" ({row['ties']} others nearly tied)" if row["ties"] else ""
    return (
        f"agreement {row['agreement']:.2%} on {count} images{ties},"
        f" mean difference {row['mean_error']:.2%} of the logits' spread{steps}"
    )


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
