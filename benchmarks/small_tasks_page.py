"""docs/results/other-tasks.md, from `results/small_tasks/*.json` (`small_tasks.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

_TASKS = {
    "classify": (
        "Classes of one channel",
        "classifier of 28x28 grey images of Fashion-MNIST, six convolutions",
        "images",
    ),
    "dense": ("Maps", "U-Net that gives each pixel of 64x64 grey scenes one of eleven classes", "scenes"),
    "detect": ("Boxes", "detector of items in such scenes, a box and ten scores for each cell of 8x8 pixels", "scenes"),
}
_HEADINGS = {
    "top1": "top-1 %",
    "miou": "mIoU %",
    "pixel_accuracy": "right pixels %",
    "map": "mAP %",
    "map_50": "mAP at IoU 0.5 %",
}


def page(results: list[Result], table: Table) -> str:
    """The whole page."""
    lines = [
        "# Other tasks, without data",
        "",
        "Written by `benchmarks/tables.py` from `results/small_tasks`. Networks that `benchmarks/small_tasks.py`",
        "trains in minutes are quantized with images that Genie-D makes of them alone, by Genie-M, and measured on",
        "test data that nothing else has seen; *file* is the ONNX file in ONNX Runtime. One seed. W8A8 is for",
        "`ort-cpu`, whose kernels compute in integers; the files of other rows simulate their bits.",
    ]
    for result in sorted(results, key=lambda one: list(_TASKS).index(one["task"])):
        title, what, noun = _TASKS[result["task"]]
        made = result["synthesis"]
        lines += [
            "",
            f"## {title}",
            "",
            f"A {what}, {result['parameters']:,} parameters,",
            f"trained in {result['training_seconds'] / 60:.0f} minutes of processor time;",
            f"{made['count']} images of {made['iterations']} iterations{_minutes(made['seconds'])};"
            f" {result['test_count']:,} {noun}.",
            "",
            _rows(result, table),
        ]
    return "\n".join(lines) + "\n"


def _minutes(seconds: float) -> str:
    """How long making images took; nothing where they were there from an earlier call."""
    return f" ({seconds / 60:.1f} minutes)" if seconds > 6 else ""


def _rows(result: Result, table: Table) -> str:
    rows = result["rows"]
    names = list(rows[0]["onnx"])
    float_numbers = rows[0]["row"]["float_metrics"]
    outputs = list(rows[0]["row"].get("outputs", {}).get("outputs", {}))
    head = ["network"]
    for name in names:
        head += [_HEADINGS[name], f"{_HEADINGS[name]}, file"]
    head += [f"SQNR of {name or 'the output'} [dB]" for name in outputs] or ["agreement %"]
    head += ["file [KiB]", "quantized in [s]"]
    dashes = ["-"] * (2 + (len(outputs) or 1))
    first = ["float"]
    for name in names:
        first += [f"{100 * float_numbers[name]:.2f}", "-"]
    body = [first + dashes]
    for one in rows:
        cells = [one["scheme"]]
        for name in names:
            cells += [f"{100 * one['row']['metrics'][name]:.2f}", f"{100 * one['onnx'][name]:.2f}"]
        if outputs:
            cells += [f"{one['row']['outputs']['outputs'][name]:.1f}" for name in outputs]
        else:
            cells.append(f"{100 * one['row']['agreement']:.2f}")
        body.append([*cells, f"{one['onnx_bytes'] / 1024:.0f}", f"{one['seconds']:.0f}"])
    return table(head, body)
