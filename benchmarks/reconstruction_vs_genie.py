"""Genie-M beside the official Genie code: same network, images, iterations, machine and process.

    python benchmarks/reconstruction_vs_genie.py --genie CHECKOUT --images IMAGES --iterations 1000

`CHECKOUT` is a clone of the authors' repository, which is only imported from there. Both quantize ResNet-20 with 8-bit
ends and report top-1 on the bundled test images, seconds, and the ratio. Repeats alternate between the two.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.data.sources import open_images
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.models.zoo import resnet_cifar as zoo_blocks
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize import GenieM


class BasicBlock(zoo_blocks.BasicBlock):
    """The same block in the form the authors' code needs: it quantizes a shortcut where it finds an Identity, lets the
    first reader of a tensor decide its bits, and knows blocks by the name of their class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the block of the zoo, with the convolution read first."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        assert self.downsample is not None
        out += self.downsample(x)
        return self.relu(out)


def clock() -> tuple[float, float]:
    """Wall time and processor time of this process; the latter hardly depends on what else the machine does."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> dict[str, float]:
    """Seconds passed, by wall clock and by processor."""
    return {"seconds": time.perf_counter() - began[0], "processor_seconds": time.process_time() - began[1]}


def official(checkout: Path, model: FloatModel, inputs: torch.Tensor, bits: tuple[int, int], iterations: int) -> Any:
    """Quantize with the authors' code; returns their network and the seconds of its reconstruction."""
    sys.path.insert(0, str(checkout))
    try:
        import reconstruct
    finally:
        sys.path.remove(str(checkout))
    teacher = copy.deepcopy(model.module)
    for block in list(teacher.modules()):
        if isinstance(block, zoo_blocks.BasicBlock):
            block.__class__ = BasicBlock
            block.downsample = block.downsample or nn.Identity()
    student = reconstruct.quantize_model(teacher, *bits, (nn.Conv2d, nn.Linear, nn.Identity))
    began = clock()
    reconstruct.reconstruct(teacher, student, inputs, ("BasicBlock", "Linear", "Conv2d"), iterations=iterations)
    return student, since(began)


def ours(model: FloatModel, images: ImageSet, bits: tuple[int, int], iterations: int, seed: int) -> Any:
    """Quantize with Genie-M; returns the network and the seconds, calibration included."""
    quant_model = QuantModel.build(
        model, {"preset": f"W{bits[0]}A{bits[1]}", "input_activations": {"symmetric": True}, "ends": "w8a8"}
    )
    began = clock()
    GenieM(iterations=iterations).apply(quant_model, images, Rng(seed))
    return quant_model, since(began)


def top1(network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose label comes first."""
    with torch.no_grad():
        hits = [
            (network(x).argmax(1) == y).sum().item() for x, y in zip(inputs.split(500), labels.split(500), strict=True)
        ]
    return sum(hits) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genie", type=Path, required=True, help="checkout of the authors' repository")
    parser.add_argument("--images", required=True, help="calibration images, in any form the command line takes")
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--bits", type=int, nargs=2, default=(4, 4), metavar=("W", "A"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = open_model("zoo/cifar10-resnet20")
    images = open_images(args.images)
    images = images.subset(range(min(args.count, len(images))))
    inputs = model_inputs(images, model.preprocess)
    test = open_images("bundled/cifar10-test")
    test_inputs, labels = model_inputs(test, model.preprocess), test.labels
    assert labels is not None
    bits = tuple(args.bits)
    rows = []
    for repeat in range(args.repeats):
        torch.manual_seed(repeat)
        np.random.seed(repeat)
        random.seed(repeat)
        network, seconds = official(args.genie, model, inputs, bits, args.iterations)
        rows.append({"code": "official", "seed": repeat, **seconds, "top1": top1(network, test_inputs, labels)})
        print(json.dumps(rows[-1]), flush=True)
        network, seconds = ours(model, images, bits, args.iterations, repeat)
        rows.append({"code": "synthquant", "seed": repeat, **seconds, "top1": top1(network, test_inputs, labels)})
        print(json.dumps(rows[-1]), flush=True)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    result = {
        "benchmark": "reconstruction_vs_genie",
        "images": len(inputs), "iterations": args.iterations, "bits": bits, "threads": args.threads,
        "float_top1": top1(model.module, test_inputs, labels), "rows": rows,
        "time_ratio": sum(mine["seconds"] / theirs["seconds"] for theirs, mine in pairs) / len(pairs),
        "processor_time_ratio": sum(b["processor_seconds"] / a["processor_seconds"] for a, b in pairs) / len(pairs),
        "top1_difference": sum(mine["top1"] - theirs["top1"] for theirs, mine in pairs) / len(pairs),
        "environment": environment(),
    }  # fmt: skip
    print(
        json.dumps(
            {key: result[key] for key in ("float_top1", "time_ratio", "processor_time_ratio", "top1_difference")}
        )
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
