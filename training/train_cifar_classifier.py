"""Train a small CIFAR-10 classifier of the zoo and write its weights (fp16 safetensors) and card.

    python training/train_cifar_classifier.py --model cifar10-resnet20 --train TRAIN.parquet --test TEST.parquet --out FOLDER

Both files hold the columns `image` (struct of bytes and path) and `label`. Training resumes from `FOLDER/NAME.state.pt`;
`--minutes` stops cleanly so that the next call continues. `--half first` trains on the first half of the training
images and adds `-half` to the name. `--start` begins with given weights instead of random ones; `--teacher` adds the
divergence from a bundled network, as DeiT does (arXiv:2012.12877). `--hold-out` keeps the last training images aside, on
which the weights are compared with those of `--start`: `install_zoo.py` takes them only if they are better. `--average`
ships a moving average of the weights. The accuracy in the card is that of the last step, measured once, with the weights
as they are shipped (fp16).
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cifar import HALVES, MEAN_STD, ORIGIN, crop_and_flip, cut_out, load, mix, recolour, warp
from schedule import Average, Schedule, add_arguments, describe_run, set_rate, train
from synthquant.models.zoo import CIFAR10_PREPROCESS, NETWORKS


@dataclass(frozen=True)
class Settings:
    """How a network is trained unless an option says otherwise."""

    architecture: str
    optimizer: str
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    warmup: float
    label_smoothing: float
    augmentation: str


SETTINGS = {
    "cifar10-resnet20": Settings(
        "ResNet-20 with projection shortcuts (arXiv:1512.03385, section 4.2), 0.27 M parameters",
        *("sgd", 0.1, 5e-4, 128, 200, 0.15, 0.0, "light"),
    ),
    "cifar10-mobilenetv2": Settings(
        "MobileNetV2 of width 0.5 with CIFAR strides (arXiv:1801.04381), 0.7 M parameters",
        *("sgd", 0.2, 5e-4, 256, 100, 0.15, 0.1, "medium"),
    ),
    "cifar10-vit": Settings(
        "ViT of 6 blocks, width 128, 4 heads, patches of 4x4 (arXiv:2010.11929), 0.8 M parameters",
        *("adamw", 1e-3, 0.05, 512, 200, 0.05, 0.1, "strong"),
    ),
}
TEMPERATURE = 2.0
SUFFIX = {"all": "", "first": "-half", "second": "-second-half"}
IMAGES = {"all": "all training images", "first": "the first half of the training images",
          "second": "the second half of the training images"}  # fmt: skip
AUGMENTATION = {
    "light": "random crop after reflection padding by 4 pixels and random flip, per image",
    "medium": "crop and flip, cutout of 8 pixels, per image",
    "strong": "crop and flip, random affine, brightness, contrast and saturation, cutout of 8 pixels, per image; "
    "CutMix or Mixup of every second batch",
}


class ClassifierTrainer:
    """One epoch a round, every image once."""

    def __init__(
        self, model: nn.Module, settings: Settings, images: Tensor, labels: Tensor, device: torch.device,
        compiled: bool, teacher: nn.Module | None = None, average_decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.model = model.to(device, memory_format=torch.channels_last)
        self.settings, self.device = settings, device
        self.average = Average([self.model], average_decay)
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = (value.to(device) for value in MEAN_STD)
        self.teacher = teacher if teacher is None else teacher.eval().to(device, memory_format=torch.channels_last)
        if compiled:
            self.model.compile()
        parameters = list(model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = device.type == "cuda"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=fused)
            if settings.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=settings.lr, fused=fused)
        )

    def begin_round(self) -> None:
        self.model.train()
        order = torch.randperm(len(self.images), device=self.device)
        size = self.settings.batch_size
        self.batches = iter(order[: len(order) // size * size].split(size))

    def step(self, rate: float) -> Tensor:
        index = next(self.batches)
        images, labels = self.images[index].float().div_(255), self.labels[index]
        images = crop_and_flip(images)
        kind = self.settings.augmentation
        if kind == "strong":
            images = recolour(warp(images))
        if kind in ("medium", "strong"):
            images = cut_out(images, 8, self.mean)
        order, share = None, 1.0
        if kind == "strong" and torch.rand(()).item() < 0.5:
            images, order, share = mix(images)
        images = images.sub(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(images)
        loss = self._loss(logits, labels)
        if order is not None:
            loss = share * loss + (1 - share) * self._loss(logits, labels[order])
        if self.teacher is not None:
            loss = (loss + self._divergence(logits, images)) / 2
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.settings.optimizer == "adamw":
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        return loss.detach()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.settings.label_smoothing)

    def _divergence(self, logits: Tensor, images: Tensor) -> Tensor:
        """Divergence of the teacher's classes from ours, both at `TEMPERATURE` (arXiv:1503.02531, section 2)."""
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher(images).div(TEMPERATURE).log_softmax(1)
        found = logits.float().div(TEMPERATURE).log_softmax(1)
        return TEMPERATURE**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Top-1 in 0..1 on uint8 images."""
    model.eval().to(device)
    mean, std = (value.to(device) for value in MEAN_STD)
    hits = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        logits = model(x.to(device).float().div(255).sub(mean).div(std))
        hits += int((logits.argmax(1) == y.to(device)).sum())
    return hits / len(labels)


def bundled(name: str) -> nn.Module:
    """A network of the zoo with its weights."""
    model = NETWORKS[name].build(10)
    model.load_state_dict(load_file(NETWORKS[name].weights))
    return model


def held_out(
    model: nn.Module, images: Tensor, labels: Tensor, device: torch.device, start: str | None
) -> dict[str, Any]:
    """What a card says of the training images that were kept aside."""
    found: dict[str, Any] = {"images": len(labels), "top1": accuracy(model, images, labels, device)}
    if start:
        found["top1_of_start"] = accuracy(bundled(start), images, labels, device)
    return found


def ship(
    trainer: ClassifierTrainer, name: str, card: dict[str, Any], args: argparse.Namespace, kept: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Write the averaged weights in half precision, measure them, and write the card."""
    trainer.average.copy_to_parameters()
    weights = {
        key: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for key, value in trainer.model.state_dict().items()
    }
    # A fresh network: the trained one may be compiled.
    model = NETWORKS[args.model].build(10)
    model.load_state_dict(weights)
    if args.hold_out:
        card["held_out"] = held_out(model, *kept, trainer.device, args.start)
    images, labels = load(args.test, limit=args.limit)
    card["top1"] = accuracy(model, images, labels, trainer.device)
    card["top1_images"] = f"{len(labels)} test images, weights as shipped (fp16), last step, measured once"
    save_file(weights, args.out / f"{name}.safetensors")
    (args.out / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SETTINGS, default="cifar10-resnet20")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--half", choices=HALVES, default="all", help="which training images")
    parser.add_argument("--epochs", type=int, help="length of training, if not --total-minutes")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--augmentation", choices=AUGMENTATION)
    parser.add_argument("--start", choices=NETWORKS, help="bundled weights to begin with, of the same architecture")
    parser.add_argument("--teacher", choices=NETWORKS, help="bundled network whose classes are learned too")
    parser.add_argument("--hold-out", type=int, default=0, help="so many of the last training images are kept aside")
    parser.add_argument("--average", type=float, default=0.0, metavar="DECAY", help="of the weights' moving average")
    add_arguments(parser)
    args = parser.parse_args()

    names = ("epochs", "batch_size", "lr", "weight_decay", "augmentation")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = Settings(**(asdict(SETTINGS[args.model]) | given))
    name = args.model + SUFFIX[args.half]
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    images, labels = load(args.train, args.half, args.limit)
    count = max(0, len(labels) - args.hold_out)
    images, kept_images = images[:count], images[count:]
    labels, kept_labels = labels[:count], labels[count:]
    model = bundled(args.start) if args.start else NETWORKS[args.model].build(10)
    teacher = bundled(args.teacher) if args.teacher else None
    trainer = ClassifierTrainer(model, settings, images, labels, device, args.compile, teacher, args.average)
    steps = len(images) // settings.batch_size
    if steps == 0:
        raise SystemExit(f"{len(images)} images do not fill a batch of {settings.batch_size}; give --batch-size")
    schedule = Schedule(
        None if args.total_minutes else settings.epochs * steps, args.total_minutes, warmup=settings.warmup
    )
    args.out.mkdir(parents=True, exist_ok=True)
    done = train(
        trainer, schedule, args.out / f"{name}.state.pt", round_steps=steps, seed=args.seed,
        call_minutes=args.minutes, save_seconds=args.save_seconds,
    )  # fmt: skip
    if not done:
        return
    epochs = round(schedule.step / steps, 1)
    optional = {
        name.replace("_", "-"): value
        for name in ("augmentation", "start", "teacher", "hold_out", "average")
        if (value := getattr(args, name))
    }
    retrain = f"python training/train_cifar_classifier.py --model {args.model} --half {args.half}" + "".join(
        f" --{name} {value}" for name, value in optional.items()
    )
    card = {
        "name": name,
        "architecture": settings.architecture,
        "data": f"{IMAGES[args.half]} ({len(labels)}) of {ORIGIN}",
        "start": f"weights of zoo/{args.start}" if args.start else "random weights",
        **({"teacher": f"zoo/{args.teacher}, temperature {TEMPERATURE}, half of the loss"} if args.teacher else {}),
        "augmentation": AUGMENTATION[settings.augmentation],
        "schedule": f"{settings.optimizer}, linear warm-up over {settings.warmup:.0%}, then cosine to zero; "
        f"weight decay on weights only; label smoothing {settings.label_smoothing}; "
        + ("bfloat16 autocast" if device.type == "cuda" else "float32"),
        **({"average": f"moving average of the weights, {args.average}, is what is shipped"} if args.average else {}),
        "epochs": epochs, "batch_size": settings.batch_size, "lr": settings.lr, "weight_decay": settings.weight_decay,
        "mean": CIFAR10_PREPROCESS.mean, "std": CIFAR10_PREPROCESS.std,
        **describe_run(schedule, args.seed, device),
        "retrain": f"{retrain} --epochs {round(epochs)} --batch-size {settings.batch_size} --lr {settings.lr}"
        f" --weight-decay {settings.weight_decay} --seed {args.seed}"
        " --train TRAIN.parquet --test TEST.parquet --out FOLDER",
    }  # fmt: skip
    print(json.dumps(ship(trainer, name, card, args, (kept_images, kept_labels))))


if __name__ == "__main__":
    main()
