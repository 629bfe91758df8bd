"""The page docs/results/diffusion.md, from `results/quantized_diffusion/`, `shortcut_split/` and
`vs_q_diffusion/`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from synthquant.core.formatting import size

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

SPLITS = {None: "no split", "skip": "skip convolutions split", "all": "all readers split"}
FAR_APART = 4.0
"""Ranges of the two halves of a shortcut count as far apart from this ratio on."""


def page(pipelines: list[Result], shortcuts: list[Result], beside: list[Result], table: Table) -> str:
    """Return the page."""
    lines = ["# Quantized diffusion models", "", "Written by `benchmarks/tables.py`."]
    if pipelines:
        lines += _images(pipelines, table)
    if shortcuts:
        lines += _shortcuts(shortcuts, table)
    if beside:
        lines += _beside(beside, table)
    return "\n".join(lines) + "\n"


def _images(results: list[Result], table: Table) -> list[str]:
    quality = results[0]["quality"]
    body = []
    for result in sorted(results, key=lambda one: (one["name"].rpartition("--")[2], one["name"])):
        found, relative, pairs = result["quality"], result["quality"]["relative"], result["quality"]["same_seed"]
        sizes = [row["size_bytes"] for row in result["accuracy"] or () if row["name"] != "float"]
        body.append(
            [
                result["name"].replace("--", ", ").replace("_", " "),
                _estimate(found["frechet"]),
                "-" if relative is None else _estimate(relative["ratio"]),
                f"{found['kernel']['value']:.3f}",
                "-" if pairs is None else f"{pairs['psnr']['value']:.2f}",
                *(size(value) for value in sizes or ()),
                *([] if sizes else ["-"]),
            ]
        )
    return [
        "",
        "## Images of `zoo/cifar10-ddpm`",
        "",
        f"{quality['count']} images from the same noises, beside {quality['reference_count']} training images, in",
        f"features of {quality['features']}: distances compare with each other and with nothing published.",
        "The ratio is to the float pipeline's own distance, both drawn anew together by their seeds; in brackets 95%",
        "intervals. PSNR is beside the float images of the same noises. `benchmarks/quantized_diffusion.py` makes the",
        "rows; of its 26, those that are here. Rows called corrected have first and last layer at 8 bits, ranges by",
        "squared error where roundings are learned, and the output corrected in the last layer, as the",
        "recipes; the others are as published.",
        "",
        table(["row", "Frechet distance", "of float's", "kernel distance", "PSNR, dB", "size"], body),
    ]


def _shortcuts(results: list[Result], table: Table) -> list[str]:
    lines = [
        "",
        "## Shortcuts",
        "",
        "Output of the denoiser on samples of other seeds, signal to quantization noise in dB, ranges by minimum and",
        "maximum (`benchmarks/shortcut_split.py`). Of a consistency model also the PSNR of samples of one and of four",
        "steps.",
    ]
    for result in results:
        options = result["options"]
        body = [
            [
                f"{row['scheme']}, {row['method']}, {SPLITS[row['split']]}",
                f"{row['sqnr']:.2f}",
                *(f"{row[f'psnr_{steps}_steps']:.2f}" for steps in (1, 4) if f"psnr_{steps}_steps" in row),
            ]
            for row in result["rows"]
        ]
        header = ["row", "output", "one step", "four steps"][: len(body[0])]
        learns = any(row["method"] != "rtn" for row in result["rows"])
        learned = f", {options['iterations']} iterations a unit where roundings are learned" if learns else ""
        lines += [
            "",
            f"**{result['network']}**, {options['calibration']} samples to calibrate with, {options['test']} to measure"
            f" on{learned}. {_apart(result['ranges'])}",
            "",
            table(header, body),
        ]
    return lines


def _beside(results: list[Result], table: Table) -> list[str]:
    body = []
    for result in results:
        options, of = result["options"], {run["name"]: run for run in result["runs"]}
        body.append(
            [
                f"{options['width']} to {2 * options['width']}",
                *(f"{of[name]['parameters'] / 1e6:.2f} M, {of[name]['units']}" for name in ("ours", "official")),
                *(f"{of[name]['seconds_a_unit']:.2f} s" for name in ("ours", "official")),
                f"{result['ratio']:.2f}",
            ]
        )
    return [
        "",
        "## Beside the authors' code",
        "",
        "Their DDIM network and the network of diffusers with the same layers, random weights, W4A8 with shortcuts",
        "split, both phases of all units, rows and iterations in the proportion of the published ones, in one process",
        "(`benchmarks/reconstruction_vs_q_diffusion.py`): processor time for each unit.",
        "",
        table(["channels", "ours: weights, units", "theirs", "ours", "theirs", "ratio"], body),
    ]


def _apart(ranges: list[Result]) -> str:
    """One sentence on how far the ranges of the halves are apart."""
    spans: dict[str, list[float]] = {}
    for part in ranges:
        spans.setdefault(part["layer"], []).append(part["span"])
    ratios = {layer: max(parts) / min(parts) for layer, parts in spans.items()}
    far = sum(ratio >= FAR_APART for ratio in ratios.values())
    widest = max(ratios, key=ratios.__getitem__)
    return (
        f"Ranges of the parts of {len(ratios)} joined inputs: {median(ratios.values()):.2g} times as wide as each other"
        f" in the median, {ratios[widest]:.3g} times at most (`{widest}`); {far} are {FAR_APART:.0f} times or more"
        " apart."
    )


def _estimate(value: Result) -> str:
    return f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
