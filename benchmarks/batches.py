"""Loss of Genie-D's images by the size of a batch, at equal processor time.

    python benchmarks/batches.py --network torchvision/mobilenet_v2 --weights FILE --batches 64 16 --seconds 360

For each size the same count of images is made in the same time, in batches of that size: as many iterations as it
allows. Two losses are kept: that of each batch at its last iteration, which is what the method lowers, and that of the
statistics of all images together, without swing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from synthquant.core.allocator import ALLOCATOR
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.preprocess import model_inputs
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.inversion import InvertedNetwork, Objective
from synthquant.synthesize.pieces import Pieces


def measured(model: FloatModel, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Make the images in batches of a size."""
    seen: list[tuple[float, float]] = []
    backward = InvertedNetwork.backward

    def watched(network: InvertedNetwork, images: Tensor, objective: Objective) -> Tensor:
        loss = backward(network, images, objective)
        seen.append((time.process_time(), float(loss)))
        return loss

    def method(iterations: int) -> GenieD:
        return GenieD(iterations=iterations, batch_size=batch, generator=args.generator)

    with mock.patch.object(InvertedNetwork, "backward", watched):
        method(3).synthesize(model, batch, Rng(0))
        per_iteration = (seen[-1][0] - seen[0][0]) / (len(seen) - 1)
        batches = args.count // batch
        iterations = int(args.seconds / batches / per_iteration)
        seen.clear()
        began = time.process_time()
        images = method(iterations).synthesize(model, args.count, Rng(0))
        used = time.process_time() - began
    network = InvertedNetwork(model, method="genie_d", statistics="batch", channel_weights="mean", swing=False)
    network.pieces = Pieces(8, 1)
    together = network.backward(model_inputs(images, model.preprocess).requires_grad_())
    return {
        "batch": batch, "its": iterations, "per_image_ms": 1000 * per_iteration / batch, "used": used,
        "last": [seen[(index + 1) * iterations - 1][1] for index in range(batches)], "set_loss": float(together),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--generator", default="auto")
    parser.add_argument("--count", type=int, default=64, help="a multiple of every size")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--seconds", type=float, default=360, help="processor time of each row")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ALLOCATOR.keep_freed()
    model = open_model(args.network, weights=args.weights, input_size=args.side)
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        rows.append(measured(model, batch, args))
        print(json.dumps(rows[-1]), flush=True)
        result = {
            "benchmark": "batches", "network": args.network, "count": args.count, "size": args.side,
            "generator": args.generator, "rows": rows, "environment": environment(),
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
