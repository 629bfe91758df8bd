"""Draw samples of the zoo's diffusion models, look at them with classifiers, and write figures and a contact sheet.

    python training/check_generators.py --text2image FOLDER --ddpm FOLDER --train TRAIN.parquet --test TEST.parquet \
        --classifier cifar10-resnet20-half=FILE.safetensors --out results/zoo

Give one classifier or several; the first one's features also serve for the Frechet distance (FID). They are not
Inception's, so that these distances compare with each other and with nothing published. `OUT/NAME.json` and
`OUT/NAME.png` are written for each model.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from cifar import load
from classifier import Classifier
from synthquant.evaluate.feature_distances import frechet_distance
from synthquant.models.zoo import CIFAR10_CLASSES
from synthquant.synthesize.flaws import black, constant
from synthquant.synthesize.prompts import TEMPLATES


def _uint8(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


def _in_batches(count: int, batch_size: int, seed: int, draw: Callable[[range, torch.Generator], Any]) -> Tensor:
    """Samples uint8 `[count, 3, H, W]`; every batch has a generator of its own, on the CPU, the same for any device."""
    found = []
    for start in range(0, count, batch_size):
        numbers = range(start, min(count, start + batch_size))
        found.append(_uint8(draw(numbers, torch.Generator().manual_seed(seed * 1_000_003 + start))))
    return torch.cat(found)


def sample_text2image(folder: Path, args: argparse.Namespace, count: int) -> tuple[Tensor, Tensor]:
    """Samples with a template drawn for each, classes in turn; and the classes."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(count) % len(CIFAR10_CLASSES)
    choice = torch.randint(0, len(TEMPLATES), (count,), generator=torch.Generator().manual_seed(args.seed)).tolist()

    def draw(numbers: range, generator: torch.Generator) -> Any:
        prompts = [TEMPLATES[choice[n]].format(CIFAR10_CLASSES[n % len(CIFAR10_CLASSES)]) for n in numbers]
        return pipeline(
            prompts, guidance_scale=args.guidance, num_inference_steps=args.steps, generator=generator, output_type="np"
        ).images

    return _in_batches(count, args.batch_size, args.seed, draw), labels


def sample_ddpm(folder: Path, args: argparse.Namespace, count: int) -> Tensor:
    """Samples of the unconditional model."""
    pipeline = DDIMPipeline.from_pretrained(folder).to(args.device)
    pipeline.set_progress_bar_config(disable=True)

    def draw(numbers: range, generator: torch.Generator) -> Any:
        return pipeline(
            batch_size=len(numbers), num_inference_steps=args.steps, generator=generator, output_type="np"
        ).images

    return _in_batches(count, args.batch_size, args.seed, draw)


def recognised(classifier: Classifier, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Share of images that the classifier puts into their class, and that share for each class."""
    hits = classifier.classes(images) == labels
    by_class = {name: round(hits[labels == i].double().mean().item(), 4) for i, name in enumerate(CIFAR10_CLASSES)}
    return {"share": hits.double().mean().item(), "by_class": by_class}


def empty_images(images: Tensor) -> dict[str, int]:
    """How many images are black or of one colour."""
    return {"count": len(images), "black": int(black(images).sum()), "constant": int(constant(images).sum())}


def distances(classifier: Classifier, samples: Tensor, reference: Tensor, train: Tensor) -> dict[str, Any]:
    """FID of samples to the real images of their model, beside FIDs between halves of real images.

    A classifier trained on one of the halves sees them differently, which is part of the distance between them.
    """
    middle = len(train) // 2
    real = classifier.features(train)
    count = min(len(samples), middle)
    found = classifier.features(samples)
    return {
        "features": f"input of the last layer of {classifier.name} ({real.shape[1]} numbers), not Inception's",
        "samples": len(samples),
        "real_images": len(reference),
        "samples_to_real": frechet_distance(found, classifier.features(reference)),
        "half_to_half": frechet_distance(real[:middle], real[middle:]),
        "half_to_half_at_that_count": {
            "images": count,
            "distance": frechet_distance(real[:count], real[middle:]),
        },
    }


def contact_sheet(images: Tensor, columns: int, limit: int = 290_000) -> bytes:
    """PNG of rows of `columns` images at twice their size; columns are left out until it is under `limit` bytes."""
    rows = len(images) // columns
    grid = images[: rows * columns].view(rows, columns, *images.shape[1:])
    while True:
        sheet = grid[:, :columns].permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        picture = Image.fromarray(sheet.numpy())
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        if len(file.getvalue()) <= limit or columns == 1:
            return file.getvalue()
        columns -= 1


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {"sampler": "DDIM", "inference_steps": args.steps, "seed": args.seed, "device": args.device}


def check_text2image(
    args: argparse.Namespace, classifiers: list[Classifier], test: tuple[Tensor, Tensor], halves: tuple[Tensor, Tensor]
) -> tuple[dict[str, Any], bytes]:
    """Figures and contact sheet (a row for each class) of the text-to-image model."""
    began = time.monotonic()
    images, labels = sample_text2image(args.text2image, args, max(args.count, args.fid_count))
    result = {
        "name": "cifar10-text2image",
        "sampling": _sampling(args) | {"guidance": args.guidance, "prompts": "27 templates, classes in turn"},
        "seconds_sampling": round(time.monotonic() - began, 1),
        "recognised": {
            classifier.name: {
                "samples": args.count,
                **recognised(classifier, images[: args.count], labels[: args.count]),
                "real_test_images": recognised(classifier, *test)["share"],
            }
            for classifier in classifiers
        },
        "empty": empty_images(images[: args.count]),
        "empty_real_test_images": empty_images(test[0]),
        "fid": distances(classifiers[0], images, halves[1], torch.cat(halves)),
    }
    order = torch.cat([(labels == i).nonzero()[: args.columns, 0] for i in range(len(CIFAR10_CLASSES))])
    return result, contact_sheet(images[order], min(args.columns, len(order) // len(CIFAR10_CLASSES)))


def check_ddpm(args: argparse.Namespace, classifiers: list[Classifier], train: Tensor) -> tuple[dict[str, Any], bytes]:
    """Figures and contact sheet of the unconditional model."""
    began = time.monotonic()
    images = sample_ddpm(args.ddpm, args, max(args.count, args.fid_count))
    seconds = round(time.monotonic() - began, 1)
    classes = classifiers[0].classes(images)
    shares = torch.bincount(classes, minlength=len(CIFAR10_CLASSES)).double() / len(images)
    result = {
        "name": "cifar10-ddpm",
        "sampling": _sampling(args),
        "seconds_sampling": seconds,
        "share_of_each_class": dict(zip(CIFAR10_CLASSES, [round(s, 4) for s in shares.tolist()], strict=True)),
        "empty": empty_images(images[: args.count]),
        "fid": distances(classifiers[0], images, train, train),
    }
    return result, contact_sheet(images[: 10 * args.columns], min(args.columns, len(images) // 10))


def write(folder: Path, result: dict[str, Any], sheet: bytes) -> None:
    """Write figures and sheet under the model's name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['name']}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / f"{result['name']}.png").write_bytes(sheet)
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text2image", type=Path, help="folder of the text-to-image pipeline")
    parser.add_argument("--ddpm", type=Path, help="folder of the unconditional pipeline")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--classifier", action="append", required=True, metavar="NAME=FILE", help="may be repeated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="samples that are looked at one by one")
    parser.add_argument("--fid-count", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--columns", type=int, default=10, help="columns of the contact sheet")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--limit", type=int, help="use this many rows of each file only (to try the script)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    pairs = [given.partition("=") for given in args.classifier]
    classifiers = [Classifier(name, Path(file), torch.device(args.device)) for name, _, file in pairs]
    halves = tuple(load(args.train, half, args.limit)[0] for half in ("first", "second"))
    if args.text2image:
        test = load(args.test, limit=args.limit)
        write(args.out, *check_text2image(args, classifiers, test, (halves[0], halves[1])))
    if args.ddpm:
        write(args.out, *check_ddpm(args, classifiers, torch.cat(halves)))


if __name__ == "__main__":
    main()
