"""The page docs/results/diverse-images.md, from `results/dsg_parts/*.json` and `results/low_pass/*.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsg_parts import PARTS, SCHEMES
from low_pass import FILTERS
from synthquant.evaluate.paired import PerImage, mean_difference, mean_over, share_difference

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]


def page(parts: list[Result], filters: list[Result], table: Table) -> str:
    """Return the page, from rows of `dsg_parts` and of `low_pass`."""
    lines = ["# Diverse images", ""]
    for network in dict.fromkeys(row["network"] for row in parts):
        lines += of_network([row for row in parts if row["network"] == network], table)
    choices = [row for row in filters if "real" in row]
    for choice in choices:
        lines += of_filter(choice, [row for row in filters if row["name"] == choice["name"]], table)
    return "\n".join(lines) + "\n"


def of_network(rows: list[Result], table: Table) -> list[str]:
    """A row for each kind of images: accuracy at each bits, difference to `base`, and diversity."""
    body = []
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        cells = []
        for scheme in SCHEMES:
            found = [row for row in mine if row["scheme"] == scheme]
            base = [row for row in rows if (row["part"], row["scheme"]) == ("base", scheme)]
            cells += [percent([row["top1"] for row in found]), change(found, base)]
        diversity = [row["images"]["diversity"] for row in mine]
        cells += [average([one[key] for one in diversity]) for key in ("distance", "effective_rank")]
        cells.append(average([row["images"]["processor_seconds"] for row in mine], digits=0))
        body.append([part, *cells])
    first = rows[0]
    count, seeds = first["images"]["count"], len({row["seed"] for row in rows})
    iterations = first["images"]["settings"].get("iterations", "-")
    header = ["images"]
    for scheme in SCHEMES:
        header += [f"{scheme} top-1 %", "beside base (95%)"]
    header += ["distance of features", f"effective rank of {count}", "processor s"]
    return [
        f"## {first['network']}",
        "",
        f"From `results/dsg_parts/*.json` (`benchmarks/dsg_parts.py`): {count} images of {iterations} iterations,",
        f"rounding to nearest with every layer at the same bits, {first['count']} test images, seeds: {seeds}; float:",
        f"{100 * first['float_top1']:.2f}%. `base` is the loop of DSG with its parts off, `SDA` slack, `LSE` enhanced",
        "layers, `SCI` inhibited correlation, `priors` those of DSG's code. Differences are paired, image by image.",
        "Distance and rank are of the network's features and do not compare between networks.",
        "",
        table(header, body),
        "",
    ]


def change(rows: list[Result], base: list[Result]) -> str:
    """Points of top-1 beside `base` at the same seeds, with the interval over images; nothing for `base` itself."""
    pairs = [(row, other) for row in rows for other in base if row["seed"] == other["seed"] and row["part"] != "base"]
    if not pairs:
        return "-"
    mine, others = ([PerImage.unpacked(pair[side]["per_image"]).correct for pair in pairs] for side in (0, 1))
    several = len(pairs) > 1
    found = mean_difference(mean_over(mine), mean_over(others)) if several else share_difference(mine[0], others[0])
    return f"{100 * found.value:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"


def of_filter(choice: Result, rows: list[Result], table: Table) -> list[str]:
    """Agreement on held-out images for each filter, and real accuracy for off and the choice."""
    shown = [str(one or "off") for one in FILTERS]
    body = []
    for one in FILTERS:
        found = [row for row in rows if "held_out" in row and row["low_pass"] == one]
        if not found:
            continue
        held_out = found[0]["held_out"]
        real = choice["real"].get(str(one or "off"))
        cells = [*(f"{100 * held_out[name]:.2f}" for name in shown), f"{100 * sum(held_out.values()) / len(shown):.2f}"]
        body.append([str(one or "off"), *cells, "-" if real is None else f"{100 * real['top1']:.2f}"])
    made = choice["identity"]["images"]
    iterations = made["settings"].get("iterations", "-")
    header = ["low_pass", *(f"held out, {name}" for name in shown), "mean", "real top-1 %"]
    return [
        f"## Low-pass filter: {choice['name']}",
        "",
        f"From `results/low_pass/*.json` (`benchmarks/low_pass.py`): {choice['count']} images of {made['method']},",
        f"{iterations} iterations; agreement % of the quantized network with the float one",
        f"on as many others behind each filter. Chosen by the mean: {choice['low_pass'] or 'off'}; real accuracy was",
        f"measured afterwards (float: {100 * choice['float_top1']:.2f}%).",
        "",
        table(header, body),
        "",
    ]


def percent(values: list[float]) -> str:
    """Mean of shares in percent."""
    return "-" if not values else f"{100 * sum(values) / len(values):.2f}"


def average(values: list[float | None], digits: int = 2) -> str:
    """Mean of what is known."""
    known = [value for value in values if value is not None]
    return "-" if not known else f"{sum(known) / len(known):.{digits}f}"
