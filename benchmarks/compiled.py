"""What `torch.compile` gives on a CPU: the steps of inversion and of evaluation, compiled and not, in turns.

    python benchmarks/compiled.py --network mobilenetv2 --weights FILE

One thread. *Inversion*: forward and backward pass of the network with its loss, without generator and swing.
*Evaluation*: a forward pass, as it is and with channels-last images. Compiling is timed with its child processes, from
an empty cache. The result goes to `results/compiled/NETWORK.json`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import imagenet_table
from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.models.open import open_model
from synthquant.synthesize.inversion import InvertedNetwork

ROOT = Path(__file__).parent.parent
NETWORKS = {**imagenet_table.NETWORKS, "cifar10-resnet20": "zoo/cifar10-resnet20"}
Step = Callable[[], Tensor]


def processor() -> float:
    """Seconds of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def compare(variants: dict[str, Step], batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds an image of each variant, in turns, and how far its result is from the first one's."""
    found: dict[str, Any] = {}
    results: dict[str, Tensor] = {}
    for name, step in variants.items():
        first = processor()
        results[name] = step()
        found[name] = {"first_call_seconds": round(processor() - first, 1), "ms": []}
    for _ in range(repeats):
        for name, step in variants.items():
            began = time.process_time()
            step()
            found[name]["ms"].append(1000 * (time.process_time() - began) / batch)
    reference = next(iter(results.values()))
    for name, values in found.items():
        values["ms"] = round(statistics.median(values["ms"]), 2)
        values["largest_difference"] = float((results[name] - reference).abs().max() / reference.abs().max())
    return found


def inversion(network: InvertedNetwork, images: Tensor) -> dict[str, Step]:
    """Loss and gradient of images, compiled and not."""

    def step(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        images.grad = None
        torch.autograd.backward(loss_of(images))
        assert images.grad is not None
        return images.grad

    compiled = torch.compile(lambda batch: network.loss(batch))
    return {"eager": lambda: step(network.loss), "compiled": lambda: step(compiled)}


def evaluation(module: torch.nn.Module, images: Tensor) -> dict[str, Step]:
    """Logits, as they are computed now, channels-last and compiled."""
    last = images.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(module)

    def run(network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        with torch.no_grad():
            return network(batch)

    return {
        "eager": lambda: run(module, images),
        "channels-last": lambda: run(module, last),
        "compiled": lambda: run(compiled, images),
    }


def main() -> None:
    """Measure one network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--weights")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "compiled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = open_model(NETWORKS[args.network], weights=args.weights)
    source = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, *model.preprocess.input_size, generator=source)
    network = InvertedNetwork(model, method="genie_d", statistics="batch", channel_weights="mean", swing=False)
    leaf = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        found = {
            "inversion": compare(inversion(network, leaf), args.batch_size, args.repeats),
            "evaluation": compare(evaluation(model.module, images), args.batch_size, args.repeats),
        }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.network}.json"
    write_json(path, {
        "network": args.network, "batch_size": args.batch_size, "repeats": args.repeats, **found,
        "environment": environment(),
    })  # fmt: skip
    print(found)


if __name__ == "__main__":
    main()
