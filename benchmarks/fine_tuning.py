"""Ways of fine-tuning side by side, on the same start, from 100,000 images of training each: one JSON for each row.

    python benchmarks/fine_tuning.py --real TRAIN.parquet --test bundled/cifar10-test --work WORK

Rows come in the order of `rows()`; called again, finished ones are left out and a killed one goes on. Each row keeps
what it did on each image, so that rows are compared in pairs (`evaluate.paired`). Nothing is chosen by the test images.
`--only PART` does the rows whose names have that part in them, `--dry-run` says which are missing.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from synthquant.core.files import write_json
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import RunRecord, environment
from synthquant.data.preprocess import input_batches
from synthquant.data.sources import open_images
from synthquant.evaluate.paired import PerImage
from synthquant.export.checkpoint import load_checkpoint
from synthquant.models.float_model import ModelSource
from synthquant.models.open import open_model
from synthquant.pipeline import run
from synthquant.recipe import Recipe

ROOT = Path(__file__).parent.parent
SYNTHETIC: dict[str, Any] = {"method": "genie_d"}
LSQ: dict[str, Any] = {"method": "distill", "form": "weights", "distillation": 0.0, "cross_entropy": 1.0}
GENERATORS = ("gdfq", "dsg_qat", "adadfq")
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "start": ("genie_d", None),
    "genq": ("genie_d", {"method": "distill"}),
    "lsq-real": ("real", LSQ),
    "gdfq": ("genie_d", {"method": "gdfq"}),
    "dsg_qat": ("genie_d", {"method": "dsg_qat"}),
    "adadfq": ("genie_d", {"method": "adadfq"}),
    "genq-low_pass": ("genie_d-low_pass", {"method": "distill"}),
    "genq-renewal": ("genie_d", {"method": "distill", "renewal": {}}),
    "genq-real": ("real", {"method": "distill"}),
}
"""Name: images that are trained on, and the section `finetune`; none: the quantized network as it is."""


@dataclass(frozen=True)
class Row:
    """One network to be trained."""

    scheme: str
    way: str
    seed: int
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.scheme}--{self.way}--{self.seed}")


def rows(seeds: list[int]) -> Iterator[Row]:
    """All rows, those that decide first: starts, the best way's candidates and the ceiling."""
    for scheme in ("W3A3", "W4A4"):
        for way in WAYS:
            yield Row(scheme, way, 0)
    for way in ("start", "genq", "lsq-real"):
        yield Row("W2A4", way, 0)
    for seed in seeds:
        for scheme in ("W3A3", "W4A4"):
            for way in ("start", "genq", "gdfq", "lsq-real"):
                yield Row(scheme, way, seed)


def images_of(args: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """The recipe's section: images made once for a seed, or real ones, as many."""
    if kind == "real":
        return {"source": args.real, "count": args.count}
    folder = args.work / f"images-{kind}-{seed}"
    made = {**SYNTHETIC, "count": args.count, "iterations": args.synthesis_iterations}
    if kind == "genie_d-low_pass":
        made["low_pass"] = args.low_pass
    recipe = {"model": args.model, "images": made, "quantize": {"method": "rtn", "scheme": "W8A8"}, "seed": seed}
    run(Recipe.parse(recipe), folder, ConsoleProgress())
    return {"source": str(folder / "images")}


def measure(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    """Quantize, train and measure one network."""
    images, finetune = WAYS[row.way]
    scheme = {"preset": row.scheme, "ends": "same"}
    started = args.work / f"{row.scheme}--start--{row.seed}"
    learned = {"method": "genie_m", "iterations": args.unit_iterations}
    quantize: dict[str, Any] = {**learned, "scheme": scheme}
    run(
        Recipe.parse({"model": args.model, "images": images_of(args, "genie_d", row.seed), "quantize": quantize,
                      "evaluate": args.test, "seed": row.seed}),
        started, ConsoleProgress(),
    )  # fmt: skip
    folder = started
    before = resource.getrusage(resource.RUSAGE_SELF)
    if finetune is not None:
        folder = args.work / row.name
        steps = -(-args.images // args.batch_size)
        tuned = {**finetune, "iterations": steps, "batch_size": args.batch_size}
        for change in args.set:
            name, _, value = change.partition("=")
            tuned[name] = float(value)
        recipe = {"model": args.model, "images": images_of(args, images, row.seed), "quantize": {"run": str(started)},
                  "finetune": tuned, "evaluate": args.test, "seed": row.seed}  # fmt: skip
        run(Recipe.parse(recipe), folder, ConsoleProgress())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **results(args, folder),
        "user_seconds": round(used.ru_utime - before.ru_utime, 1),
        "system_seconds": round(used.ru_stime - before.ru_stime, 1),
    }


@torch.no_grad()
def results(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracy rows of a run, what it and the float network did on each image, and the points of training."""
    record = RunRecord.load(folder / "run.json")
    model = open_model(ModelSource(source=args.model))
    network, data = load_checkpoint(folder / "model", float_model=model), open_images(args.test)
    reference, logits, labels = [], [], []
    for batch in input_batches(data, model.preprocess, 250):
        assert batch.labels is not None
        reference.append(model.module(batch.inputs))
        logits.append(network(batch.inputs))
        labels.append(batch.labels)
    of_float = PerImage.of(torch.cat(reference), torch.cat(labels), torch.cat(reference))
    of_network = PerImage.of(torch.cat(logits), torch.cat(labels), torch.cat(reference))
    tuned = record.stages["finetune"].metrics if "finetune" in record.stages else {}
    return {
        "accuracy": record.stages["evaluate"].metrics["accuracy"],
        "images": {"float": of_float.packed(), "quantized": of_network.packed()},
        "points": tuned.get("points"),
        "best_step": tuned.get("best_step"),
        "recipe": without_folders(record.recipe),
    }


def without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose images are named by the last two parts of their path, whatever machine they were on."""
    images = recipe["images"]
    source = images.get("source") if isinstance(images, dict) else None
    if source is None or not Path(source).is_absolute():
        return recipe
    return {**recipe, "images": {**images, "source": "/".join(Path(source).parts[-2:])}}


def main() -> None:
    """Do the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/cifar10-resnet20")
    parser.add_argument("--real", required=True, help="real training images, for the ceiling")
    parser.add_argument("--test", default="bundled/cifar10-test")
    parser.add_argument("--count", type=int, default=2048, help="images in the pool")
    parser.add_argument("--synthesis-iterations", type=int, default=300)
    parser.add_argument("--unit-iterations", type=int, default=500)
    parser.add_argument("--images", type=int, default=100_000, help="images of training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--low-pass", type=float, default=0.36)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2], help="besides 0")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of all sections `finetune`")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "fine_tuning")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fine_tuning")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    wanted = [row for row in rows(args.seeds) if all(part in row.name for part in args.only)]
    missing = [row for row in wanted if not (args.out / f"{row.name}.json").is_file()]
    print(f"{len(missing)} of {len(wanted)} rows are missing: {', '.join(row.name for row in missing)}", flush=True)
    if args.dry_run:
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("model", "count", "synthesis_iterations", "unit_iterations")}
    settings |= {"images": args.images, "batch_size": args.batch_size, "set": args.set}
    for row in missing:
        found = measure(args, row)
        content = {"name": row.name, "scheme": row.scheme, "way": row.way, "seed": row.seed, "settings": settings}
        write_json(args.out / f"{row.name}.json", {**content, **found, "environment": environment()})
        print(row.name, found["accuracy"][1]["top1"], found["accuracy"][1]["agreement"], flush=True)


if __name__ == "__main__":
    main()
