"""Train a small CIFAR-10 classifier of the zoo and write its weights (fp16 safetensors) and card.

    python training/train_cifar_classifier.py --train TRAIN.parquet --test TEST.parquet --out FOLDER

Both files hold the columns `image` (struct of bytes and path) and `label`. Training resumes from
`FOLDER/state.pt`; `--minutes` stops cleanly so that the next call continues. The accuracy in the card is that of the
last epoch, measured once, with the weights as they are shipped (fp16).
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from synthquant.models.zoo.resnet_cifar import resnet20

MODELS = {"cifar10-resnet20": resnet20}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 `[N, 3, 32, 32]` and labels int64 `[N]`."""
    table = pq.read_table(path)
    images = [np.asarray(Image.open(io.BytesIO(r["bytes"])).convert("RGB")) for r in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def augment(images: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """Random crop after reflection padding, and random flip, drawn for each image on its own."""
    count, _, size, _ = images.shape
    device = images.device
    shift = torch.randint(0, 2 * pad + 1, (2, count, 1), device=device)
    steps = torch.arange(size, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, steps, steps.flip(0)) + shift[1]
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    rows = (steps + shift[0])[:, None, :, None]
    return padded[
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(3, device=device)[None, :, None, None],
        rows,
        columns[:, None, None, :],
    ]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in 0..1."""
    model.eval()
    with torch.no_grad():
        hits = [
            (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return sum(hits) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="cifar10-resnet20")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long; the next call continues")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    images, labels = (t.to(device) for t in load(args.train))
    images = images.float().div_(255).sub_(mean).div_(std)
    model = MODELS[args.model]().to(device, memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr, momentum=0.9, nesterov=True,
    )  # fmt: skip
    steps = len(images) // args.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.15)
    args.out.mkdir(parents=True, exist_ok=True)
    state, start, seconds = args.out / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        start, seconds = saved["epoch"], saved["seconds"]
    began = time.time()
    for epoch in range(start, args.epochs):
        torch.manual_seed(args.seed * 100_003 + epoch)
        model.train()
        order = torch.randperm(len(images), device=device)
        total = torch.zeros((), device=device)
        for index in order[: steps * args.batch_size].split(args.batch_size):
            batch = augment(images[index]).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.detach()
        spent = seconds + time.time() - began
        print(f"epoch {epoch + 1}/{args.epochs} loss {total.item() / steps:.4f} {spent:.0f} s", flush=True)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
             "epoch": epoch + 1, "seconds": spent},
            state,
        )  # fmt: skip
        if time.time() - began > args.minutes * 60:
            return
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.cpu().state_dict().items()}
    weights = {k: v.contiguous() for k, v in weights.items()}
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    test_images, test_labels = load(args.test)
    test_images = test_images.float().div_(255).sub_(mean.cpu()).div_(std.cpu())
    top1 = accuracy(model, test_images, test_labels)
    save_file(weights, args.out / f"{args.model}.safetensors")
    saved = torch.load(state, weights_only=True)
    card = {
        "name": args.model,
        "top1": top1,
        "test_images": len(test_labels),
        "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "weight_decay": args.weight_decay,
        "seed": args.seed, "mean": MEAN, "std": STD,
        "seconds": round(saved["seconds"]), "device": str(device), "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
    }  # fmt: skip
    (args.out / f"{args.model}.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
