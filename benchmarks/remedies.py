"""Equalisation and bias correction on MobileNetV2 and EfficientNet-Lite0, rounded to nearest.

    python benchmarks/remedies.py --photographs sample.parquet \
        --weights mobilenetv2=mobilenet_v2.safetensors --weights efficientnet-lite0=tf_efficientnet_lite0.safetensors

Calibrates with the 64 photographs of `benchmarks/imagenet_table.py` and measures on the others. Rows land one at a time
in `results/remedies/NETWORK.json`; called again it does those that are missing. `tables.py` writes them into the page.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from imagenet_table import NETWORKS, ROOT, columns
from photographs import divided
from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.evaluate.accuracy import evaluate_model
from synthquant.methods import Equalize
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.bias_correction import correct_biases
from synthquant.quantize.equalize import equalized
from synthquant.quantize.rtn import Rtn

SCHEMES = ("W8A8", "W4A8")
STRATEGIES = ("tensor", "channel")
EQUALIZE = ("none", "weights", "activations")


def main() -> None:
    """Do what is missing, the networks in turns."""
    args = parsed()
    torch.set_num_threads(1)
    files = dict(text.split("=", 1) for text in args.weights)
    calibration, test = divided(args.photographs)
    models: dict[str, tuple[FloatModel, Tensor]] = {}
    for scheme, strategy, network, equalize in product(SCHEMES, STRATEGIES, args.networks, EQUALIZE):
        path = args.out / f"{network}.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
        identity = {"strategy": strategy, "scheme": scheme, "equalize": equalize}
        done = {row["bias_correction"] for row in rows if identity.items() <= row.items()}
        if done == {False, True}:
            continue
        if network not in models:
            model = open_model(NETWORKS[network], weights=files.get(network), device="cpu")
            models[network] = model, evaluate_model(model.module, model.preprocess, test).logits
        rows += measured(identity, done, *models[network], calibration, test)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"network": network, "rows": rows, "environment": environment("cpu")})


def measured(
    identity: dict[str, str],
    done: set[bool],
    model: FloatModel,
    reference: Tensor,
    calibration: ImageSet,
    test: ImageSet,
) -> list[dict[str, Any]]:
    """The rows of one network without and with bias correction, but for those that are `done`."""
    preset, strategy = identity["scheme"], identity["strategy"]
    bits = int(preset[1])
    scheme = QuantScheme.parse({"preset": preset, "weights": {"num_bits": bits, "strategy": strategy}})
    kind = cast(Equalize, identity["equalize"])
    start = time.process_time()
    quant_model = equalized(QuantModel.build(model, scheme), kind, calibration)
    seconds = time.process_time() - start
    Rtn().apply(quant_model, calibration, Rng(0))
    rows = []
    for corrected in (False, True):
        if corrected:
            correct_biases(quant_model, calibration)
        if corrected in done:
            continue
        found = evaluate_model(quant_model, model.preprocess, test, reference_logits=reference)
        values = columns(found, test, reference)
        rows.append({**identity, "bias_correction": corrected, **values, "equalize_seconds": round(seconds, 1)})
        print({key: value for key, value in rows[-1].items() if key != "per_image"}, flush=True)
    return rows


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True, help="labelled photographs, in any form synthquant takes")
    parser.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "remedies")
    return parser.parse_args()


if __name__ == "__main__":
    main()
