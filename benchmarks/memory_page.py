"""docs/results/memory.md, from `results/memory/peaks/*.json` (`memory_peaks.py`) and `results/memory/batches/*.json`
(`batches.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

GIB = 2**30


def page(peaks: list[Result], batches: list[Result], table: Table) -> str:
    """The whole page."""
    lines = [
        "# Memory",
        "",
        "Written by `benchmarks/tables.py` from `results/memory`. Peaks are the largest resident memory of a command,",
        "in MiB, by `benchmarks/memory_peaks.py`.",
    ]
    for result in peaks:
        lines += ["", f"## {result['network']}", "", _what(result), "", _peaks(result, table)]
    if batches:
        lines += ["", "## Size of a batch at equal processor time"]
    for result in batches:
        lines += ["", *_batches(result, table)]
    return "\n".join(lines) + "\n"


def _what(result: Result) -> str:
    return (
        f"At 224x224, with {result['limit_gib']:g} GiB for the data of a process, about what a machine of 8 GiB\n"
        f"leaves. `W4A4` is `run` with Genie-M and {result['images']} photographs, measured on these afterwards;\n"
        "`inversion` is `synthesize` with Genie-D and its defaults, a batch of 128 images."
    )


def _peaks(result: Result, table: Table) -> str:
    labels = list(dict.fromkeys(row["label"] for row in result["rows"]))
    jobs = list(dict.fromkeys(row["job"] for row in result["rows"]))
    found = {(row["label"], row["job"]): row for row in result["rows"]}
    body = [[job, *(_cell(found.get((label, job))) for label in labels)] for job in jobs]
    return table(["command", *labels], body)


def _cell(row: Result | None) -> str:
    if row is None:
        return "-"
    return f"{row['peak_bytes'] / 2**20:,.0f}" if row["ok"] else "does not fit"


def _batches(result: Result, table: Table) -> list[str]:
    body = [
        [
            str(row["batch"]),
            str(row["its"]),
            f"{row['used']:.0f}",
            f"{sum(row['last']) / len(row['last']):.2f}",
            f"{row['set_loss']:.2f}",
        ]
        for row in result["rows"]
    ]
    return [
        f"Genie-D on {result['network']}, {result['count']} images at {result['size']}x{result['size']},",
        f"{result['generator']} generator. The loss is that of the statistics at the batch norms: at a batch's last",
        "iteration, mean of the batches, and of all images together.",
        "",
        table(["images in a batch", "iterations of each", "processor s", "loss of batches", "loss of all"], body),
    ]
