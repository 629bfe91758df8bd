"""Processor time of a step of fine-tuning beside one of training the float network, in turns, in one process.

    OMP_NUM_THREADS=1 python benchmarks/fine_tuning_speed.py

The step is `distill` at W4A4 without the teacher, whose forward pass stands apart; the float network's is cross-entropy
with batch norms in training mode. Both have AdamW. Medians and their ratio go to `results/fine_tuning_speed/`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from synthquant.core.allocator import ALLOCATOR
from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.data.image_set import ImageSet
from synthquant.finetune import Distill
from synthquant.finetune.losses import distillation
from synthquant.finetune.student import Student
from synthquant.models.float_model import ModelSource
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Measure one network and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/cifar10-resnet20")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fine_tuning_speed")
    args = parser.parse_args()
    ALLOCATOR.keep_freed()
    model, settings = open_model(ModelSource(source=args.model)), Distill()
    images = model.example_images(args.batch_size)
    quant_model = QuantModel.build(model, "W4A4")
    calibrate_weights(quant_model, "minmax")
    pixels = ImageSet.from_tensors(model.preprocess.pixels(images).clamp(0, 1).half(), framing="cropped")
    seen = CalibrationSet(quant_model, pixels)
    calibrate_activations(quant_model, seen, args.batch_size, "minmax", quantized_weights=True)
    student = Student(quant_model, "offsets", lsq_gradient_scale=True)
    trained = copy.deepcopy(model.module).train().requires_grad_(True)
    trainer = settings.trainer(student)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)
    with torch.no_grad():
        teacher = model.module(images)
    labels = teacher.argmax(1)

    def float_step() -> None:
        F.cross_entropy(trained(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        with student.training():
            torch.autograd.backward(distillation(teacher, student.network(images), 1.0))
            trainer.step(1.0)
            student.keep_legal()

    def teach() -> None:
        with torch.no_grad():
            model.module(images)

    works: dict[str, Callable[[], None]] = {"float": float_step, "fine_tuning": step, "teacher": teach}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(args.repeats + 2):
        for name, work in works.items():
            began = time.process_time()
            work()
            if repeat > 1:
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = medians["fine_tuning"] / medians["float"]
    content = {"model": args.model, "batch_size": args.batch_size, "seconds": medians, "ratio": ratio}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.model.rpartition('/')[2]}.json"
    write_json(path, {**content, "all": seconds, "environment": environment()})
    print(path, {name: round(1000 * value) for name, value in medians.items()}, f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
