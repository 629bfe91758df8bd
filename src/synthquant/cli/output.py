"""Results on standard output: a table for people, JSON for programs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthquant.core.advice import held_out_in_words
from synthquant.core.device import resolve_device
from synthquant.core.formatting import ACCURACY_COLUMNS, Column, number, size
from synthquant.core.record import RunRecord, environment
from synthquant.core.run_metrics import BenchmarkMetrics, ExportMetrics, HeldOutMetrics, QuantizeMetrics
from synthquant.nn.coverage import CoverageSummary

_SHOWN = ("name", "top1", "interval", "top5", "recovery", "agreement", "kl", "sqnr", "size_bytes")
_READ = ("set_aside_count", "set_aside", "changed")


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_result(value: dict[str, Any], device: str) -> None:
    """Print what a command that computes found as one JSON document, with the versions and hardware it was found on."""
    print_json({**value, "environment": environment(resolve_device(device))})


def print_next(command: str, argument: str, options: Mapping[str, object]) -> None:
    """Print the command that usually follows, with the options that were given; names in capitals are to be chosen."""
    words = [argument, *(str(word) for name, value in options.items() if value is not None for word in (name, value))]
    print(f"next: synthquant {command} {shlex.join(words)}")


def print_run(out: Path, record: RunRecord, *, as_json: bool) -> None:
    """Print what a run measured: float beside quantized."""
    evaluation, quantization = record.stages["evaluate"].metrics, record.stages["quantize"].metrics
    coverage = record.metrics("quantize", QuantizeMetrics).coverage_summary
    if as_json:
        found = {key: evaluation.get(key) for key in ("accuracy", "data", "count")}
        # Of the images that were measured on, and of those that were used to quantize.
        found |= {key: evaluation[key] for key in _READ if key in evaluation}
        found["images"] = {key: quantization[key] for key in _READ if key in quantization}
        found |= {name: record.stages[name].metrics for name in ("export", "benchmark") if name in record.stages}
        totals = coverage and coverage.model_dump()
        print_json({"out": str(out), **found, "coverage": totals, "environment": record.environment})
        return
    print(quantization["scheme"])
    if coverage is not None:
        summary = CoverageSummary(**coverage.model_dump())
        print("\n".join(line for line in (str(summary), summary.in_float) if line))
    print_table(evaluation["accuracy"])
    exported, speed = record.metrics("export", ExportMetrics), record.metrics("benchmark", BenchmarkMetrics)
    held_out = record.metrics("held_out", HeldOutMetrics)
    if held_out.sqnr is not None:
        print(held_out_in_words(held_out))
    if exported.file is not None and exported.bytes is not None:
        print(f"exported: {out / exported.file}, {size(exported.bytes)}")
    if speed.speedup is not None:
        print(f"speed: {speed.speedup:.2f}x float, batch {speed.batch}, {speed.threads} threads")
    print(f"run: {out}, report: {out / 'report.html'}")


def accuracy_rows(record: RunRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rows of the float and of the quantized network."""
    float_row, quantized_row = record.stages["evaluate"].metrics["accuracy"]
    return float_row, quantized_row


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of the accuracy table in aligned columns."""
    columns = {"name": Column("network", str)} | ACCURACY_COLUMNS
    present = [name for name in _SHOWN if any(row.get(name) is not None for row in rows)]
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics", ())))
    lines = [[*(columns[name].heading for name in present), *metrics]]
    for row in rows:
        cells = [columns[name].form(row[name]) if row.get(name) is not None else "-" for name in present]
        values = [row.get("metrics", {}).get(name) for name in metrics]
        lines.append([*cells, *("-" if value is None else number(value, 4) for value in values)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


def print_outputs(outputs: dict[str, Any]) -> None:
    """Print a line for each output of a network that is no classifier: fields of `OutputSqnr`."""
    for name, ratio in outputs["outputs"].items():
        parts = [f"output {name}".rstrip() + ":", "no error" if ratio is None else f"{ratio:.1f} dB"]
        known = [(one, index) for index, one in enumerate(outputs["channels"].get(name, ())) if one is not None]
        if known:
            worst, index = min(known)
            parts.append(f"(channel {index}: {worst:.1f} dB)")
        parts += [f"{way} {share:.4f}" for way, share in outputs["agreement"].get(name, {}).items()]
        print(" ".join(parts))
