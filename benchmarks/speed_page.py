"""Sections of docs/results/imagenet.md about time: Genie-D's generators, `torch.compile`, stages of two versions.

From `results/generators/*.json`, `results/compiled/*.json` and `results/stage_costs/*.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from imagenet_peers import load

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

NAMES = {"genie": "the paper's", "light": "light"}
STEPS = 5
"""Rows of a run."""


def generators(rows: list[Result], table: Table) -> list[str]:
    """Loss against time of both, and when the light one is where the paper's ends; `rows` are not needed."""
    del rows
    runs = load("generators")
    body, words = [], []
    for run in runs:
        points = smooth(run["curve"])
        for point in points[len(points) // STEPS - 1 :: len(points) // STEPS]:
            body.append([
                run["network"], NAMES[run["kind"]], str(run["batch_size"]), f"{run['weights']:,}",
                str(point["iteration"]), f"{point['seconds']:.0f}", f"{point['loss']:.3g}",
            ])  # fmt: skip
    for first, other in pairs(runs):
        end = smooth(first["curve"])[-1]
        whole = smooth(other["curve"])
        there = next((point for point in whole if point["loss"] <= end["loss"]), None)
        start = f"{first['network']}, batches of {first['batch_size']}: the paper's generator ends at {end['loss']:.3g}"
        if there is None:
            last = whole[-1]
            words.append(f"{start} after {end['seconds']:.0f} s; the light one does not get there: {last['loss']:.3g}")
        else:
            share = f"{100 * there['seconds'] / end['seconds']:.0f}% of the time"
            words.append(f"{start}; the light one is there after {there['iteration']} iterations, in {share}")
        words[-1] += "."
    if not body:
        return []
    header = ["network", "generator", "images", "weights", "iterations", "processor s", "loss"]
    return [
        "## Genie-D's generators",
        "",
        "From `results/generators/*.json` (`benchmarks/generators.py`), one thread: batch-norm loss of the images,",
        "without swing, the median of three neighbouring measurements.",
        "",
        table(header, body),
        "",
        *[f"{text}  " for text in words],
    ]


WAYS = {
    "plain": "Genie-D",
    "warm": "generator from another batch",
    "half": "half the resolution, first half",
    "late": "half of the batch norms, second half",
}


def ways(rows: list[Result], table: Table) -> list[str]:
    """Loss against time of shortcuts; `rows` are not needed."""
    del rows
    runs = sorted(load("generator_ways"), key=lambda run: (run["network"], list(WAYS).index(run["way"])))
    body = []
    for run in runs:
        points = smooth(run["curve"])
        for point in points[len(points) // 3 - 1 :: len(points) // 3]:
            body.append([
                run["network"], WAYS[run["way"]], str(point["iteration"]), f"{point['seconds']:.0f}",
                f"{point['loss']:.3g}",
            ])  # fmt: skip
    if not body:
        return []
    return [
        "### Shortcuts that were tried",
        "",
        "From `results/generator_ways/*.json` (`benchmarks/generator_ways.py`): the light generator,",
        f"{runs[0]['batch_size']} images, the same measurement. None of them is built in.",
        "",
        table(["network", "way", "iterations", "processor s", "loss"], body),
    ]


def pairs(runs: list[Result]) -> list[tuple[Result, Result]]:
    """Runs of both kinds with the same network, batch, iterations and seed."""
    found: dict[tuple[Any, ...], dict[str, Result]] = {}
    for run in runs:
        key = tuple(run[name] for name in ("network", "batch_size", "iterations", "seed"))
        found.setdefault(key, {})[run["kind"]] = run
    return [(both["genie"], both["light"]) for both in found.values() if len(both) == 2]


def smooth(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """The median of each point and the two before it: the images of one iteration are worse or better by chance."""
    losses = [point["loss"] for point in curve]
    return [{**point, "loss": median(losses[max(0, i - 2) : i + 1])} for i, point in enumerate(curve)]


def compiled(rows: list[Result], table: Table) -> list[str]:
    """What compiling gives and costs; `rows` of the table are not needed."""
    del rows
    body = []
    for result in load("compiled"):
        for what in ("inversion", "evaluation"):
            eager = result[what]["eager"]["ms"]
            for name, found in result[what].items():
                ratio, first = f"{found['ms'] / eager:.2f}", f"{found['first_call_seconds']:.1f}"
                difference = f"{found['largest_difference']:.1g}"
                body.append([result["network"], what, name, f"{found['ms']:.2f}", ratio, first, difference])
    if not body:
        return []
    header = ["network", "step", "how", "ms an image", "of eager", "first call, s", "difference"]
    return [
        "## torch.compile",
        "",
        "From `results/compiled/*.json` (`benchmarks/compiled.py`), one thread, processor time: loss and gradient of",
        "the inverted network without generator and swing; a forward pass. *Difference*: the largest, as a share of",
        "the largest value. Nothing is compiled by default: bytes differ from the eager network's, and the first",
        "call of every shape costs what thousands of images take.",
        "",
        table(header, body),
    ]


def stages(rows: list[Result], table: Table) -> list[str]:
    """Whole commands of an older version and of the present one; `rows` of the table are not needed."""
    del rows
    body, commits = [], set()
    for result in load("stage_costs"):
        commits |= {(result["commits"]["before"], result["commits"]["after"])}
        for stage in dict.fromkeys(row["stage"] for row in result["rows"]):
            old, new = ([row for row in result["rows"] if (row["stage"], row["version"]) == (stage, version)]
                        for version in ("before", "after"))  # fmt: skip
            before, after = _processor(old), _processor(new)
            body.append([
                result["network"], stage, f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}",
                f"{_middle(old, 'system_seconds'):.1f}", f"{_middle(new, 'system_seconds'):.1f}",
                f"{_middle(old, 'peak_mib'):.0f}", f"{_middle(new, 'peak_mib'):.0f}",
            ])  # fmt: skip
    if not body:
        return []
    header = ["network", "command", "s before", "s now", "now / before", "system s", "now", "peak MiB", "now"]
    which = ", ".join(f"{before} and {after}" for before, after in sorted(commits))
    return [
        "## Commands before and now",
        "",
        f"From `results/stage_costs/*.json` (`benchmarks/stage_costs.py`): commits {which}, medians of runs in turns.",
        "Processor seconds of whole commands at one thread with start-up and loading; few iterations, so ratios of",
        "long runs are larger.",
        "",
        table(header, body),
    ]


def _processor(rows: list[Result]) -> float:
    return median(row["user_seconds"] + row["system_seconds"] for row in rows)


def _middle(rows: list[Result], name: str) -> float:
    return median(float(row[name]) for row in rows)
