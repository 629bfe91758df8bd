"""Genie-D beside the official Genie code: same network, batch, iterations, machine and process, in alternation.

    python benchmarks/synthesis_vs_genie.py --genie CHECKOUT --iterations 20 --repeats 5

`CHECKOUT` is a clone of the authors' repository, which is only imported from there. Reported are milliseconds per
image and iteration (one batch, set-up included), the median over repeats of ours divided by theirs, and the mean loss
over the last fifth of the iterations. `--images FOLDER` keeps the images of the last repeat as two image sets, for a
comparison of the accuracies they lead to.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn, optim

from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.synthesize import GenieD
from synthquant.synthesize.inversion import PlateauSchedule


@contextlib.contextmanager
def official_code(checkout: Path, device: torch.device, image_size: int, losses: list[float]) -> Iterator[Any]:
    """The authors' module `distill`, made to run on `device`, for images of another size, with this PyTorch."""

    class Plateau(optim.lr_scheduler.ReduceLROnPlateau):
        def __init__(self, *args: Any, verbose: bool = False, **settings: Any) -> None:
            super().__init__(*args, **settings)  # `verbose` no longer exists

        def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as in PyTorch
            losses.append(float(metrics))
            super().step(metrics)

    sys.path.insert(0, str(checkout))
    try:
        distill = importlib.import_module("distill")
    finally:
        sys.path.remove(str(checkout))
    start = distill.Generator.__init__
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(mock.patch.object(Tensor, "cuda", lambda self: self))
            stack.enter_context(mock.patch.object(nn.Module, "cuda", lambda self: self))
        stack.enter_context(mock.patch.object(optim.lr_scheduler, "ReduceLROnPlateau", Plateau))
        sized = functools.partialmethod(start, image_size=image_size)
        stack.enter_context(mock.patch.object(distill.Generator, "__init__", sized))
        yield distill


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """What `run` returns, its wall-clock seconds, and the processor seconds it took."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - processor


def official(
    checkout: Path, model: FloatModel, batch: int, iterations: int, seed: int
) -> tuple[ImageSet, dict[str, Any]]:
    """One batch by the authors' code."""
    losses: list[float] = []
    torch.manual_seed(seed)
    np.random.seed(seed)
    # Theirs also computes weight gradients, as in their script, where parameters are as they were loaded.
    model.module.requires_grad_(True)
    try:
        with official_code(checkout, model.device, model.preprocess.input_size[0], losses) as distill:
            images, wall, processor = timed(
                lambda: distill.distill_data(model.module, batch, batch, iters=iterations), model.device
            )
    finally:
        model.module.requires_grad_(False)
    pixels = ImageSet.from_tensors(model.preprocess.pixels(images.cpu()), dtype="float16", method="official Genie-D")
    return pixels, row("official", seed, wall, processor, losses, batch * iterations)


def ours(model: FloatModel, batch: int, iterations: int, seed: int) -> tuple[ImageSet, dict[str, Any]]:
    """The same by `GenieD`."""
    losses: list[Tensor] = []
    step = PlateauSchedule.step

    def recorded(self: PlateauSchedule, loss: Tensor, iteration: int) -> None:
        losses.append(loss)
        step(self, loss, iteration)

    method = GenieD(batch_size=batch, iterations=iterations)
    with mock.patch.object(PlateauSchedule, "step", recorded):
        images, wall, processor = timed(lambda: method.synthesize(model, batch, Rng(seed)), model.device)
    return images, row("synthquant", seed, wall, processor, torch.stack(losses).tolist(), batch * iterations)


def row(code: str, seed: int, wall: float, processor: float, losses: list[float], work: int) -> dict[str, Any]:
    tail = losses[-max(1, len(losses) // 5) :]
    return {
        "code": code,
        "seed": seed,
        "ms_per_image_iteration": wall / work * 1e3,
        "processor_ms_per_image_iteration": processor / work * 1e3,
        "final_loss": statistics.fmean(tail),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    pairs = list(zip(rows[::2], rows[1::2], strict=True))

    def median_ratio(key: str) -> float:
        return float(statistics.median(mine[key] / theirs[key] for theirs, mine in pairs))

    return {
        "official_ms": statistics.median(theirs["ms_per_image_iteration"] for theirs, _ in pairs),
        "synthquant_ms": statistics.median(mine["ms_per_image_iteration"] for _, mine in pairs),
        "time_ratio": median_ratio("ms_per_image_iteration"),
        "processor_time_ratio": median_ratio("processor_ms_per_image_iteration"),
        "loss_ratio": median_ratio("final_loss"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genie", type=Path, required=True, help="checkout of the authors' repository")
    parser.add_argument("--model", default="zoo/cifar10-resnet20", help="network with square images")
    parser.add_argument("--weights", help="file of weights, if not the published ones")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=Path, help="folder for the images of the last repeat")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/synthesis_vs_genie/MODEL-DEVICE.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = open_model(args.model, weights=args.weights, device=args.device)
    # The first call of each pays for things that are made once per process.
    official(args.genie, model, args.batch, 2, 0)
    ours(model, args.batch, 2, 0)
    rows: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        theirs, of_theirs = official(args.genie, model, args.batch, args.iterations, repeat)
        mine, of_mine = ours(model, args.batch, args.iterations, repeat)
        rows += [of_theirs, of_mine]
        print(json.dumps(of_theirs), json.dumps(of_mine), sep="\n", flush=True)
    if args.images:
        theirs.save(args.images / "official")
        mine.save(args.images / "synthquant")
    result = {
        "benchmark": "synthesis_vs_genie",
        "model": args.model,
        "batch": args.batch,
        "iterations": args.iterations,
        "threads": args.threads,
        **summary(rows),
        "rows": rows,
        "environment": environment(args.device),
    }
    out = args.out or Path("results/synthesis_vs_genie") / f"{args.model.split('/')[-1]}-{model.device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
