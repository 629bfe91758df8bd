"""Every method on every kind of data: the tables of docs/results/zero-shot.md.

    python benchmarks/zero_shot_matrix.py --name cifar10-resnet20 --model zoo/cifar10-resnet20 \
        --real TRAIN --test bundled/cifar10-test --count 1024 --iterations 300 --work FOLDER

One JSON file a kind of data lands in `results/zero_shot/`; each holds a row a scheme and method. Rows that are already
there with the same budget are kept, so a stopped run goes on. Real images and test images must not overlap: with
`--hold-out`, the first `--count` images of `--test` serve as the real ones and only the rest is evaluated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synthquant.core.files import write_json
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.evaluate.accuracy import Evaluation, evaluate_model
from synthquant.make import synthesize
from synthquant.methods import QUANTIZERS, SYNTHESIZERS
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.recipe import SynthesizeSection

SCHEMES = {"W8A8": "W8A8", "W4A4": "W4A4", "W2A4": "W2A4", "W4A4-same": {"preset": "W4A4", "ends": "same"}}


def settings_of(method: str, iterations: int, batch_size: int, rounding_weight: float | None) -> dict[str, Any]:
    """Settings of a quantization method at this budget; everything else as its paper says."""
    if method == "rtn":
        return {}
    settings: dict[str, Any] = {"iterations": iterations, "batch_size": batch_size}
    if method == "brecq":
        settings["activation_iterations"] = iterations // 4
    if rounding_weight is not None and method != "genie_m":
        settings["rounding_weight"] = rounding_weight
    return settings


def synthetic_images(
    kind: str, model: FloatModel, count: int, settings: dict[str, Any], seed: int, folder: Path
) -> ImageSet:
    """The images of a method in `folder`: made there, or what is missing of them."""
    section = SynthesizeSection.parse({"method": kind, "count": count, **settings}, "images")
    return synthesize(model, section, seed, folder, ConsoleProgress())


def images_of(kind: str, model: FloatModel, args: argparse.Namespace) -> tuple[ImageSet, dict[str, Any]]:
    """The calibration images of a kind, and how they came about."""
    if kind == "real":
        source = args.test if args.hold_out else args.real
        images = open_images(source)
        if args.hold_out:
            return images.subset(range(args.count)), {"source": "held-out part of the evaluation images"}
        order = torch.randperm(len(images), generator=Rng(args.seed).generator("draw images"))
        return images.subset(order[: args.count].tolist()), {"source": "training images"}
    settings = {} if kind == "noise" else {"iterations": args.synthesis_iterations[kind]}
    began = time.perf_counter()
    folder = args.work / args.name / f"{kind}-{args.seed}"
    images = synthetic_images(kind, model, args.count, settings, args.seed, folder)
    return images, {"method": kind, **settings, "seconds": round(time.perf_counter() - began, 1)}


def row_of(
    model: FloatModel,
    images: ImageSet,
    scheme: str,
    method: str,
    args: argparse.Namespace,
    measure: Callable[..., Evaluation],
) -> dict[str, Any]:
    """Quantize and measure once."""
    settings = settings_of(method, args.iterations, args.batch_size, args.rounding_weight)
    quant_model = QuantModel.build(model, QuantScheme.parse(SCHEMES[scheme]))
    began = time.perf_counter()
    report = QUANTIZERS.get(method)(**settings).apply(quant_model, images, Rng(args.seed).child("quantize"))
    seconds = time.perf_counter() - began
    result = measure(quant_model)
    return {
        "scheme": scheme, "method": method, "settings": settings, "seed": args.seed, "top1": result.top1,
        "interval": result.interval, "agreement": result.agreement, "kl": result.kl, "count": result.count,
        "seconds": round(seconds, 1), "diverged": list(report.diverged),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="names the result files")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--real", help="real images, in any form the command line takes")
    parser.add_argument("--test", required=True)
    parser.add_argument("--hold-out", action="store_true")
    parser.add_argument("--test-limit", type=int, help="evaluate on the first so many test images only")
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounding-weight", type=float, help="of AdaRound, BRECQ and QDrop; 0.1 for MobileNets")
    parser.add_argument("--zeroq-iterations", type=int, default=500)
    parser.add_argument("--genie-d-iterations", type=int, default=300)
    parser.add_argument("--data", nargs="+", default=["noise", "zeroq", "genie_d", "real"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=["rtn", "adaround", "brecq", "qdrop", "genie_m"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="where synthetic images are kept")
    parser.add_argument("--out", type=Path, default=Path("results/zero_shot"))
    args = parser.parse_args()
    args.synthesis_iterations = {"zeroq": args.zeroq_iterations, "genie_d": args.genie_d_iterations}
    unknown = [kind for kind in args.data if kind != "real" and kind not in SYNTHESIZERS]
    if unknown or ("real" in args.data and not (args.real or args.hold_out)):
        parser.error(f"unknown data {unknown}" if unknown else "real data needs --real or --hold-out")
    model = open_model(args.model, weights=args.weights, device=args.device)
    test = open_images(args.test)
    if args.hold_out:
        test = test.subset(range(args.count, len(test)))
    if args.test_limit is not None:
        test = test.subset(range(min(args.test_limit, len(test))))
    float_result = evaluate_model(model.module, model.preprocess, test, device=args.device)

    def measure(network: nn.Module) -> Evaluation:
        reference = float_result.logits
        return evaluate_model(network, model.preprocess, test, reference_logits=reference, device=args.device)

    for kind in args.data:
        path = args.out / f"{args.name}--{kind}.json"
        budget = {"count": args.count, "iterations": args.iterations, "batch_size": args.batch_size}
        images, origin = images_of(kind, model, args)
        rows: list[dict[str, Any]] = []
        if path.exists():
            former = json.loads(path.read_text())
            if former["budget"] == budget and former["float"]["fingerprint"] == model.fingerprint:
                rows, origin = former["rows"], former["data"]
        for scheme in args.schemes:
            for method in args.methods:
                if any((row["scheme"], row["method"], row["seed"]) == (scheme, method, args.seed) for row in rows):
                    continue
                rows.append(row_of(model, images, scheme, method, args, measure))
                print(kind, json.dumps(rows[-1]), flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                result = {
                    "benchmark": "zero_shot", "name": args.name, "model": args.model, "data": origin, "kind": kind,
                    "budget": budget, "rows": rows, "environment": environment(),
                    "float": {"top1": float_result.top1, "interval": float_result.interval,
                              "count": float_result.count, "fingerprint": model.fingerprint},
                }  # fmt: skip
                write_json(path, result)


if __name__ == "__main__":
    main()
