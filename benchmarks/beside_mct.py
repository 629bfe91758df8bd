"""Sony's Model Compression Toolkit beside synthquant on MobileNetV2: a section of docs/results/imagenet.md.

    python benchmarks/beside_mct.py prepare --photographs sample.parquet --weights FILE --images genie_d=SET --work W
    (in the toolkit's environment: benchmarks/mct_images.py, into the same W)
    python benchmarks/beside_mct.py measure --photographs sample.parquet --weights FILE --work W

`prepare` writes the inputs that the toolkit reads: W/test.npy, W/real.npy and a file for each set of images. `measure`
quantizes with the toolkit's images as the table does with others, and measures the logits of the toolkit's networks;
results/mct/mobilenetv2.json, rows one at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagenet_table import NETWORKS, Clock, Row, columns, quantized
from photographs import divided
from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.data.sources import open_images
from synthquant.evaluate.accuracy import Evaluation, compare_logits, evaluate_model
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model

ROOT = Path(__file__).parent.parent
NETWORK = "mobilenetv2"


def prepare(model: FloatModel, real: ImageSet, test: ImageSet, args: argparse.Namespace) -> None:
    """Write what the toolkit reads."""
    sets = {"test": test, "real": real}
    sets |= {name: open_images(source) for name, _, source in (text.partition("=") for text in args.images)}
    for name, images in sets.items():
        np.save(args.work / f"{name}.npy", model_inputs(images, model.preprocess).numpy())


def measure(model: FloatModel, test: ImageSet, args: argparse.Namespace) -> None:
    """Measure what is missing."""
    out: Path = args.out / f"{NETWORK}.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"network": NETWORK, "rows": []}
    reference = evaluate_model(model.module, model.preprocess, test)
    result["float"] = columns(reference, test, reference.logits)
    for path in sorted(args.work.glob("logits-*.npy")):
        made = json.loads(path.with_suffix(".json").read_text())
        method, scheme, data = made["name"].split("-", 2)
        found: Evaluation = compare_logits(torch.from_numpy(np.load(path)), labels_of(test), reference.logits)
        _put(result, {"by": "mct", "data": data, "scheme": scheme, "method": method} | made, found, test, reference)
    write_json(out, result)
    pixels = args.work / "mct.npy"
    if pixels.exists():
        result["images"] = json.loads(pixels.with_suffix(".json").read_text())
        images = ImageSet.from_tensors(torch.from_numpy(np.load(pixels)))
        for method in args.methods:
            for scheme in args.schemes:
                identity = {"by": "synthquant", "data": "mct", "scheme": scheme, "method": method}
                row = Row(NETWORK, "mct", scheme, method)
                work = args.work / f"{row.name}-{images.fingerprint[:8]}"
                clock = Clock(work.with_suffix(".sittings"), "cpu")
                quant_model, _ = quantized(row, model, images, work, args)
                cost = clock.values()
                found = evaluate_model(quant_model, model.preprocess, test, reference_logits=reference.logits)
                _put(result, identity | cost, found, test, reference)
                write_json(out, result)


def labels_of(test: ImageSet) -> torch.Tensor:
    """Labels of the photographs, which have them."""
    if test.labels is None:
        raise SystemExit("the photographs need labels")
    return torch.as_tensor(test.labels)


def _put(
    result: dict[str, Any], identity: dict[str, Any], found: Evaluation, test: ImageSet, reference: Evaluation
) -> None:
    keys = ("by", "data", "scheme", "method")
    others = [row for row in result["rows"] if any(row[key] != identity[key] for key in keys)]
    row = identity | columns(found, test, reference.logits) | {"environment": environment()}
    result["rows"] = [*others, row]
    print({key: row[key] for key in (*keys, "top1", "agreement", "kl")}, flush=True)


def main() -> None:
    """Do one of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "measure"])
    parser.add_argument("--weights")
    parser.add_argument("--photographs", required=True)
    parser.add_argument("--images", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--methods", nargs="*", default=["rtn", "genie_m"])
    parser.add_argument("--schemes", nargs="*", default=["W8A8", "W4A8", "W4A4"])
    parser.add_argument("--iterations", type=int, default=60, help="of each unit, of methods that learn")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounding-weight", type=float, default=0.1, help="of BRECQ and QDrop")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mct")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model = open_model(NETWORKS[NETWORK], weights=args.weights)
    real, test = divided(args.photographs)
    if args.what == "prepare":
        prepare(model, real, test, args)
    else:
        measure(model, test, args)


if __name__ == "__main__":
    main()
