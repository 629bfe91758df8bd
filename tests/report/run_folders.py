"""Run folders with made-up numbers, as the report reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synthquant.core.files import write_sealed_json, write_text
from synthquant.core.record import RunRecord, StageRecord
from synthquant.data.image_set import ImageSet

LAYERS = ("stem", "blocks.0.conv1", "blocks.0.conv2", "fc")
CLASS_NAMES = ("apple, fruit", "ball", "<cat>")


def accuracy_rows() -> list[dict[str, Any]]:
    return [
        {
            "name": "float",
            "top1": 0.9123,
            "top5": 0.99,
            "interval": [0.90, 0.92],
            "agreement": None,
            "kl": None,
            "recovery": None,
            "size_bytes": 1_090_000,
            "bit_operations": 41.8e9,
            "seconds": 1.5,
        },
        {
            "name": "genie_m",
            "top1": 0.9082,
            "top5": 0.989,
            "interval": [0.896, 0.916],
            "agreement": 0.97,
            "kl": 0.0123,
            "recovery": 0.9955,
            "size_bytes": 143_000,
            "bit_operations": 0.7e9,
            "seconds": 2.5,
            "a key of a later release": 1,
        },
    ]


def unit_rows() -> list[dict[str, Any]]:
    curve = {"steps": [0, 50, 100], "losses": [1.0, 0.5, 0.25]}
    rows = [
        {"name": f"unit {name}", "loss_start": 1.2, "loss_end": 0.2, "undecided": 0.001, "seconds": 3.0} | curve
        for name in LAYERS
    ]
    rows[2]["diverged"] = True
    return rows


def make_run(folder: Path, data: str | None = None, seed: int = 0, **changes: Any) -> Path:
    """Write a complete run; `changes` replace metrics, given as `stage__key=value` (none: leave it out)."""
    metrics: dict[str, dict[str, Any]] = {
        "model": {"name": "small", "fingerprint": "f" * 64, "class_names": list(CLASS_NAMES), "num_classes": 3},
        "images": {
            "method": "genie_d",
            "count": 9,
            "diversity": {"of": "features", "count": 9, "distance": 1.75, "effective_rank": 4.25},
        },
        "quantize": {
            "method": "genie_m",
            "scheme": "W4A4 (first and last layer W8A8)",
            "units": unit_rows(),
            "coverage": [
                {
                    "name": name,
                    "kind": "Conv2d",
                    "weight_bits": bits,
                    "input_bits": bits,
                    "parameters": 1000,
                    "macs": 64000,
                }
                for name, bits in zip(LAYERS, (8, 4, 4, 8), strict=True)
            ],
        },
        "evaluate": {
            "data": data,
            "count": 5000,
            "set_aside": [{"name": "broken.png", "reason": "truncated"}],
            "accuracy": accuracy_rows(),
            "sqnr": [
                {"name": name, "weights": 20.0 + i, "activations": 18.0, "alone": 15.0 - i, "cumulative": 12.0 - i}
                for i, name in enumerate(LAYERS)
            ],
        },
    }
    for change, value in changes.items():
        stage, _, key = change.partition("__")
        metrics[stage][key] = value
    record = RunRecord(
        stages={
            stage: StageRecord(
                status="done",
                seconds=65.0,
                peak_memory_bytes=10**9,
                metrics={key: value for key, value in values.items() if value is not None},
            )
            for stage, values in metrics.items()
        },
        environment={"python": "3.11", "torch": "2.15"},
        seed=seed,
        recipe={"model": {"source": "zoo/small"}, "quantize": {"method": "genie_m", "scheme": "W4A4"}},
    )
    folder.mkdir(parents=True)
    record.save(folder / "run.json")
    write_text(folder / "recipe.yaml", "model: {source: zoo/small}  # <b>not bold</b>\n")
    preprocess = {"input_size": [16, 16], "resize": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "model").mkdir()
    write_sealed_json(folder / "model" / "quant_config.json", {"preprocess": preprocess})
    images = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.25
    labels = torch.arange(9) % 3
    ImageSet.from_tensors(images, labels=labels, dtype="float16", method="genie_d").save(folder / "images")
    return folder


def real_images(folder: Path) -> str:
    """Save a set of real images and return its place."""
    images = torch.randint(0, 256, (6, 3, 20, 24), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    ImageSet.from_tensors(images, labels=torch.arange(6) % 3, framing="raw").save(folder)
    return str(folder)
