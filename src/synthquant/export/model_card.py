"""The model card of a quantized pipeline: what is quantized and how, what it was calibrated on, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from synthquant.core import formatting
from synthquant.core.quality_file import Quality
from synthquant.core.record import RunRecord
from synthquant.core.version import package_version
from synthquant.models.float_model import FloatModel
from synthquant.nn.coverage import summarize
from synthquant.nn.quant_model import QuantModel

_HEAD = """---
library_name: diffusers
tags:
- synthquant
- quantized
---
"""
_LOADED = """
```python
import synthquant as sq

pipe = sq.load_pipeline("FOLDER")   # needs: pip install 'synthquant[diffusion]'
image = pipe({call}).images[0]
```

`synthquant sample FOLDER --count 16 --out IMAGES` draws a set of images. diffusers alone does not open this folder: it
holds no float weights.
"""


_CALLS = {"none": "", "prompts": '"a photo"', "labels": "class_labels=[0]"}


def model_card(
    quant_model: QuantModel,
    denoiser_name: str,
    conditioning: str,
    parts: Mapping[str, str],
    size: int,
    record: RunRecord | None,
    quality: Quality | None,
) -> str:
    """Return the card as Markdown; it holds no times, so that the same network gives the same card.

    Args:
        quant_model: a pipeline's denoiser.
        denoiser_name: what the pipeline calls it.
        conditioning: what the pipeline is told of an image.
        parts: class names of all networks of the pipeline, by what it calls them.
        size: bytes of the packed denoiser.
        record: the run that made it, if it is known.
        quality: what a comparison of its images found, if there was one.
    """
    model = quant_model.float_model
    floats = sum(value.numel() for value in model.module.state_dict().values()) * torch.float32.itemsize
    summary = summarize(quant_model.coverage())
    reach = " ".join(filter(None, (_sentence(str(summary)), _sentence(summary.in_float))))
    others = [f"`{name}` ({kind})" for name, kind in sorted(parts.items()) if name != denoiser_name]
    lines = [
        _HEAD,
        f"# {model.name}, quantized: {quant_model.scheme.describe()}",
        "",
        f"The `{denoiser_name}` of {_origin(model)}, quantized by synthquant {package_version()}. {reach}",
        f"Its weights take {formatting.size(size)} on disk, in float32 {formatting.size(floats)}. "
        + (f"In floating point stay: {', '.join(others)}." if others else "The pipeline has no other networks."),
        _LOADED.format(call=_CALLS[conditioning]),
        "## How it was made",
        "",
        *_made(record),
        "",
        "## Measured quality",
        "",
        *_measured(quality),
    ]
    return "\n".join(line for line in lines if line is not None).rstrip() + "\n"


def _origin(model: FloatModel) -> str:
    """The pipeline by its name on the hub or in the package; a folder by its name, not by a path of this machine."""
    source = model.source.source.removeprefix("diffusers/")
    return f"`{model.name if Path(source).expanduser().exists() else source}`"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _made(record: RunRecord | None) -> list[str]:
    if record is None:
        return ["The run that made it is not known."]
    sections = {name: record.recipe.get(name) for name in ("images", "quantize")}
    rows = [f"| {name}.{key} | {value} |" for name, section in sections.items() for key, value in _flat(section)]
    return ["| setting | value |", "| --- | --- |", *rows, f"| seed | {record.seed} |"]


def _flat(section: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(section, dict):
        return []
    found: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            found.append((f"{prefix}{key}", str(value).replace("|", "\\|")))
    return found


def _measured(quality: Quality | None) -> list[str]:
    if quality is None:
        return ["Not measured: `synthquant compare IMAGES REFERENCE --run RUN`, then export again."]
    rows = [
        f"{formatting.count(quality.count)} images beside {formatting.count(quality.reference_count)} of the reference."
        f" Features: {quality.features}; distances in other features, or with other numbers of images, do not compare.",
        "",
        "| measure | value | 95% interval |",
        "| --- | --- | --- |",
    ]
    return rows + [f"| {one.name} | {one.value} | {one.interval} |" for one in quality.measures()]
