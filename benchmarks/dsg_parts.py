"""DSG part by part, beside ZeroQ and Genie-D: the rows of docs/results/diverse-images.md.

    nice -n 19 python benchmarks/dsg_parts.py --work runs/dsg_parts [--only cifar10-resnet20] [--dry-run]

Each set of images (`PARTS`) calibrates the same rounding to nearest with every layer at the same bits, and is measured
on the bundled test images; how diverse it is stands beside. A row is one JSON file in `--out`. Images are kept below
`--work`, unfinished ones too: called again after a kill it goes on, and rows whose settings and network are the same
are not made again. `base` is the loop of DSG with all parts off, which is ZeroQ at DSG's rates and batches.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.evaluate.accuracy import Evaluation, evaluate_model
from synthquant.evaluate.diversity import measure_diversity
from synthquant.evaluate.paired import PerImage
from synthquant.make import quantize
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.recipe import QuantizeSection, SynthesizeSection
from zero_shot_matrix import synthetic_images

ROOT = Path(__file__).parent.parent
NETWORKS = ("cifar10-resnet20", "cifar10-mobilenetv2")
SCHEMES = ("W6A6", "W4A4")
SDA: dict[str, Any] = {"slack": {}}
LSE: dict[str, Any] = {"layer_enhancement": True}
SCI: dict[str, Any] = {"correlation": {}}
PRIORS = {"cross_entropy": 1.0, "total_variation": 0.07, "image_norm": 0.01}
OFF: dict[str, Any] = {"slack": None, "layer_enhancement": False, "correlation": None}

# Name -> method, and the settings in which it differs from the method's defaults.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("dsg", OFF),
    "SDA": ("dsg", OFF | SDA),
    "LSE": ("dsg", OFF | LSE),
    "SCI": ("dsg", OFF | SCI),
    "SDA+LSE+SCI": ("dsg", OFF | SDA | LSE | SCI),
    "ZeroQ": ("zeroq", {}),
    "Genie-D": ("genie_d", {}),
    "noise": ("noise", {}),
    "SDA+LSE": ("dsg", OFF | SDA | LSE),
    "SDA+SCI": ("dsg", OFF | SDA | SCI),
    "LSE+SCI": ("dsg", OFF | LSE | SCI),
    "SDA of channels": ("dsg", OFF | {"slack": {"per": "channel"}}),
    "SDA+LSE+SCI+priors": ("dsg", OFF | SDA | LSE | SCI | PRIORS),
    "Genie-D+SDA": ("genie_d", SDA),
    "Genie-D+SCI": ("genie_d", SCI),
}

# Processor seconds of an image and iteration on one thread of an AVX2 machine, and of a row beside its images.
COSTS = {"cifar10-resnet20": 0.0045, "cifar10-mobilenetv2": 0.006, "row": 30.0}


@dataclass(frozen=True)
class Row:
    """One set of images, and bits."""

    network: str
    part: str
    scheme: str
    seed: int

    @property
    def name(self) -> str:
        return "--".join(str(value).replace(" ", "-") for value in asdict(self).values())


def images_section(row: Row, args: argparse.Namespace) -> SynthesizeSection:
    """What makes the images of a row."""
    method, settings = PARTS[row.part]
    values = {"method": method, "count": args.count, **settings}
    return SynthesizeSection.parse(values | ({} if method == "noise" else {"iterations": args.iterations}), row.part)


def quantize_section(scheme: str) -> QuantizeSection:
    """What quantizes, for every set of images."""
    return QuantizeSection.parse({"method": "rtn", "scheme": {"preset": scheme, "ends": "same"}}, scheme)


def finished(row: Row, model: str, args: argparse.Namespace) -> bool:
    """Whether the row is there with these settings, of this network."""
    path = args.out / f"{row.name}.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    section = images_section(row, args)
    wanted = (model, args.count, section.settings, quantize_section(row.scheme).model_dump(mode="json"))
    return (found["fingerprint"], found["images"]["count"], found["images"]["settings"], found["settings"]) == wanted


def made(row: Row, model: FloatModel, args: argparse.Namespace) -> tuple[ImageSet, dict[str, Any]]:
    """The images of a row, and what is known of them; made once for all bits."""
    section = images_section(row, args)
    folder: Path = (
        args.work / f"{row.network}--{row.part.replace(' ', '-')}--{row.seed}--{args.count}-{args.iterations}"
    )
    note = folder.with_suffix(".json")
    began = _processor()
    images = synthetic_images(section.method, model, args.count, section.settings, row.seed, folder)
    if not note.exists():
        known = {
            "method": section.method,
            "settings": section.settings,
            "count": len(images),
            "fingerprint": images.fingerprint,
            "processor_seconds": round(_processor() - began, 1),  # of the last sitting
            "diversity": measure_diversity(model, images, most=args.count).row(),
        }
        write_json(note, known)
    return images, json.loads(note.read_text())


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def do_row(row: Row, model: FloatModel, test: ImageSet, floating: Evaluation, args: argparse.Namespace) -> None:
    """Quantize with the images of a row, measure, and keep the row."""
    began = time.perf_counter()
    images, known = made(row, model, args)
    section = quantize_section(row.scheme)
    quant_model, _ = quantize(model, section, images, row.seed)
    found = evaluate_model(quant_model, model.preprocess, test, reference_logits=floating.logits)
    assert test.labels is not None
    content = {
        "benchmark": "dsg_parts",
        **asdict(row),
        "settings": section.model_dump(mode="json"),
        "fingerprint": model.fingerprint,
        "float_top1": floating.top1,
        "top1": found.top1,
        "interval": found.interval,
        "agreement": found.agreement,
        "kl": found.kl,
        "count": found.count,
        "per_image": PerImage.of(found.logits, test.labels, floating.logits).packed(),
        "images": known,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{row.name}.json", content)
    short = {key: content[key] for key in ("top1", "agreement", "kl")} | known["diversity"]
    print(row.name, json.dumps(short), flush=True)


def estimate(rows: list[Row], args: argparse.Namespace) -> float:
    """Processor seconds of the rows that are missing."""
    seconds, sets = 0.0, set()
    for row in rows:
        seconds += COSTS["row"]
        if (row.network, row.part, row.seed) not in sets and row.part != "noise":
            sets.add((row.network, row.part, row.seed))
            seconds += COSTS[row.network] * args.count * args.iterations
    return seconds


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", action="append", default=[], help="part of a row's name")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--test", default="bundled/cifar10-test")
    parser.add_argument("--test-limit", type=int, help="the first so many of them, to try this script")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "dsg_parts")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "dsg_parts")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Do what is missing."""
    args = parsed()
    torch.set_num_threads(1)
    test = open_images(args.test)
    if args.test_limit is not None:
        test = test.subset(range(args.test_limit))
    rows = [
        Row(network, part, scheme, seed)
        for seed in args.seeds
        for part in args.parts
        for network in args.networks
        for scheme in args.schemes
    ]
    rows = [row for row in rows if all(part in row.name for part in args.only)]
    models = {network: open_model(f"zoo/{network}", device="cpu") for network in args.networks}
    missing = [row for row in rows if not finished(row, models[row.network].fingerprint, args)]
    hours = estimate(missing, args) / 3600
    print(
        f"{len(missing)} of {len(rows)} rows are missing: about {hours:.1f} processor hours at one thread", flush=True
    )
    if args.dry_run:
        return
    floating = {
        network: evaluate_model(model.module, model.preprocess, test)
        for network, model in models.items()
        if any(row.network == network for row in missing)
    }
    for row in missing:
        do_row(row, models[row.network], test, floating[row.network], args)


if __name__ == "__main__":
    main()
