"""The part of the page about several runs: one table of accuracy, and what differs between them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from synthquant.core.formatting import ACCURACY_COLUMNS, MISSING, count, duration, number, size
from synthquant.core.run_metrics import AccuracyRow
from synthquant.report.run_files import RunFiles, settings_of

_Values = tuple[str, list[str]]


@dataclass(frozen=True)
class AccuracyLine:
    """A row of the table of accuracy."""

    run: int | None
    """Which of the runs it belongs to; none: to all of them."""
    row: AccuracyRow
    reference: float | None
    """Top-1 of the float network (0..1)."""
    first: bool
    """Whether it is the float network."""


@dataclass(frozen=True)
class Differences:
    """What is not the same in all runs, with the value of each: none of what is."""

    figures: list[_Values]
    """What was measured."""
    settings: list[_Values]
    """Settings that at least two of the runs have."""
    own: list[_Values]
    """Settings that only some have, alike there: those of another method."""


def accuracy_lines(runs: Sequence[RunFiles]) -> list[AccuracyLine]:
    """Return the rows of all runs; a float network that several runs measured alike stands there once."""
    floats = [_measured(run.accuracy[0]) for run in runs if run.accuracy]
    alike = all(row == floats[0] for row in floats)
    lines: list[AccuracyLine] = []
    for index, run in enumerate(runs):
        for place, row in enumerate(run.accuracy):
            if place == 0 and alike and lines:
                continue
            shared = place == 0 and alike and len(runs) > 1
            lines.append(AccuracyLine(None if shared else index, row, run.accuracy[0].top1, place == 0))
    return lines


def _measured(row: AccuracyRow) -> AccuracyRow:
    return row.model_copy(update={"seconds": None})  # no two measurements take equally long


def differences(runs: Sequence[RunFiles]) -> Differences:
    """Return what differs: settings of the recipes by dotted name, and figures as they are printed."""
    flat = [settings_of(run) for run in runs]
    keys = sorted({key for values in flat for key in values})
    settings: list[_Values] = []
    own: list[_Values] = []
    for key in keys:
        found = [values.get(key) for values in flat]
        known = {value for value in found if value is not None}
        row = (key, [MISSING if value is None else value for value in found])
        if len(known) > 1:
            settings.append(row)
        elif None in found:
            own.append(row)
    figures = [(name, values) for name, values in _figures(runs).items() if len(set(values)) > 1]
    return Differences(figures, settings, own)


def _figures(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Everything that stands at the head of the page of one run, for each of them."""
    rows = [run.accuracy[-1] if run.accuracy else AccuracyRow(name="") for run in runs]
    found = {
        column.heading: [MISSING if (value := getattr(row, name)) is None else column.form(value) for row in rows]
        for name, column in ACCURACY_COLUMNS.items()
        if name != "seconds"
    }
    for metric in dict.fromkeys(name for row in rows for name in row.metrics):
        found[metric] = [number(row.metrics.get(metric), 4) for row in rows]
    weakest = [min((row.alone, row.name) for row in run.sqnr if row.alone is not None) for run in runs if _ranked(run)]
    if len(weakest) == len(runs):
        found["weakest layer"] = [f"{name}, {number(ratio, 1)} dB" for ratio, name in weakest]
    undecided = [max((unit.undecided or 0.0 for unit in run.units), default=None) for run in runs]
    found["most undecided roundings of a unit %"] = [ACCURACY_COLUMNS["top1"].form(share) for share in undecided]
    found["units put back"] = [count(sum(unit.diverged for unit in run.units)) for run in runs]
    found["exported file"] = [size(run.file.bytes) for run in runs]
    found["times as fast as float"] = [number(run.speed.speedup) for run in runs]
    found["time of all stages"] = [duration(sum(stage.seconds for _, stage in run.stages)) for run in runs]
    memory = [[stage.peak_memory_bytes for _, stage in run.stages if stage.peak_memory_bytes] for run in runs]
    found["peak memory"] = [size(max(peaks, default=None)) for peaks in memory]
    return found


def _ranked(run: RunFiles) -> bool:
    return any(row.alone is not None for row in run.sqnr)


def accuracy_axis(runs: Sequence[RunFiles]) -> tuple[float, float]:
    """Ends of the axis of the interval plots: all intervals, but not so wide that a failed run hides the others."""
    rows = [row for run in runs for row in run.accuracy if row.top1 is not None]
    if not rows:
        return 0.0, 1.0
    values = [row.top1 for row in rows if row.top1 is not None]
    floor = statistics.median(values) - 3 * max(0.02, max(values) - statistics.median(values))
    low = min((row.interval or (row.top1 or 0.0, 0.0))[0] for row in rows if (row.top1 or 0.0) >= floor)
    high = max((row.interval or (0.0, row.top1 or 0.0))[1] for row in rows)
    margin = 0.05 * max(high - low, 0.01)
    return max(0.0, low - margin), min(1.0, high + margin)


def place_on(value: float, axis: tuple[float, float]) -> float:
    """Position of a share on the axis in percent of its width, held inside it."""
    low, high = axis
    return 100 * min(1.0, max(0.0, (value - low) / (high - low)))
