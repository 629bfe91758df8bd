"""Ways to Genie-D's images in less time: the batch-norm loss by seconds, of the light generator, one way a call.

    python benchmarks/generator_ways.py --network mobilenetv2 --weights FILE --way half

`plain` is Genie-D. `warm`: the generator's weights come from another batch, whose seconds do not count. `half`: the
network reads images at half the resolution for the first half of the iterations. `late`: for the second half it is
left in the middle, so that only the first half of the batch norms is measured. The loss is always that of all batch
norms at full resolution, without swing. One thread, processor time; results/generator_ways/NETWORK--WAY--....json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generators import ROOT, Curve
from imagenet_table import NETWORKS
from synthquant.core.files import write_json
from synthquant.core.progress import QUIET
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.models.batch_norm import batch_norm_layers
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.synthesize.generator import Generator, make_generator
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.inversion import Advice, ExponentialSchedule, InvertedNetwork, Learner, adam, invert


class Enough(Exception):
    """The batch norms that count have run."""


class Left(nn.Module):
    """A network that is left before one of its modules."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        network.get_submodule(name).register_forward_pre_hook(self._leave)

    def _leave(self, module: nn.Module, inputs: Any) -> None:
        raise Enough

    def forward(self, images: Tensor) -> None:
        """Run the first part."""
        try:
            self.network(images)
        except Enough:
            return


class Shorter(InvertedNetwork):
    """A network of which only the first half of the batch norms runs."""

    def __init__(self, model: FloatModel, **options: Any) -> None:
        super().__init__(model, **options)
        names = list(batch_norm_layers(model.module))
        self._network = Left(self._network, names[len(names) // 2])


def train(
    network: InvertedNetwork,
    generator: Generator,
    latents: Tensor,
    shown: Callable[[Tensor], Tensor],
    iterations: int,
    rate: float,
    rng: Rng,
) -> None:
    """Some iterations of Genie-D with its optimisers afresh, at `rate` times its rates."""
    method = GenieD()
    decays: dict[str, Any] = {"factor": method.generator_decay, "every": method.generator_decay_every}
    learners = []
    for parameters, lr in ((latents, method.latent_lr), (generator.parameters(), method.generator_lr)):
        optimizer, rates = adam([parameters] if isinstance(parameters, Tensor) else parameters, rate * lr)
        learners.append(Learner(optimizer, ExponentialSchedule(rates, **decays)))
    with QUIET.bar("", iterations) as bar:
        invert(
            network,
            lambda: shown(generator(latents)),
            learners,
            iterations=iterations,
            swing_generator=rng.generator("swing"),
            advice=Advice(0, "rates"),
            bar=bar,
        )


def run(model: FloatModel, args: argparse.Namespace, curve: Curve) -> None:
    """Go one way."""
    options: dict[str, Any] = {"method": "genie_d", "statistics": "batch", "channel_weights": "mean", "swing": True}
    network, rng = InvertedNetwork(model, **options), Rng(args.seed)
    generator = make_generator("light", 256, (3, *model.preprocess.input_size), model.device)
    generator.reset(rng.generator("generator"))

    def latents(name: str) -> Tensor:
        shape = (args.batch_size, *generator.latent_shape)
        return torch.randn(shape, generator=rng.generator(name)).requires_grad_()

    as_is: Callable[[Tensor], Tensor] = lambda images: images  # noqa: E731
    if args.way == "warm":
        train(network, generator, latents("other"), as_is, args.iterations, 1.0, rng.child("other"))
    first, decay = args.iterations // 2, GenieD().generator_decay ** (args.iterations / 2 / 100)
    curve.begin()
    mine = latents("latents")
    if args.way in ("plain", "warm"):
        train(network, generator, mine, as_is, args.iterations, 1.0, rng)
        return
    smaller: Callable[[Tensor], Tensor] = lambda images: nn.functional.avg_pool2d(images, 2)  # noqa: E731
    train(network, generator, mine, smaller if args.way == "half" else as_is, first, 1.0, rng)
    second = Shorter(model, **options) if args.way == "late" else network
    train(second, generator, mine, as_is, args.iterations - first, decay, rng.child("second"))


def main() -> None:
    """Do one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, choices=NETWORKS)
    parser.add_argument("--weights")
    parser.add_argument("--way", required=True, choices=["plain", "warm", "half", "late"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "generator_ways")
    args = parser.parse_args()
    path: Path = args.out / f"{args.network}--{args.way}--{args.batch_size}--{args.iterations}--{args.seed}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    model = open_model(NETWORKS[args.network], weights=args.weights)
    curve = Curve(model, args.every)
    hook = nn.modules.module.register_module_forward_hook(curve)
    run(model, args, curve)
    hook.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "network": args.network, "way": args.way, "seed": args.seed, "batch_size": args.batch_size,
        "iterations": args.iterations, "curve": curve.points, "environment": environment(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
