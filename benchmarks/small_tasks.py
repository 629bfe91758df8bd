"""Networks for other tasks than classes, quantized without data: classes of one channel, maps, boxes.

    python benchmarks/small_tasks.py --fashion FOLDER --work WORK [--only classify|dense|detect]

FOLDER holds Fashion-MNIST (arXiv:1708.07747) as four files in IDX form (the Debian package `dataset-fashion-mnist`
puts them in /usr/share/datasets/fashion-mnist). Trains, in minutes, a classifier of 28x28 grey images, a U-Net and a
detector of grey scenes of 64x64 with one to four items on a grid of noise; quantizes each with images that Genie-D
makes of the network alone; writes the ONNX files, runs them on held-out data and measures accuracy, mIoU or mAP
(torchmetrics, with pycocotools) beside the float network. Weights stay in WORK; results go to results/small_tasks.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import synthquant as sq
from synthquant.core.files import write_json
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import environment

ROOT = Path(__file__).parent.parent
SIDE, CELL = 64, 8
MEAN, STD = 0.5, 0.25
NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def read(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `[N, 28, 28]` in 0..1 and labels of both halves."""
    found = []
    for name in NAMES:
        content = gzip.decompress((folder / name).read_bytes())
        head = 16 if "images" in name else 8
        values = torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).copy())
        found.append(values.view(-1, 28, 28).float() / 255 if "images" in name else values.long())
    return found[0], found[1], found[2], found[3]


class Scenes:
    """Grey scenes with one to four items, drawn by their number: the same each time."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self._images, self._labels, self._seed = images, labels, seed

    def draw(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scene `[1, 64, 64]`, mask `[64, 64]` (0 is background), boxes `[K, 4]` in pixels and classes `[K]`."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        coarse = torch.rand(1, 1, 9, 9, generator=generator) * 0.5
        scene = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[0, 0]
        mask = torch.zeros(SIDE, SIDE, dtype=torch.int64)
        corners = torch.randperm(4, generator=generator)[: int(torch.randint(1, 5, (), generator=generator))]
        boxes, classes = [], []
        for corner in corners.tolist():
            index = int(torch.randint(0, len(self._images), (), generator=generator))
            size = int(torch.randint(20, 31, (), generator=generator))
            item = F.interpolate(self._images[index][None, None], size=(size, size), mode="bilinear")[0, 0]
            free = 32 - size
            top, left = (int(v) for v in torch.randint(0, free + 1, (2,), generator=generator))
            top, left = top + 32 * (corner // 2), left + 32 * (corner % 2)
            there = item > 0.1
            part = (slice(top, top + size), slice(left, left + size))
            scene[part] = torch.where(there, item, scene[part])
            mask[part] = torch.where(there, self._labels[index] + 1, mask[part])
            rows, columns = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
            boxes.append([left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1])
            classes.append(self._labels[index])
        return scene[None].clamp(0, 1), mask, torch.tensor(boxes, dtype=torch.float32), torch.tensor(classes)

    def many(self, count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        return [self.draw(number) for number in range(count)]


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """Six convolutions; logits `[B, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.features = nn.Sequential(*(block(*size) for size in sizes))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits


class UNet(nn.Module):
    """Three levels with shortcuts that are concatenated; logits `[B, 11, 64, 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down1 = (
            nn.Sequential(block(1, 12), block(12, 12)),
            nn.Sequential(block(12, 24, 2), block(24, 24)),
        )
        self.down2 = nn.Sequential(block(24, 48, 2), block(48, 48))
        self.down3 = nn.Sequential(block(48, 64, 2), block(64, 64))
        self.up2, self.up1, self.up0 = block(64 + 48, 48), block(48 + 24, 24), block(24 + 12, 24)
        self.head = nn.Conv2d(24, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.down1(first)
        third = self.down2(second)
        y = self.down3(third)
        for skip, up in ((third, self.up2), (second, self.up1), (first, self.up0)):
            y = up(torch.cat([F.interpolate(y, scale_factor=2.0), skip], 1))
        logits: Tensor = self.head(y)
        return logits


class Detector(nn.Module):
    """A box [pixels] and ten scores in 0..1 for each cell of 8x8 pixels: `[B, 64, 4]` and `[B, 64, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 96, 1), (96, 96, 1)]
        self.features = nn.Sequential(*(block(*size) for size in sizes))
        self.boxes, self.scores = nn.Conv2d(96, 4, 1), nn.Conv2d(96, 10, 1)
        steps = (torch.arange(SIDE // CELL) + 0.5) * CELL
        self.register_buffer("centres", torch.cartesian_prod(steps, steps).flip(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        sides = F.softplus(self.boxes(features).flatten(2).transpose(1, 2)) * CELL  # left, top, right, bottom
        centres = self.get_buffer("centres")
        boxes = torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], 2)
        return {"boxes": boxes, "scores": self.scores(features).flatten(2).transpose(1, 2).sigmoid()}


def cells_of(boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Which class each cell finds (10: none) and its box: the cells whose centres lie in the middle half of a box."""
    steps = (torch.arange(SIDE // CELL) + 0.5) * CELL
    centres = torch.cartesian_prod(steps, steps).flip(1)
    wanted, target = torch.full((len(centres),), 10), torch.zeros(len(centres), 4)
    for box, kind in zip(boxes, classes, strict=True):
        middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 4
        inside = ((centres - middle).abs() <= half.clamp(min=CELL / 2)).all(1)
        wanted[inside], target[inside] = kind, box
    return wanted, target


def detection_loss(output: dict[str, Tensor], wanted: Tensor, target: Tensor) -> Tensor:
    """Focal loss of the scores (arXiv:1708.02002) and generalised IoU of the boxes (arXiv:1902.09630)."""
    from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

    found = wanted < 10
    one_hot = F.one_hot(wanted, 11)[..., :10].float()
    logits = torch.logit(output["scores"], eps=1e-6)
    scores = sigmoid_focal_loss(logits, one_hot, reduction="sum")
    boxes = generalized_box_iou_loss(output["boxes"][found], target[found], reduction="sum")
    return (scores + 2 * boxes) / found.sum()


def trained(
    module: nn.Module,
    batches: Callable[[], Iterator[tuple[Tensor, ...]]],
    loss: Any,
    epochs: int,
    steps: int,
    path: Path,
) -> tuple[nn.Module, float]:
    """Train, or read what was trained; returns the network and the seconds of processor time."""
    if path.is_file():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["model"])
        return module.eval(), float(state["seconds"])
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    start = time.process_time()
    module.train()
    with ConsoleProgress().bar(f"train {path.stem}", epochs * steps) as bar:
        for _ in range(epochs):
            for images, *targets in batches():
                value = loss(module((images - MEAN) / STD), *targets)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                bar.advance(loss=float(value.detach()))
    seconds = time.process_time() - start
    torch.save({"model": module.state_dict(), "seconds": seconds}, path)
    return module.eval(), seconds


def shuffled(tensors: tuple[Tensor, ...], size: int) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
    def batches() -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(tensors[0]))
        for part in order[: len(order) // size * size].split(size):
            yield tuple(tensor[part] for tensor in tensors)

    return batches


class MeanAveragePrecision:
    """mAP of the detector: the 100 best pairs of cell and class, after suppression of overlapping ones."""

    def __init__(self) -> None:
        from torchmetrics.detection import MeanAveragePrecision as Map

        self._map = Map()

    def update(self, outputs: Any, targets: Any) -> None:
        from torchvision.ops import batched_nms

        found = []
        for boxes, scores in zip(outputs["boxes"].float(), outputs["scores"].float(), strict=True):
            cells, kinds = torch.where(scores > 0.05)
            values = scores[cells, kinds]
            kept = batched_nms(boxes[cells], values, kinds, 0.5)[:100]
            found.append({"boxes": boxes[cells][kept], "scores": values[kept], "labels": kinds[kept]})
        self._map.update(found, list(targets))

    def compute(self) -> dict[str, float]:
        values = self._map.compute()
        return {"map": float(values["map"]), "map_50": float(values["map_50"])}


def top1(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())


class MeanOverlap:
    """Mean intersection over union of the eleven classes, and share of places that are right."""

    def __init__(self) -> None:
        self._confusion = torch.zeros(11, 11, dtype=torch.int64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        pairs = targets.flatten() * 11 + outputs.argmax(1).flatten()
        self._confusion += torch.bincount(pairs, minlength=121).view(11, 11)

    def compute(self) -> dict[str, float]:
        same = self._confusion.diagonal()
        either = self._confusion.sum(0) + self._confusion.sum(1) - same
        return {"miou": float((same / either).mean()), "pixel_accuracy": float(same.sum() / self._confusion.sum())}


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Any]]):
    """Scenes in 8 bits with what is to be found in them."""

    def __init__(self, images: Tensor, targets: Any) -> None:
        self._images, self._targets = (images * 255).round().to(torch.uint8), targets

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self._images[index], self._targets[index]


def measured(
    task: str, module: nn.Module, seconds: float, test: tuple[Tensor, Any], metric: Any, args: argparse.Namespace
) -> None:
    """Quantize without data, write the files, run them; one JSON."""
    images, targets = test
    model = sq.FloatModel.from_module(
        module, input_size=images.shape[2:], mean=MEAN, std=STD, name=f"fashion-{task}", task=task
    )
    folder = args.work / f"images-{task}"
    start = time.process_time()
    made = sq.synthesize(model, count=args.count, iterations=args.inversion, folder=folder)
    result: dict[str, Any] = {
        "task": task,
        "parameters": sum(p.numel() for p in module.parameters()),
        "training_seconds": seconds,
        "synthesis": {"count": args.count, "iterations": args.inversion, "seconds": time.process_time() - start},
        "test_count": len(images),
        "rows": [],
    }
    data = Pairs(images, targets)
    for scheme in args.schemes:
        target = "ort-cpu" if scheme == "W8A8" else None  # its kernels; fewer bits are simulated in the file
        start = time.process_time()
        quant_model = sq.quantize(model, made, scheme, target=target, iterations=args.iterations)
        spent = time.process_time() - start
        row = sq.evaluate(quant_model, data, metric=metric)
        file = args.work / f"{task}-{scheme}.onnx"
        quant_model.export(file, target, images=made, **({} if target else {"preset": "simulate"}))
        runtime = sq.evaluate(file, data, metric=metric)["metrics"]
        found = {"scheme": scheme, "seconds": spent, "row": row, "onnx": runtime, "onnx_bytes": file.stat().st_size}
        result["rows"].append(found)
        print(scheme, {key: value for key, value in row.items() if key != "outputs"}, runtime, flush=True)
    result["environment"] = environment()
    out = ROOT / "results" / "small_tasks" / f"{task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)


def main() -> None:
    """Train, quantize and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fashion", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", choices=("classify", "dense", "detect"))
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--inversion", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A8", "W4A4"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train_images, train_labels, test_images, test_labels = read(args.fashion)
    wanted = [args.only] if args.only else ["classify", "dense", "detect"]
    if "classify" in wanted:
        torch.manual_seed(0)
        tensors = (train_images[:, None], train_labels)
        network, seconds = trained(
            Classifier(), shuffled(tensors, 128), F.cross_entropy, 4, 60000 // 128, args.work / "classify.pt"
        )
        if not args.train_only:
            measured("classify", network, seconds, (test_images[:, None], test_labels), top1, args)
    if "dense" in wanted or "detect" in wanted:
        many = Scenes(train_images, train_labels, 1).many(12_000)
        unseen = Scenes(test_images, test_labels, 2).many(1_000)
        scenes, test = (torch.stack([one[0] for one in part]) for part in (many, unseen))
    if "dense" in wanted:
        torch.manual_seed(0)
        masks = torch.stack([one[1] for one in many])
        network, seconds = trained(
            UNet(), shuffled((scenes, masks), 32), F.cross_entropy, 4, 12_000 // 32, args.work / "dense.pt"
        )
        if not args.train_only:
            measured("dense", network, seconds, (test, torch.stack([one[1] for one in unseen])), MeanOverlap, args)
    if "detect" in wanted:
        torch.manual_seed(0)
        cells = [cells_of(one[2], one[3]) for one in many]
        tensors3 = (scenes, torch.stack([one[0] for one in cells]), torch.stack([one[1] for one in cells]))
        network, seconds = trained(
            Detector(), shuffled(tensors3, 32), detection_loss, 8, 12_000 // 32, args.work / "detect.pt"
        )
        if not args.train_only:
            truths = [{"boxes": one[2], "labels": one[3]} for one in unseen]
            measured("detect", network, seconds, (test, truths), MeanAveragePrecision, args)


if __name__ == "__main__":
    main()
