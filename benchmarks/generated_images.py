"""Quantization with drawn, selected and real images: the tables of docs/results/generated-images.md.

    python benchmarks/generated_images.py --model zoo/cifar10-resnet20-half --generator zoo/cifar10-text2image \
        --classes cifar10 --real REAL --test bundled/cifar10-test --work FOLDER --seed 0 \
        --data genie_d text_to_image text_to_image+energy:0.5 text_to_image+energy:0.71+bn_sensitivity:0.71 \
               mixed tuned:1 tuned:10 real

An entry of `--data` is where images come from (`genie_d`, `text_to_image`, `mixed`: two classes in a prompt, `tuned:N`:
a token from N real images of each class, `real`) and the filters that choose from `--pool` of them. Of what is left
`--count` images are drawn at random. `REAL` must be what the network was trained on and the generator was not.
`--source` names the network that images are made and chosen for, where that is another (GenQ, arXiv:2312.05272, table
5). The sweeps (figures 5 and 6) are `--schemes W2A4 --methods genie_m` with `--data text_to_image` and `--count` 128 to
2048, and with `--count 204 --data text_to_image text_to_image+energy:0.1 ... text_to_image+bn_sensitivity:0.9`.

Rows that are there with the same budget are kept, so a stopped run goes on; seeds have files of their own in
`results/generated_images/`, so that they can run side by side.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synthquant.core.files import write_json
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.evaluate.accuracy import evaluate_model
from synthquant.make import select, synthesize
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.recipe import SelectSection, SynthesizeSection
from zero_shot_matrix import SCHEMES, row_of


def drawn_by(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """The `images` section of a recipe for one kind of drawn images."""
    if kind == "genie_d":
        return {"method": kind, "count": args.count, "iterations": args.genie_d_iterations}
    section = {
        "method": "text_to_image", "generator": args.generator, "classes": args.classes, "steps": args.steps,
        "scheduler": args.scheduler, "batch_size": args.draw_batch,
    }  # fmt: skip
    name, _, shots = kind.partition(":")
    if name == "mixed":
        return section | {"count": args.count, "classes_per_prompt": 2}
    if name == "tuned":
        tuning = {
            "images": args.real, "shots": int(shots), "iterations": args.tuning_iterations,
            "batch_size": args.tuning_batch, "initial_word": args.initial_word,
        }  # fmt: skip
        return section | {"count": args.count, "tuning": tuning}
    return section | {"count": args.pool}


def images_of(entry: str, source: FloatModel, drawn_for: FloatModel, args: argparse.Namespace) -> ImageSet:
    """The images that an entry of `--data` stands for, `--count` at most."""
    kind, *filters = entry.split("+")
    folder = args.work / args.source.rpartition("/")[2] / f"{entry}-{args.seed}".replace(":", "-")
    if kind == "real":
        images = open_images(args.real)
    else:
        section = SynthesizeSection.parse(drawn_by(kind, args), "images")
        # What a text-to-image model draws does not depend on the network.
        place = folder.parent if kind == "genie_d" else args.work
        place /= f"{kind}-{section.count}-{args.seed}".replace(":", "-")
        named = source if kind == "genie_d" else drawn_for
        images = synthesize(named, section, args.seed, place, ConsoleProgress())
    if filters:
        choice = SelectSection.parse({"by": filters}, "select")
        images = select(images, source, choice, args.seed, folder, ConsoleProgress())
    if len(images) < args.count:
        raise SystemExit(f"{entry}: {len(images)} images are left of {args.count} asked for; give a larger --pool")
    order = torch.randperm(len(images), generator=Rng(args.seed).generator("draw images"))
    return images.subset(order[: args.count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", help="network that images are made and chosen for; else --model")
    parser.add_argument("--drawn-for", help="network that drawn images name, so that others share them; else --source")
    parser.add_argument("--generator", required=True)
    parser.add_argument("--classes", required=True)
    parser.add_argument("--real", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--pool", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--scheduler", help="sampler, by the name of `synthesize`; else the generator's own")
    parser.add_argument("--draw-batch", type=int, default=64)
    parser.add_argument("--tuning-iterations", type=int, default=1000)
    parser.add_argument("--tuning-batch", type=int, default=32)
    parser.add_argument("--initial-word", default="photo")
    parser.add_argument("--genie-d-iterations", type=int, default=300)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounding-weight", type=float, help="of BRECQ; 0.1 for MobileNets")
    parser.add_argument("--schemes", nargs="+", default=["W4A4", "W2A4"], choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=["brecq", "genie_m"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="where images are kept")
    parser.add_argument("--out", type=Path, default=Path("results/generated_images"))
    args = parser.parse_args()
    args.source = args.source or args.model
    model = open_model(args.model, device=args.device)
    source = model if args.source == args.model else open_model(args.source, device=args.device)
    drawn_for = open_model(args.drawn_for, device=args.device) if args.drawn_for else source
    test = open_images(args.test)
    float_result = evaluate_model(model.module, model.preprocess, test, device=args.device)

    def measure(network: nn.Module) -> Any:
        reference = float_result.logits
        return evaluate_model(network, model.preprocess, test, reference_logits=reference, device=args.device)

    name = args.model.rpartition("/")[2]
    path = args.out / f"{name}-{args.seed}.json"
    budget = {
        key: getattr(args, key)
        for key in (
            "pool",
            "steps",
            "scheduler",
            "tuning_iterations",
            "tuning_batch",
            "genie_d_iterations",
            "iterations",
            "batch_size",
        )
    }
    rows: list[dict[str, Any]] = []
    if path.exists():
        former = json.loads(path.read_text())
        if former["budget"] == budget and former["float"]["fingerprint"] == model.fingerprint:
            rows = former["rows"]
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in args.data:
        key = {"data": entry, "source": args.source, "images": args.count}
        left = [
            (scheme, method)
            for scheme in args.schemes
            for method in args.methods
            if not any({**row, **key, "scheme": scheme, "method": method} == row for row in rows)
        ]
        if not left:
            continue
        began = time.perf_counter()
        images = images_of(entry, source, drawn_for, args)
        key["synthesis_seconds"] = round(time.perf_counter() - began, 1)
        for scheme, method in left:
            rows.append(key | row_of(model, images, scheme, method, args, measure))
            print(json.dumps(rows[-1]), flush=True)
            result = {
                "benchmark": "generated_images", "model": args.model, "generator": args.generator, "budget": budget,
                "rows": rows, "environment": environment(),
                "float": {"top1": float_result.top1, "interval": float_result.interval, "count": float_result.count,
                          "fingerprint": model.fingerprint},
            }  # fmt: skip
            write_json(path, result)


if __name__ == "__main__":
    main()
