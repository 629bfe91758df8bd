"""Time batch-norm sensitivity from the sums of one forward pass beside its definition, and compare the scores.

    python benchmarks/bn_sensitivity.py --images IMAGES

The definition (GenQ, arXiv:2312.05272, Eq. 7) runs the network on `B - 1` images for each of the `B` images of a set.
Up to `--brute-up-to` images all of these runs are made. Beyond that `--brute-images` of them are made and timed, and
their time is multiplied: the result says so. Both sides start from images in memory as the network sees them; the sums'
time is the best of `--repeats`. `IMAGES` is any source that `synthquant select` takes, drawn from at random.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthquant.core.modules import hooked
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.preprocess import model_inputs
from synthquant.data.sources import open_images
from synthquant.models.batch_norm import batch_norm_layers, batch_norm_targets
from synthquant.models.batch_norm_loss import moments as batch_moments
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.select.batch_norm import BatchNormProbe, set_sensitivity


def wall(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes on `device`, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


@contextmanager
def moments(model: FloatModel, found: dict[str, list[tuple[Tensor, Tensor, int]]]) -> Iterator[None]:
    """Note sum, sum of squares and number of the inputs of every batch norm."""
    layers = {name: layer for name, layer in batch_norm_layers(model.module).items() if layer.running_mean is not None}

    def look(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Tensor]) -> None:
            inputs = args[0]
            count = inputs.numel() // inputs.shape[1]
            mean, variance = (moment.double() for moment in batch_moments(inputs, per_image=False))
            found.setdefault(name, []).append((mean * count, (variance + mean.square()) * count, count))

        return hook

    with hooked(pre=[(layer, look(name)) for name, layer in layers.items()]):
        yield


def distance(model: FloatModel, inputs: Tensor, batch_size: int) -> float:
    """The distance of a set to the batch norms, from forward passes over that set."""
    found: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
    with torch.no_grad(), moments(model, found):
        for part in inputs.split(batch_size):
            model.module(part)
    total = 0.0
    for name, target in batch_norm_targets(model.module).items():
        if name not in found:
            continue
        count = sum(values for _, _, values in found[name])
        mean = torch.stack([sums for sums, _, _ in found[name]]).sum(0) / count
        variance = torch.stack([squares for _, squares, _ in found[name]]).sum(0) / count - mean.square()
        total += float((mean - target.mean).norm() + (variance - target.variance).norm())
    return total


def brute(model: FloatModel, inputs: Tensor, chosen: list[int], batch_size: int) -> Tensor:
    """Sensitivity of the chosen images by the definition."""
    whole = distance(model, inputs, batch_size)
    rest = [distance(model, torch.cat([inputs[:i], inputs[i + 1 :]]), batch_size) for i in chosen]
    return whole - torch.tensor(rest, dtype=torch.float64)


def fast(model: FloatModel, inputs: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """Sensitivity of all images from one pass, and the seconds of what comes after the pass."""
    probe = BatchNormProbe(model.module)
    rows = []
    with torch.no_grad():
        for part in inputs.split(batch_size):
            with probe.watch(len(part)):
                logits = model.module(part)
            rows.append(probe.rows(logits).cpu())
    table = torch.cat(rows)
    began = time.perf_counter()
    scores = set_sensitivity(table, probe.norms)
    return scores, time.perf_counter() - began


def measure(model: FloatModel, inputs: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    count = len(inputs)
    whole = count <= args.brute_up_to
    chosen = list(range(count)) if whole else torch.linspace(0, count - 1, args.brute_images).round().int().tolist()
    fast(model, inputs[: args.batch_size], args.batch_size)  # warm up
    runs = [wall(model.device, lambda: fast(model, inputs, args.batch_size)) for _ in range(args.repeats)]
    seconds, (scores, after) = min(runs, key=lambda run: run[0])
    brute_seconds, expected = wall(model.device, lambda: brute(model, inputs, chosen, args.batch_size))
    # The distance of the whole set is one of the runs, so that all of them take (1 + chosen) runs.
    extrapolated = brute_seconds * (count + 1) / (len(chosen) + 1)
    error = (scores[chosen] - expected).abs().max()
    row = {
        "images": count, "fast_seconds": seconds, "fast_seconds_after_the_pass": after,
        "brute_images_run": len(chosen), "brute_seconds_run": brute_seconds, "brute_seconds": extrapolated,
        "brute_is_extrapolated": not whole, "speedup": extrapolated / seconds,
        "largest_difference": float(error), "largest_score": float(expected.abs().max()),
        "same_order": scores[chosen].argsort().tolist() == expected.argsort().tolist(),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/cifar10-resnet20")
    parser.add_argument("--images", default="bundled/cifar10-test")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--brute-up-to", type=int, default=256)
    parser.add_argument("--brute-images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/bn_sensitivity/resnet20.json"))
    args = parser.parse_args()
    model = open_model(args.model, device=args.device)
    images = open_images(args.images)
    order = torch.randperm(len(images), generator=Rng(0).generator("draw"))[: max(args.sizes)]
    if len(order) < max(args.sizes):
        raise SystemExit(f"{args.images} holds {len(images)} images, {max(args.sizes)} are needed")
    inputs = model_inputs(images, model.preprocess, order.tolist()).to(model.device)
    result = {
        "benchmark": "bn_sensitivity", "model": args.model, "images": args.images, "batch_size": args.batch_size,
        "channels": sum(len(target.mean) for target in batch_norm_targets(model.module).values()),
        "rows": [measure(model, inputs[:size], args) for size in args.sizes],
        "environment": environment(args.device),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
