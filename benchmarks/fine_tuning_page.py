"""The page docs/results/fine-tuning.md, from `results/fine_tuning/*.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fine_tuning import WAYS
from synthquant.evaluate.paired import PerImage, share_difference

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

LOSES = {"W4A4": 0.007, "W3A3": 0.03}
"""What the best way without data may lose against the float network."""
BESIDE_LSQ = {"W4A4": 0.005, "W3A3": 0.015}
"""What it may lose against LSQ on real images."""


def page(results: list[Result], table: Table) -> str:
    """Return the page."""
    lines = [
        "# Fine-tuning",
        "",
        "From `results/fine_tuning/*.json` (`benchmarks/fine_tuning.py`). Every layer has the same bits, the image 8.",
        "`start` is Genie-M on the same synthetic images, which all others but the generators' are trained on. The",
        "state that is kept is chosen by agreement with the float network on images held out of training, never by",
        "test images.",
        "Differences are of top-1, paired image by image, with 95% intervals.",
    ]
    for scheme in dict.fromkeys(result["scheme"] for result in results):
        lines += of_scheme([result for result in results if result["scheme"] == scheme], scheme, table)
    return "\n".join(lines) + "\n"


def of_scheme(results: list[Result], scheme: str, table: Table) -> list[str]:
    """One table: a row for each way and seed."""
    body = []
    for way in WAYS:
        for result in sorted((one for one in results if one["way"] == way), key=lambda one: one["seed"]):
            row = result["accuracy"][1]
            against = {name: beside(result, results, name) for name in ("start", "lsq-real")}
            body.append(
                [
                    way,
                    str(result["seed"]),
                    f"{100 * row['top1']:.2f}",
                    f"{100 * row['agreement']:.2f}",
                    f"{row['kl']:.4f}",
                    *(against[name] for name in ("start", "lsq-real")),
                    difference(of(result, "quantized"), of(result, "float")),
                    "-" if result["best_step"] is None else str(result["best_step"]),
                    f"{result['user_seconds'] + result['system_seconds']:.0f}",
                ]
            )
    settings = results[0]["settings"]
    header = [
        "way",
        "seed",
        "top-1 %",
        "agreement %",
        "kl",
        "beside start",
        "beside LSQ on real",
        "beside float",
        "step",
    ]
    units, trained = settings["unit_iterations"], settings["images"]
    return [
        "",
        f"## {scheme} of {settings['model']}",
        "",
        f"{settings['count']} images of {settings['synthesis_iterations']} iterations, {units} for each block of the",
        f"start, then {trained} images of training, {settings['batch_size']} a step.",
        *([aim(scheme)] if scheme in LOSES else []),
        "",
        table([*header, "processor s"], body),
    ]


def aim(scheme: str) -> str:
    """What the best way without data is to reach."""
    return (
        f"Aims: at most {100 * LOSES[scheme]:.1f} below float, {100 * BESIDE_LSQ[scheme]:.1f} below LSQ on real images."
    )


def of(result: Result, network: str) -> PerImage:
    """What a network did on each image."""
    return PerImage.unpacked(result["images"][network])


def beside(result: Result, results: list[Result], way: str) -> str:
    """Difference to another way of the same seed."""
    others = [one for one in results if (one["way"], one["seed"]) == (way, result["seed"])]
    if not others or result["way"] == way:
        return "-"
    return difference(of(result, "quantized"), of(others[0], "quantized"))


def difference(one: PerImage, other: PerImage) -> str:
    """Difference of top-1 in points, with its interval."""
    found = share_difference(one.correct, other.correct)
    return f"{100 * found.value:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
