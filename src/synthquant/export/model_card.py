"""Model cards in the form of Hugging Face: what is quantized and how, what it was calibrated on, what was measured.

That of a checkpoint is made from its files and those of its run, and opens no network. A card says what is known: where
nothing was measured it has no number. It holds no times and no paths of this machine, so that the same network gives
the same card.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from synthquant.core import formatting
from synthquant.core.errors import InputError
from synthquant.core.quality_file import Quality, read_quality
from synthquant.core.record import RunRecord
from synthquant.core.run_metrics import CheckpointMetrics, ImagesMetrics, QuantizeMetrics
from synthquant.core.version import package_version
from synthquant.export.measured import (
    HUB_NAME,
    TASKS,
    Measured,
    made_itself,
    measured_lines,
    model_index,
    quality_lines,
    shown,
)
from synthquant.export.quant_config import CONFIG_NAME, WEIGHTS_NAME, FloatModelEntry, QuantConfig, read_config
from synthquant.models.float_model import IN_MEMORY, FloatModel
from synthquant.models.user_file import names_code
from synthquant.nn.coverage import CoverageSummary, summarize
from synthquant.nn.quant_model import QuantModel

CARD_NAME = "README.md"
"""Beside a checkpoint, where the hub looks for it."""

_EXTRAS = {"timm": "models", "torchvision": "models", "transformers": "models", "diffusers": "diffusion"}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_CALLS = {"none": "", "prompts": '"a photo"', "labels": "class_labels=[0]"}
_PIPELINE = """
```python
import synthquant as sq

pipe = sq.load_pipeline("FOLDER")   # needs: pip install 'synthquant[diffusion]'
image = pipe({call}).images[0]
```

`synthquant sample FOLDER --count 16 --out IMAGES` draws a set of images. diffusers alone does not open this folder: it
holds no float weights.
"""
_DENOISER = """```python
import synthquant as sq

pipe = sq.load_pipeline("FOLDER")  # the pipeline that was quantized, with this denoiser in it; called as that is
```

FOLDER is the one that holds this file; it needs `pip install 'synthquant[diffusion]'`."""
_IMAGES = """```python
import torch
import synthquant as sq

quant_model = sq.load("FOLDER"{second})
preprocess = quant_model.float_model.preprocess
pixels = torch.rand(1, {channels}, {height}, {width})  # images [B, C, H, W], values 0..1
with torch.no_grad():
    outputs = quant_model(preprocess.normalize(pixels))
```

FOLDER is the one that holds this file{needs}. `preprocess([image], "raw")` resizes and crops images `[C, H, W]` of any
size, uint8 or 0..1, and normalises them."""
_INPUTS = """```python
import synthquant as sq

quant_model = sq.load("FOLDER"{second})
```

FOLDER is the one that holds this file{needs}. The quantized network takes and gives what the float one does."""


def checkpoint_card(
    folder: Path, *, license: str | None = None, measured: Mapping[str, Any] | None = None, data: str | None = None
) -> str:
    """Return the card of a checkpoint as Markdown.

    Args:
        folder: of a run, of its checkpoint, or of another checkpoint.
        license: an identifier of the hub, such as `apache-2.0`; none: the card does not say one.
        measured: what `synthquant.evaluate` returned of this network, in place of what its run measured.
        data: what that was measured on, in words.

    Raises:
        ModelError: there is no checkpoint, or it is damaged.
        InputError: the record of the run is damaged, or the license is no identifier.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(f"license {license!r}: give an identifier of the hub, such as apache-2.0, mit or other")
    checkpoint = folder if (folder / CONFIG_NAME).is_file() else folder / "model"
    config, run = read_config(checkpoint), checkpoint.parent
    record = _record_of(run, config) if checkpoint.name == "model" else None
    found = Measured.by_run(record) if measured is None else Measured.by_verb(measured, data or "the images given")
    quality = read_quality(run) if record is not None else None
    entry, scheme = config.float_model, config.scheme.name
    weights = formatting.size((checkpoint / WEIGHTS_NAME).stat().st_size)
    zero_shot = ["zero-shot"] if record is not None and made_itself(record) else []
    head = {
        "library_name": "synthquant",
        "license": license,
        **_base_model(entry),
        "pipeline_tag": TASKS.get(entry.task),
        "tags": ["synthquant", "quantized", scheme.lower(), *zero_shot],
        **model_index(f"{entry.name}-{scheme}", entry, found, record),
    }
    lines = [
        _front(head),
        f"# {entry.name}, quantized: {config.scheme_summary}",
        "",
        f"{_named(entry)}, quantized by synthquant {config.synthquant_version}. Its weights take {weights} on disk.",
        "",
        "## What is quantized",
        "",
        *_coverage(config, record),
        "",
        "## How to load it",
        "",
        _loading(config),
        "",
        "## How it was made",
        "",
        *_made(record),
        "",
        "## Measured quality",
        "",
        *(quality_lines(quality) if entry.task == "denoise" else []),
        *([""] if entry.task == "denoise" and found else []),
        *(measured_lines(found) if found or entry.task != "denoise" else []),
        "",
        "## Limits",
        "",
        *(f"- {line}" for line in _limits(entry, found, record)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def pipeline_card(
    quant_model: QuantModel,
    denoiser_name: str,
    conditioning: str,
    parts: Mapping[str, str],
    size: int,
    record: RunRecord | None,
    quality: Quality | None,
) -> str:
    """Return the card of a folder that holds a whole quantized pipeline, as Markdown.

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
    others = [f"`{name}` ({kind})" for name, kind in sorted(parts.items()) if name != denoiser_name]
    lines = [
        _front({"library_name": "diffusers", "tags": ["synthquant", "quantized"]}),
        f"# {model.name}, quantized: {quant_model.scheme.describe()}",
        "",
        f"The `{denoiser_name}` of {_origin(model)}, quantized by synthquant {package_version()}."
        f" {_in_words(summarize(quant_model.coverage()))}",
        f"Its weights take {formatting.size(size)} on disk, in float32 {formatting.size(floats)}. "
        + (f"In floating point stay: {', '.join(others)}." if others else "The pipeline has no other networks."),
        _PIPELINE.format(call=_CALLS[conditioning]),
        "## How it was made",
        "",
        *_made(record),
        "",
        "## Measured quality",
        "",
        *quality_lines(quality),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front(fields: Mapping[str, Any]) -> str:
    """What a card begins with for the hub; fields without a value are left out."""
    said = {name: value for name, value in fields.items() if value is not None}
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _record_of(run: Path, config: QuantConfig) -> RunRecord | None:
    """The record of the run that wrote a checkpoint; none if it wrote another one, or there is no run."""
    if not (run / "run.json").is_file():
        return None
    record = RunRecord.load(run / "run.json")
    written = record.metrics("checkpoint", CheckpointMetrics).weights_sha256
    return record if written in (None, config.weights_sha256) else None


def _base_model(entry: FloatModelEntry) -> dict[str, Any]:
    """The float network by its name on the hub, where that is known: published weights, not a file or a folder."""
    library, _, name = entry.source.source.partition("/")
    here = Path(name).expanduser().exists()
    if entry.source.weights is not None or library not in ("timm", "transformers", "diffusers") or here:
        return {}
    if library == "timm":  # the tag says which weights of several
        name = f"timm/{name}" if "." in name else ""
    return {"base_model": name, "base_model_relation": "quantized"} if HUB_NAME.fullmatch(name) else {}


def _named(entry: FloatModelEntry) -> str:
    """The float network as the user named it, without the folders of this machine."""
    source, weights = entry.source.source, entry.source.weights
    if source.startswith(f"{IN_MEMORY}/"):
        return f"`{entry.name}`, a network that was given in memory"
    with_weights = "" if weights is None else f" with weights of `{Path(weights).name}`"
    library, _, name = source.partition("/")
    local = library in ("transformers", "diffusers") and Path(name).expanduser().exists()
    shown = entry.name if local else Path(source).name if names_code(source) else source
    return f"`{shown}`{with_weights}"


def _origin(model: FloatModel) -> str:
    """The pipeline by its name on the hub or in the package; a folder by its name, not by a path of this machine."""
    source = model.source.source.removeprefix("diffusers/")
    return f"`{model.name if Path(source).expanduser().exists() else source}`"


def _coverage(config: QuantConfig, record: RunRecord | None) -> list[str]:
    weights = [entry for entry in config.layers if entry.weights is not None]
    numbers = sum(torch.Size(entry.shape).numel() for entry in weights)
    bits = _counted(entry.weights.num_bits for entry in weights if entry.weights is not None)
    read = _counted(entry.input_activations.num_bits for entry in config.layers if entry.input_activations is not None)
    lines = [f"{formatting.count(numbers)} weights in {len(weights)} layers have codes: {bits}."] if weights else []
    lines += [f"What layers read is quantized: {read}."] if read else []
    totals = None if record is None else record.metrics("quantize", QuantizeMetrics).coverage_summary
    if totals is not None:
        lines.append(_in_words(CoverageSummary(**totals.model_dump())))
    return lines


def _counted(bits: Iterable[int]) -> str:
    counted = sorted(Counter(bits).items())
    return ", ".join(f"{count} {'layer' if count == 1 else 'layers'} of {one} bits" for one, count in counted)


def _in_words(summary: CoverageSummary) -> str:
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in (str(summary), summary.in_float) if text)


def _loading(config: QuantConfig) -> str:
    """Lines of Python that load the checkpoint."""
    entry, source = config.float_model, config.float_model.source.source
    if entry.task == "denoise":
        return _DENOISER
    extra = _EXTRAS.get(source.partition("/")[0])
    second, needs = "", f"; it needs `pip install 'synthquant[{extra}]'`" if extra else ""
    if config.float_graph_sha256 is not None:
        second, needs = ", trust_code=True", ", and the float network as a program, which is read by those who trust it"
    elif config.preprocess is None:
        second = ", sq.FloatModel.from_module(module, example=example)"
        needs = ", `module` the float network and `example` inputs that it takes"
    elif source.startswith(f"{IN_MEMORY}/"):
        second, needs = ", module", f", and `module` a `{entry.name}`, whose weights do not matter"
    elif names_code(source):
        second, needs = f', "{Path(source).name}"', f", and `{Path(source).name.rpartition(':')[0]}` the network's code"
    if config.preprocess is None:
        return _INPUTS.format(second=second, needs=needs)
    height, width = config.preprocess.input_size
    channels = config.preprocess.channels
    return _IMAGES.format(second=second, needs=needs, channels=channels, height=height, width=width)


def _made(record: RunRecord | None) -> list[str]:
    if record is None:
        return ["The run that made it is not known."]
    images = record.metrics("images", ImagesMetrics)
    lines = []
    if images.count is not None:
        how = f"made with `{images.method}`, none of them real" if made_itself(record) else "given"
        lines = [f"It was quantized with {formatting.count(images.count)} samples that were {how}.", ""]
    sections = {name: record.recipe.get(name) for name in ("images", "select", "quantize", "finetune")}
    rows = [f"| {name}.{key} | {value} |" for name, section in sections.items() for key, value in _flat(section)]
    return [*lines, "| setting | value |", "| --- | --- |", *rows, f"| seed | {record.seed} |"]


def _flat(section: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(section, dict):
        return []
    found: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            found.append((f"{prefix}{key}", shown(str(value)).replace("|", "\\|")))
    return found


def _limits(entry: FloatModelEntry, found: Measured | None, record: RunRecord | None) -> list[str]:
    lines = ["What the float network does wrong it does as well; the card of that one holds here too."]
    if entry.task != "denoise" and found is None:
        lines.append("How far it is from the float network is not known: nothing was measured.")
    elif found is not None and found.data is None:
        lines.append("It was measured on what it was quantized with: on other inputs it may be further from float.")
    if record is not None and made_itself(record):
        lines.append("It has not seen a real image: measure it on your own before you rely on it.")
    lines.append(
        "PyTorch computes its integers in floating point: the file is small, and no faster. For a runtime write another"
        " file: `synthquant export`."
    )
    return lines
