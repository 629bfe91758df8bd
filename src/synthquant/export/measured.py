"""What was measured of a quantized network, as a model card says it: tables, and the hub's `model-index`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthquant.core import formatting
from synthquant.core.quality_file import Quality
from synthquant.core.record import RunRecord
from synthquant.core.run_metrics import AccuracyRow, EvaluateMetrics, ImagesMetrics, OutputSqnrRow
from synthquant.export.quant_config import FloatModelEntry

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""An owner and a name, as of networks and data sets on the hub."""

# As the hub calls what networks do; maps may be of classes, of depth or of anything.
TASKS = {"classify": "image-classification", "detect": "object-detection", "embed": "image-feature-extraction"}
# What depends on the machine is left out.
_COLUMNS = ("top1", "interval", "top5", "recovery", "agreement", "kl", "sqnr", "size_bytes")


@dataclass(frozen=True)
class Measured:
    """What was measured of a quantized network."""

    rows: tuple[AccuracyRow, ...]
    """The float network, where it was measured too, and the quantized one last."""
    count: int | None
    data: str | None
    """What on; none: on what it was quantized with."""
    outputs: OutputSqnrRow | None

    @classmethod
    def by_run(cls, record: RunRecord | None) -> Measured | None:
        """Return what a run measured; none if it has not."""
        if record is None or "evaluate" not in record.stages or record.stages["evaluate"].status != "done":
            return None
        found = record.metrics("evaluate", EvaluateMetrics)
        data = None if found.data is None else shown(found.data)
        return cls(found.accuracy or (), found.count, data, found.output_sqnr)

    @classmethod
    def by_verb(cls, row: Mapping[str, Any], data: str) -> Measured:
        """Return what `synthquant.evaluate` returned."""
        outputs = row.get("outputs")
        found = AccuracyRow.model_validate(row)
        return cls((found,), found.count, data, None if outputs is None else OutputSqnrRow.model_validate(outputs))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the numbers in the form of the hub's `model-index`."""
        row = self.rows[-1]
        found = [
            ("accuracy", "top-1 accuracy", row.top1),
            ("accuracy", "top-5 accuracy", row.top5),
            ("agreement", "share of the float network's answers", row.agreement),
            ("kl", "Kullback-Leibler divergence from the float network [nats]", row.kl),
            ("sqnr", "signal-to-quantization-noise ratio of the outputs [dB]", row.sqnr),
        ]
        found += [(name, "a metric of the user's", value) for name, value in row.metrics.items()]
        for name, ways in (self.outputs.agreement if self.outputs else {}).items():
            found += [
                (f"{way}_with_float", f"{way} beside the float network, output {name}".removesuffix(", output "), value)
                for way, value in ways.items()
            ]
        return [{"type": kind, "name": name, "value": value} for kind, name, value in found if value is not None]


def model_index(name: str, entry: FloatModelEntry, found: Measured | None, record: RunRecord | None) -> dict[str, Any]:
    """What was measured, in the form of the hub; nothing where nothing was."""
    metrics = [] if found is None else found.metrics()
    if found is None or not metrics:
        return {}
    data = found.data
    kind = "synthetic" if data is None and record is not None and made_itself(record) else "other"
    if data is not None:
        kind = data if HUB_NAME.fullmatch(data) or "/" not in data else "other"
    task = {"type": TASKS.get(entry.task, "other")}
    dataset = {"type": kind.removeprefix("bundled/"), "name": data or "what it was quantized with"}
    return {
        "metrics": list(dict.fromkeys(metric["type"] for metric in metrics)),
        "model-index": [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}],
    }


def made_itself(record: RunRecord) -> bool:
    """Whether the images of a run were made, of the network or by a generator, and not given."""
    method = record.metrics("images", ImagesMetrics).method
    return method is not None and method != "given"


def shown(text: str) -> str:
    """A text of a recipe; of a path of this machine the last part."""
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or ("/" in text and len(text) < 1000 and path.exists()) else text


def measured_lines(found: Measured | None) -> list[str]:
    """Accuracy, agreement and SQNR with count and data; a sentence where nothing was measured."""
    if found is None:
        return [
            "Not measured. `synthquant evaluate FOLDER --data DATA` measures it, `synthquant quantize ... --data DATA`"
            " writes it here."
        ]
    where = "what it was quantized with" if found.data is None else f"`{found.data}`"
    labels = "with" if found.rows[-1].top1 is not None else "without"
    lines = (
        [] if found.count is None else [f"On {formatting.count(found.count)} samples of {where}, {labels} labels:", ""]
    )
    there = {
        name: column
        for name, column in formatting.ACCURACY_COLUMNS.items()
        if name in _COLUMNS and any(getattr(row, name) is not None for row in found.rows)
    }
    metrics = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    lines += [f"| network | {' | '.join([*(column.heading for column in there.values()), *metrics])} |"]
    lines += [f"| --- |{' ---: |' * (len(there) + len(metrics))}"]
    for row in found.rows:
        values = {name: getattr(row, name) for name in there}
        cells = [formatting.MISSING if value is None else there[name].form(value) for name, value in values.items()]
        cells += [formatting.number(row.metrics.get(name), 4) for name in metrics]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    for name, ratio in (found.outputs.outputs if found.outputs else {}).items():
        ways = found.outputs.agreement.get(name, {}) if found.outputs else {}
        parts = [
            "no error" if ratio is None else f"{ratio:.1f} dB",
            *(f"{way} {share:.4f}" for way, share in ways.items()),
        ]
        lines += ["", f"Output{f' `{name}`' if name else ''} beside the float network's: {', '.join(parts)}."]
    return lines


def quality_lines(quality: Quality | None) -> list[str]:
    """What a comparison of drawn images found; a sentence where there was none."""
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
