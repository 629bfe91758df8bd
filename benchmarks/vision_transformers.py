"""Methods for vision transformers side by side on the bundled one: one JSON for each row.

    nice -n 19 python benchmarks/vision_transformers.py --real TRAIN.parquet --work WORK

Rows come in the order of `rows()`, those that decide first; called again, finished ones are left out and a killed one
goes on. Methods that only calibrate have 32 images, those that learn 256 and 500 iterations a block. Each row keeps
what it did on each image, so that rows are compared in pairs (`evaluate.paired`). `--only PART` does the rows whose
names have that part in them (all of several), `--dry-run` says which are missing.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fine_tuning import results
from synthquant.core.files import write_json
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import environment
from synthquant.pipeline import run
from synthquant.recipe import Recipe

ROOT = Path(__file__).parent.parent
SOFTMAX = {"kind": "log_sqrt2"}
LEARNED: dict[str, Any] = {"method": "genie_m", "equalize": "layer_norms", "iterations": 500}
TWIN: dict[str, Any] = {
    "attention": {"softmax": {"kind": "twin_uniform"}},
    "overrides": {"*.mlp.fc2": {"input_activations": {"kind": "twin_uniform"}}},
}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "min-max": ({"method": "rtn", "observer": "minmax"}, {}),
    "ptq4vit": ({"method": "ptq4vit"}, TWIN),
    "repq": ({"method": "repq_vit"}, {"attention": {"softmax": SOFTMAX}}),
    "erq": ({"method": "erq", "equalize": "layer_norms"}, {"attention": {"softmax": SOFTMAX}}),
    "genie_m": (LEARNED, {"attention": {"softmax": SOFTMAX}}),
    "fima": ({**LEARNED, "error": "fima"}, {"attention": {"softmax": SOFTMAX}}),
    "global_local": ({**LEARNED, "error": "global_local"}, {"attention": {"softmax": SOFTMAX}}),
}
"""Name: fields of the section `quantize`, and of its scheme beside the bits."""
LEARNING = ("genie_m", "fima", "global_local")
CALIBRATING = tuple(way for way in WAYS if way not in LEARNING)
IMAGES = ("noise", "psaq_vit", "text_to_image", "text_to_image-filtered", "real")


@dataclass(frozen=True)
class Row:
    """One network to be quantized."""

    scheme: str
    way: str
    images: str
    seed: int
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.scheme}--{self.way}--{self.images}--{self.seed}")


def rows(best: str, seeds: list[int]) -> Iterator[Row]:
    """All rows; `best` is the reconstruction that has more seeds, and images from everywhere."""
    found: dict[str, Row] = {}
    plain = [
        Row(scheme, way, images, 0) for scheme in ("W4A4", "W3A3") for way in WAYS for images in ("psaq_vit", "real")
    ]
    fine = [
        Row(scheme, way, images, 0)
        for scheme in ("W8A8", "W6A6", "W4A8")
        for way in CALIBRATING
        for images in ("psaq_vit", "real")
    ]
    sources = [Row("W4A4", way, images, seed) for images in IMAGES for way in ("repq", best) for seed in (0, *seeds)]
    again = [
        Row(scheme, way, images, seed)
        for seed in seeds
        for scheme in ("W4A4", "W3A3")
        for way in ("repq", "erq", best)
        for images in ("psaq_vit", "real")
    ]
    for row in (*plain, *fine, *sources, *again):
        found.setdefault(row.name, row)
    yield from found.values()


def images_of(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    """The recipe's section of images, and of their selection: made once for a seed and count, or real ones."""
    count = args.learned_count if row.way in LEARNING else args.count
    if row.images == "real":
        return {"images": {"source": args.real, "count": count}}
    chosen: dict[str, Any] = {}
    made: dict[str, Any] = {"method": row.images.removesuffix("-filtered"), "count": count}
    if made["method"] == "text_to_image":
        drawn = {"generator": "zoo/cifar10-text2image", "classes": "cifar10", "scheduler": "dpm++", "steps": 12}
        made |= {**drawn, "batch_size": 64}
    if row.images.endswith("-filtered"):
        made["count"] = 2 * count
        chosen = {"select": ["energy:0.7071", f"patch_similarity:{count}"]}
    if chosen:
        return {"images": made, **chosen}
    folder = args.work / f"images-{row.images}-{count}-{row.seed}"
    recipe = {"model": args.model, "images": made, "quantize": {"method": "rtn", "scheme": "W8A8"}, "seed": row.seed}
    run(Recipe.parse(recipe), folder, ConsoleProgress())
    return {"images": {"source": str(folder / "images")}}


def measure(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    """Quantize and measure one network."""
    images = images_of(args, row)
    settings, scheme = WAYS[row.way]
    if row.way in LEARNING:
        settings = {**settings, "iterations": args.iterations}
    quantize = {**settings, "scheme": {"preset": row.scheme, "ends": args.ends, **scheme}}
    recipe = {"model": args.model, **images, "quantize": quantize, "evaluate": args.test, "seed": row.seed}
    before = resource.getrusage(resource.RUSAGE_SELF)
    folder = args.work / row.name
    run(Recipe.parse(recipe), folder, ConsoleProgress())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **results(args, folder),
        "user_seconds": round(used.ru_utime - before.ru_utime, 1),
        "system_seconds": round(used.ru_stime - before.ru_stime, 1),
        "peak_memory_bytes": used.ru_maxrss * 1024,
    }


def main() -> None:
    """Do the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/cifar10-vit")
    parser.add_argument("--real", required=True, help="real training images")
    parser.add_argument("--test", default="bundled/cifar10-test")
    parser.add_argument("--count", type=int, default=32, help="images of methods that only calibrate")
    parser.add_argument("--learned-count", type=int, default=256, help="images of those that learn")
    parser.add_argument("--iterations", type=int, default=500, help="of each block")
    parser.add_argument("--ends", default="same", choices=["same", "w8a8"])
    parser.add_argument("--best", default="genie_m", choices=LEARNING, help="the reconstruction with more seeds")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2], help="besides 0")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "vision_transformers")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "vision_transformers")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    wanted = [row for row in rows(args.best, args.seeds) if all(part in row.name for part in args.only)]
    missing = [row for row in wanted if not (args.out / f"{row.name}.json").is_file()]
    print(f"{len(missing)} of {len(wanted)} rows are missing: {', '.join(row.name for row in missing)}", flush=True)
    if args.dry_run:
        return
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("model", "count", "learned_count", "iterations", "ends")}
    for row in missing:
        found = measure(args, row)
        content = {"name": row.name, "scheme": row.scheme, "way": row.way, "images_of": row.images, "seed": row.seed}
        write_json(
            args.out / f"{row.name}.json", {**content, "settings": settings, **found, "environment": environment()}
        )
        print(row.name, found["accuracy"][1]["top1"], found["accuracy"][1]["agreement"], flush=True)


if __name__ == "__main__":
    main()
