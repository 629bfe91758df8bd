"""The page about ImageNet networks: docs/results/imagenet.md from `results/imagenet/*.json`.

Each section is a function from all results to lines, in `SECTIONS`; other benchmarks add theirs there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import imagenet_peers
import remedies_page
import speed_page
from synthquant.evaluate.paired import Estimate, PerImage, mean_difference, mean_over, share, share_difference

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

METHODS = {"rtn": "RTN", "genie_m": "Genie-M", "qdrop": "QDrop", "brecq": "BRECQ", "onnxruntime": "ONNX Runtime's own"}
KINDS = {"noise": "noise", "zeroq": "ZeroQ", "genie_d": "Genie-D", "real": "64 photographs"}
SCHEMES = ("W8A8", "W6A6", "W4A8", "W4A4")


def page(results: list[Result], table: Table) -> str:
    """The whole page."""
    count = results[0]["float"]["count"]
    lines = [
        "# ImageNet networks, zero-shot, on a CPU",
        "",
        "Written by `benchmarks/tables.py` from `results/imagenet/*.json` (`benchmarks/imagenet_table.py`). All rows",
        f"are measured on the same {count} labelled photographs; 64 others, drawn by seed, are the real images to",
        "calibrate with and nothing else. Activations are quantized where layers read them, per tensor, weights per",
        "channel; first and last layer have 8 bits.",
        "",
        "Cells: top-1 % / agreement with the float network % / Kullback-Leibler divergence from it, the mean over",
        "seeds where there are several. *ONNX Runtime's own*: `quantize_static`, weights per channel, percentile",
        "ranges, run with graph optimisations off, so that sums are exact on CPUs without VNNI, too. MobileNetV2 has",
        "torchvision's first weights (`torchvision/mobilenet_v2.IMAGENET1K_V1`).",
    ]
    for section in SECTIONS:
        if found := section(results, table):
            lines += ["", *found]
    return "\n".join(lines) + "\n"


def rows_of(result: Result, data: str, scheme: str, method: str, label: str = "default") -> list[Result]:
    """The rows of all seeds."""
    wanted = (label, data, scheme, method)
    return [row for row in result["rows"] if wanted == (row["label"], row["data"], row["scheme"], row["method"])]


def networks(results: list[Result], table: Table) -> list[str]:
    """Every network and scheme: methods by kinds of images."""
    lines = []
    for result in results:
        lines += ["", f"## {result['network']}", "", f"Float: top-1 {100 * result['float']['top1']:.2f}%."]
        for scheme in SCHEMES:
            cells = {method: [cell(rows_of(result, data, scheme, method)) for data in KINDS] for method in METHODS}
            body = [[METHODS[method], *found] for method, found in cells.items() if set(found) != {"-"}]
            if body:
                lines += ["", f"### {scheme}", "", table(["method", *KINDS.values()], body)]
    return lines[1:]


def cell(rows: list[Result]) -> str:
    """Means over seeds; `-` without a row."""
    if not rows:
        return "-"
    top1, agreement, kl = (sum(row[key] for row in rows) / len(rows) for key in ("top1", "agreement", "kl"))
    seeds = f" ({len(rows)} seeds)" if len(rows) > 1 else ""
    return f"{100 * top1:.2f} / {100 * agreement:.2f} / {kl:.3g}{seeds}"


def aims(results: list[Result], table: Table) -> list[str]:
    """What was aimed at, and whether this test set decides it."""
    body = []
    for result in results:
        for label in dict.fromkeys(("default", *(row["label"] for row in result["rows"]))):
            for text, found, bound, scale in aims_of(result, label):
                start = [text, result["network"], label]
                if found is not None:
                    interval = f"{scale * found.low:.3g} to {scale * found.high:.3g}"
                    body.append([*start, f"{scale * found.value:.3g}", interval, found.verdict(bound)])
                elif label == "default":
                    body.append([*start, "-", "-", "not measured"])
    return [
        "## Aims",
        "",
        "*Met* and *missed*: the whole 95% interval lies on one side of the aim; else these images do not decide.",
        "Differences are paired, image by image (`synthquant.evaluate.paired`); of several seeds, the mean of each.",
        "Settings other than the default ones stand under *Other settings*.",
        "",
        table(["aim", "network", "settings", "found", "95% interval", "verdict"], body),
    ]


def aims_of(result: Result, label: str) -> list[tuple[str, Estimate | None, float, float]]:
    """Aim, what was found, the least that meets it, and the factor for reading."""
    runtime = images(result, "real", "W8A8", "onnxruntime")
    float_correct = PerImage.unpacked(result["float"]["per_image"]).correct.double()
    found: list[tuple[str, Estimate | None, float, float]] = []
    for method in ("genie_m", "rtn"):
        mine = images(result, "genie_d", "W8A8", method, label)
        name = METHODS[method]
        agreement = None if not mine else _share(mine)
        found.append((f"W8A8, no data, {name}: agreement at least 97%", agreement, 0.97, 100))
        less = None
        if mine and runtime:
            less = mean_difference(runtime[0].kl, mean_over([one.kl for one in mine]))
        found.append((f"W8A8, no data, {name}: divergence below the runtime's own on real images (by)", less, 0.0, 1))
    for scheme, points in (("W4A8", 1.5), ("W4A4", 4.0)):
        mine, real = (images(result, data, scheme, "genie_m", label) for data in ("genie_d", "real"))
        both = difference_of_shares(mine, real) if mine and real else None
        found.append((f"{scheme}, Genie-M, no data: within {points} points of real images", both, -points / 100, 100))
    real = images(result, "real", "W4A4", "genie_m", label)
    above = None
    if real:
        above = mean_difference(mean_over([one.correct for one in real]), 0.75 * float_correct)
    found.append(("W4A4, Genie-M, real images: above 75% of float (points above)", above, 0.0, 100))
    return found


def images(result: Result, data: str, scheme: str, method: str, label: str = "default") -> list[PerImage]:
    """What the network did on each image, a value a seed."""
    return [PerImage.unpacked(row["per_image"]) for row in rows_of(result, data, scheme, method, label)]


def difference_of_shares(first: list[PerImage], second: list[PerImage]) -> Estimate:
    """Top-1 of the first minus that of the second."""
    if len(first) == len(second) == 1:
        return share_difference(first[0].correct, second[0].correct)
    return mean_difference(*(mean_over([one.correct for one in runs]) for runs in (first, second)))


def _share(runs: list[PerImage]) -> Estimate:
    if len(runs) == 1:
        return share(runs[0].agrees)
    agrees = mean_over([one.agrees for one in runs])
    return mean_difference(agrees, 0 * agrees)


def promise(results: list[Result], table: Table) -> str:
    """The README's table: Genie-D and Genie-M beside the same with real photographs."""
    body = []
    for result in results:
        for scheme in SCHEMES:
            made, real = (rows_of(result, data, scheme, "genie_m") for data in ("genie_d", "real"))
            if made or real:
                float_top1 = f"{100 * result['float']['top1']:.1f}"
                body.append([result["network"], scheme, float_top1, short(made), short(real)])
    header = ["network", "bits", "float top-1 %", "no data: top-1 / agreement %", "64 photographs: the same"]
    return table(header, body)


def short(rows: list[Result]) -> str:
    """Means over seeds of top-1 and agreement; `-` without a row."""
    if not rows:
        return "-"
    return " / ".join(f"{100 * sum(row[key] for row in rows) / len(rows):.1f}" for key in ("top1", "agreement"))


def costs(results: list[Result], table: Table) -> list[str]:
    """Seconds and memory of images and rows."""
    body = []
    for result in results:
        made = [(images_name(name, row), row) for name, row in sorted(result["images"].items())]
        rows = [row for row in result["rows"] if row["label"] == "default" and row["seed"] == 0]
        made += [(f"{row['scheme']} {METHODS[row['method']]}, {KINDS[row['data']]}", row) for row in rows]
        for what, row in made:
            more = "" if row["sittings"] == 1 else "+"  # of the last sitting only
            seconds = [f"{row[key]:.0f}{more}" for key in ("user_seconds", "system_seconds", "seconds")]
            peak = row["peak_memory_bytes"]
            body.append([result["network"], what, *seconds, "-" if peak is None else f"{peak / 2**30:.1f}"])
    where = next(row["environment"] for result in results for row in result["rows"])
    header = ["network", "what", "user s", "system s", "wall s", "peak GiB"]
    return [
        "## What it costs",
        "",
        f"One thread of {where['cpu']}, torch {where['torch']}, beside other work: processor time is what compares.",
        "Each row is a process of its own; its time holds quantizing, not measuring. `+`: continued after a stop, time",
        "of the last sitting.",
        "",
        table(header, body),
    ]


def images_name(name: str, row: Result) -> str:
    """A kind of images, and the generator if it is not the one that images of this size have by default."""
    kind = name.partition("-")[0]
    if kind == "genie_d" and row["settings"].get("generator", "genie") == "genie":
        return f"{KINDS[kind]} images, the paper's generator"
    return f"{KINDS[kind]} images"


def tried(results: list[Result], table: Table) -> list[str]:
    """Rows of other settings beside those of the table."""
    body = []
    for result in results:
        for row in result["rows"]:
            former = rows_of(result, row["data"], row["scheme"], row["method"])
            same = [one for one in former if one["seed"] == row["seed"]]
            if row["label"] == "default" or not same:
                continue
            mine, other = (PerImage.unpacked(one["per_image"]) for one in (row, same[0]))
            change = mean_difference(mine.kl, other.kl)
            what = f"{row['scheme']} {METHODS[row['method']]}, {KINDS[row['data']]}, seed {row['seed']}"
            interval = f"{change.value:+.3g} ({change.low:+.3g} to {change.high:+.3g})"
            body.append([row["label"], result["network"], what, cell([row]), cell(same), interval])
    if not body:
        return []
    header = ["what", "network", "row", "with it", "the table's", "change of divergence (95%)"]
    return ["## Other settings", "", table(header, body)]


SECTIONS: list[Callable[[list[Result], Table], list[str]]] = [
    *(aims, networks, imagenet_peers.files, imagenet_peers.toolkit, remedies_page.remedies, tried, costs),
    *(speed_page.generators, speed_page.ways, speed_page.compiled, speed_page.stages),
]
