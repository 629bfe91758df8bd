"""Exported ImageNet networks in ONNX Runtime, beside its own quantizer: a section of docs/results/imagenet.md.

    python benchmarks/imagenet_files.py --network mobilenetv2 --weights mobilenet_v2.safetensors \
        --photographs sample.parquet --images genie_d=FOLDER

Every network is quantized with each set of images and with the 64 photographs of the table, every tensor between
integer kernels (`deploy: full`), written with preset `ort-cpu`, and measured on the other photographs in two ways: as
written (float arithmetic on rounded values, exact) and with the runtime's integer kernels, which on CPUs without VNNI
overflow unless weights have 7 bits. Rows land one at a time in results/imagenet_files/NETWORK.json; those that are
there with the same images and settings are kept. `--latency` measures processor time at one thread, files in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from imagenet_table import NETWORKS, Row, columns, quantized, section_of
from photographs import divided
from runtime_quantizer import Ranges, exact_network, quantize_file_with_runtime
from synthquant.core.cpu import has_vnni
from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.data.sources import open_images
from synthquant.evaluate.accuracy import compare_logits, evaluate_model
from synthquant.export.onnx import Onnx
from synthquant.export.onnx.layers import integer_coverage
from synthquant.export.onnx.runtime import ort_network, session
from synthquant.export.onnx.speed import export_float, in_turns
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model

ROOT = Path(__file__).parent.parent
SYMMETRIC = ["quantize.scheme.deploy=full", "quantize.scheme.weights.symmetric=true"]
EQUALIZED = "quantize.equalize=activations"
SEVEN = [*SYMMETRIC, "quantize.scheme.ends=same"]
OURS = {
    "W8A8": SYMMETRIC,
    "W7A8": SEVEN,
    "W8A8-equalized": [*SYMMETRIC, EQUALIZED],
    "W7A8-equalized": [*SEVEN, EQUALIZED],
}
BATCH = 32
# What the runtime's own quantizer is told: whether the image's range comes from its pixels, whether weights have 7
# bits, and how it takes ranges.
RUNTIME: dict[str, tuple[bool, bool, Ranges]] = {
    "runtime": (False, False, "percentile"),
    "runtime-pixels": (True, False, "percentile"),
    "runtime-pixels-minmax": (True, False, "minmax"),
    "runtime-pixels-7": (True, True, "percentile"),
}


def pixel_range(model: FloatModel) -> tuple[float, float]:
    """The smallest and the largest value that a normalised image can have."""
    mean, std = (torch.tensor(values) for values in (model.preprocess.mean, model.preprocess.std))
    return float((-mean / std).min()), float(((1 - mean) / std).max())


def write_file(
    kind: str, data: str, images: ImageSet, model: FloatModel, reference: Path, args: argparse.Namespace
) -> Path:
    """Quantize and write one file."""
    path: Path = args.work / f"{args.network}-{data}-{kind}-{args.method if kind in OURS else 'own'}.onnx"
    if kind in RUNTIME:
        pixels, seven, ranges = RUNTIME[kind]
        ends = pixel_range(model) if pixels else None
        inputs = model_inputs(images, model.preprocess)
        return quantize_file_with_runtime(reference, inputs, path, ranges, image_range=ends, reduce_range=seven)
    row = row_of(kind, data, args)
    quant_model, _ = quantized(row, model, images, path.with_suffix(""), args)
    return Onnx().export(quant_model, path)


def row_of(kind: str, data: str, args: argparse.Namespace) -> Row:
    """How the table calls it."""
    return Row(args.network, data, kind.partition("-")[0], args.method)


def measure(
    kind: str, data: str, images: ImageSet, model: FloatModel, test: ImageSet, args: argparse.Namespace
) -> dict[str, Any]:
    """One file, run in both ways."""
    reference = args.work / f"{args.network}-float.onnx"
    if not reference.exists():
        export_float(model, reference)
    path = write_file(kind, data, images, model, reference, args)
    logits = torch.load(args.work / f"{args.network}-float.pt")
    ways = {"integer": ort_network(session(path, threads=1))}
    if not kind.startswith("W7A8"):  # integer sums of 7-bit weights do not overflow: no slow way is needed
        ways["exact"] = exact_network(path)
    inputs = model_inputs(test, model.preprocess)
    found = {}
    for way, network in ways.items():
        outputs = torch.cat([network(part) for part in inputs.split(BATCH)])
        found[way] = columns(compare_logits(outputs, torch.as_tensor(test.labels), logits), test, logits)
    coverage = integer_coverage(path)
    return {
        **found,
        "layers": {"integer": coverage.integer, "floating": coverage.floating},
        "bytes": {"float": reference.stat().st_size, "quantized": path.stat().st_size},
    }


def latency(model: FloatModel, test: ImageSet, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the processor for an image: median of calls at one thread, all files in turns."""
    files = {"float": args.work / f"{args.network}-float.onnx"}
    for kind in args.kinds:
        found = sorted(args.work.glob(f"{args.network}-*-{kind}-{args.method if kind in OURS else 'own'}.onnx"))
        if found:  # whichever images: they do not change the speed
            files[kind] = found[0]
    networks = {name: ort_network(session(path, threads=1)) for name, path in files.items()}
    times = in_turns(networks, model_inputs(test, model.preprocess, [0]), args.seconds, time.process_time)
    middles = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return {"milliseconds": middles, "vnni": has_vnni(), "environment": environment()}


def main() -> None:
    """Measure what is missing."""
    args = parsed()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.network}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"network": args.network, "rows": []}
    model = open_model(NETWORKS[args.network], weights=args.weights)
    real, test = divided(args.photographs)
    float_file = args.work / f"{args.network}-float.pt"
    if "float" not in result or not float_file.exists():
        found = evaluate_model(model.module, model.preprocess, test)
        torch.save(found.logits, float_file)
        result["float"] = columns(found, test, found.logits)
    sets = {"real": real} if args.real else {}
    sets |= {name: open_images(source) for name, _, source in (t.partition("=") for t in args.images)}
    result["sets"] = result.get("sets", {}) | {
        name: {"count": len(images), "iterations": images.manifest.settings.get("iterations")}
        for name, images in sets.items()
    }
    write_json(path, result)
    for data, images in sets.items():
        for kind in args.kinds:
            args.set = [*OURS.get(kind, []), *args.change]
            settings = section_of(row_of(kind, data, args), args) if kind in OURS else None
            identity = {
                "data": data,
                "kind": kind,
                "method": args.method if kind in OURS else "own",
                "images": images.fingerprint,
                "settings": settings and settings.model_dump(mode="json"),
            }
            if any(identity == {key: row[key] for key in identity} for row in result["rows"]):
                continue
            row = identity | measure(kind, data, images, model, test, args) | {"environment": environment()}
            place = ("data", "kind", "method")
            others = [one for one in result["rows"] if any(one[key] != identity[key] for key in place)]
            result["rows"] = [*others, row]
            write_json(path, result)
            ways = [way for way in ("exact", "integer") if way in row]
            seen = {way: {key: row[way][key] for key in ("top1", "agreement", "kl")} for way in ways}
            print(args.network, data, kind, identity["method"], json.dumps(seen), row["layers"], flush=True)
    if args.latency:
        result["latency"] = latency(model, test, args)
        write_json(path, result)
        print(args.network, result["latency"]["milliseconds"])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, choices=NETWORKS)
    parser.add_argument("--weights")
    parser.add_argument("--photographs", required=True, help="labelled photographs, in any form synthquant takes")
    parser.add_argument("--images", action="append", default=[], metavar="NAME=SOURCE", help="synthetic images")
    parser.add_argument("--no-real", dest="real", action="store_false", help="synthetic images only")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--kinds", nargs="+", default=["W8A8", "W7A8", *RUNTIME], choices=[*OURS, *RUNTIME])
    parser.add_argument("--iterations", type=int, default=60, help="of each unit, of methods that learn")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounding-weight", type=float, default=0.1, help="of BRECQ and QDrop")
    parser.add_argument("--change", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each file")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "imagenet_files")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "imagenet_files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    return args


if __name__ == "__main__":
    main()
