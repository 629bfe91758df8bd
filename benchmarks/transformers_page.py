"""The page docs/results/transformers.md, from `results/vision_transformers/*.json`."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from imagenet_page import difference_of_shares
from synthquant.evaluate.paired import Estimate, PerImage
from vision_transformers import IMAGES, WAYS

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

SCHEMES = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A3")
BELOW_FLOAT = {"W8A8": 0.003, "W4A4": 0.025}
"""What a method may lose: at eight bits without data, at four on real images."""
BELOW_REAL = {"W4A4": 0.01, "W3A3": 0.05}
"""What images that were made may lose against real ones."""


def page(results: list[Result], table: Table) -> str:
    """Return the page."""
    settings = results[0]["settings"]
    lines = [
        "# Vision transformers",
        "",
        "From `results/vision_transformers/*.json` (`benchmarks/vision_transformers.py`), written by",
        f"`benchmarks/tables.py`. Network: `{settings['model']}`; products of attention are quantized, first and last",
        f"layer as `ends: {settings['ends']}` says. {settings['count']} images for methods that only calibrate,",
        f"{settings['learned_count']} and {settings['iterations']} iterations a block for those that learn. It has",
        "seen all training images, the text-to-image model half of them.",
        "",
        "Cells: top-1 % / agreement with the float network % / Kullback-Leibler divergence from it, the mean over",
        "seeds.",
    ]
    for scheme in SCHEMES:
        if rows := [result for result in results if result["scheme"] == scheme]:
            lines += ["", f"## {scheme}", "", f"Float: top-1 {100 * rows[0]['accuracy'][0]['top1']:.2f}%.", ""]
            kinds = [kind for kind in IMAGES if any(row["images_of"] == kind for row in rows)]
            body = [
                [way, *(cell(of(rows, way, kind)) for kind in kinds), cost(rows, way)]
                for way in WAYS
                if any(row["way"] == way for row in rows)
            ]
            lines += [table(["method", *kinds, "processor s"], body)]
    return "\n".join([*lines, "", *aims(results, table)]) + "\n"


def of(results: list[Result], way: str, images: str) -> list[Result]:
    """The rows of all seeds."""
    return [result for result in results if (result["way"], result["images_of"]) == (way, images)]


def cell(results: list[Result]) -> str:
    """Three figures, or a dash."""
    if not results:
        return "-"
    top1, agreement, kl = (
        fmean(result["accuracy"][1][name] for result in results) for name in ("top1", "agreement", "kl")
    )
    return f"{100 * top1:.2f} / {100 * agreement:.2f} / {kl:.3g}"


def cost(results: list[Result], way: str) -> str:
    """Processor seconds of a row, measuring included: the least of all, since others may hold images that were made."""
    return f"{min(row['user_seconds'] + row['system_seconds'] for row in results if row['way'] == way):.0f}"


def aims(results: list[Result], table: Table) -> list[str]:
    """What was to be reached, method by method, with verdicts."""
    body = []
    for scheme in SCHEMES:
        rows = [result for result in results if result["scheme"] == scheme]
        for way in WAYS:
            made, real = (of(rows, way, kind) for kind in ("psaq_vit", "real"))
            for name, found, least in judged(scheme, made, real):
                interval = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
                body.append([scheme, way, name, f"{100 * found.value:+.2f}", interval, found.verdict(least)])
    header = ["scheme", "method", "aim", "found", "95% interval", "verdict"]
    return [
        "## Aims",
        "",
        "Points of top-1, paired image by image (`synthquant.evaluate.paired`).",
        "",
        table(header, body),
    ]


def judged(scheme: str, made: list[Result], real: list[Result]) -> list[tuple[str, Estimate, float]]:
    """Aim, what was found, and the least that meets it."""
    found = []
    of_interest = made if scheme == "W8A8" else real
    if scheme in BELOW_FLOAT and of_interest:
        least = BELOW_FLOAT[scheme]
        images = "no data" if scheme == "W8A8" else "real images"
        difference = difference_of_shares(per_image(of_interest, "quantized"), per_image(of_interest, "float"))
        found.append((f"{images}: within {100 * least:.1f} of float", difference, -least))
    if scheme in BELOW_REAL and made and real:
        least = BELOW_REAL[scheme]
        difference = difference_of_shares(per_image(made, "quantized"), per_image(real, "quantized"))
        found.append((f"no data: within {100 * least:.1f} of real images", difference, -least))
    return found


def per_image(results: list[Result], network: str) -> list[PerImage]:
    """What a network did on each image, a value a seed."""
    return [PerImage.unpacked(result["images"][network]) for result in results]
