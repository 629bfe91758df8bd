"""Which filter finds which flaw: how many of the spoilt ones among photographs each filter takes out.

    python benchmarks/spoilt_images.py --model zoo/cifar10-resnet20-half --images bundled/cifar10-test --limit 400

Of every four images the first is spoilt, one flaw at a time. A filter keeps three quarters, so that by chance it takes
out a quarter of the spoilt ones. None of the flaws is what `bn_learned` learns from. Writes
`results/spoilt_images/MODEL.json`; `benchmarks/tables.py` makes the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.methods import SELECTORS
from synthquant.models.open import open_model
from synthquant.select import run_filters

KEPT = 0.75


def _stripes(images: Tensor) -> Tensor:
    images[:, :, ::2] = 128
    return images


def _hole(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    images[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    return images


def _contrast(images: Tensor) -> Tensor:
    return ((images.float() - 128) * 3 + 128).clamp(0, 255).byte()


# Each takes and returns uint8 `[B, 3, H, W]`, and may work in place.
FLAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "grey stripes": _stripes,
    "black hole": _hole,
    "dark": lambda images: images // 4,
    "contrast x3": _contrast,
    "without color": lambda images: images.float().mean(1, keepdim=True).byte().expand(-1, 3, -1, -1),
    "upside down": lambda images: images.flip(2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True, help="photographs of one size")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/spoilt_images"))
    args = parser.parse_args()
    model = open_model(args.model)
    plain = torch.stack([record.image for record in (open_images(args.images)[i] for i in range(args.limit))])
    spoilt = torch.arange(args.limit) % 4 == 0
    filters = [cls(keep=KEPT) for _, cls in SELECTORS.items() if cls(keep=KEPT).supports(model)]
    rows = []
    for flaw, spoil in FLAWS.items():
        images = plain.clone()
        images[spoilt] = spoil(images[spoilt])
        pool = ImageSet.from_tensors(images)
        for filter_ in filters:
            steps = [run_filters([filter_], pool, model, Rng(seed)).steps[0] for seed in args.seeds]
            found = [float((~step.stayed[spoilt]).float().mean()) for step in steps]
            rows.append({"flaw": flaw, "filter": steps[0].method, "found": found})
            print(f"{flaw:14} {steps[0].method:16} {sum(found) / len(found):.2f}", flush=True)
    result = {
        "benchmark": "spoilt_images", "model": args.model, "fingerprint": model.fingerprint, "images": args.images,
        "count": args.limit, "spoilt": int(spoilt.sum()), "kept": KEPT, "seeds": args.seeds, "rows": rows,
        "environment": environment(),
    }  # fmt: skip
    write_json(args.out / f"{args.model.rpartition('/')[2]}.json", result)


if __name__ == "__main__":
    main()
