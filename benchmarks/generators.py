"""Genie-D with the paper's generator and the light one: batch-norm loss against processor time.

    python benchmarks/generators.py --network mobilenetv2 --weights FILE --kind light --iterations 1000

One run is one batch of one seed at one thread. Every `--every` iterations the images that the generator makes are
measured once more, without swing: the same loss for all runs, whose time is left out. Each run goes to a file of its
own, `results/generators/NETWORK--KIND--BATCH--ITERATIONS--SEED.json`; what is there is not done again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagenet_table import NETWORKS
from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.synthesize.generator import Generator, make_generator
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.inversion import InvertedNetwork

ROOT = Path(__file__).parent.parent


class Curve:
    """Looks at the images of every so many iterations; the seconds are the processor's, without those of looking."""

    def __init__(self, model: FloatModel, every: int) -> None:
        self.every = every
        self.points: list[dict[str, float]] = []
        self._network = InvertedNetwork(
            model, method="genie_d", statistics="batch", channel_weights="mean", swing=False
        )
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.points.clear()
        self._began, self._iteration = time.process_time(), 0

    def __call__(self, module: nn.Module, inputs: Any, images: Any) -> None:
        """A hook that runs after every forward pass of a module."""
        del inputs
        if not isinstance(module, Generator) or not torch.is_grad_enabled():
            return
        self._iteration += 1
        if self._iteration % self.every:
            return
        before = time.process_time()
        point = {"iteration": self._iteration, "seconds": round(before - self._began, 1), "loss": self._loss(images)}
        self.points.append(point)
        print(point, flush=True)
        self._began += time.process_time() - before

    def _loss(self, images: Tensor) -> float:
        with torch.no_grad():
            return round(float(self._network.loss(images.detach())), 5)


def main() -> None:
    """Do one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, choices=NETWORKS)
    parser.add_argument("--weights")
    parser.add_argument("--kind", required=True, choices=["genie", "light"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "generators")
    args = parser.parse_args()
    path: Path = args.out / f"{args.network}--{args.kind}--{args.batch_size}--{args.iterations}--{args.seed}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    model = open_model(NETWORKS[args.network], weights=args.weights)
    method = GenieD(batch_size=args.batch_size, iterations=args.iterations, generator=args.kind)
    curve = Curve(model, args.every)
    hook = nn.modules.module.register_module_forward_hook(curve)
    images = method.synthesize(model, args.batch_size, Rng(args.seed))
    hook.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = make_generator(args.kind, method.latent_size, (3, *model.preprocess.input_size), torch.device("meta"))
    weights = sum(parameter.numel() for parameter in generator.parameters())
    write_json(path, {
        "network": args.network, "kind": args.kind, "latent_shape": generator.latent_shape, "weights": weights,
        "seed": args.seed,
        "batch_size": args.batch_size, "iterations": args.iterations, "settings": method.model_dump(mode="json"),
        "curve": curve.points, "images": images.fingerprint, "environment": environment(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
