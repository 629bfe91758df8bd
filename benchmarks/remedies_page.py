"""Section of docs/results/imagenet.md: equalisation and bias correction, from `results/remedies/*.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from imagenet_peers import cell, load

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

EQUALIZE = {"none": "-", "weights": "weights (DFQ)", "activations": "activations"}
STRATEGIES = {"tensor": "per tensor", "channel": "per channel"}


def remedies(rows: list[Result], table: Table) -> list[str]:
    """Before and after, for each network, scheme and granularity of weights; `rows` of the table are not needed."""
    body = []
    for result in load("remedies"):
        found: dict[tuple[str, str, str], dict[bool, Result]] = {}
        for row in result["rows"]:
            key = row["scheme"], row["strategy"], row["equalize"]
            found.setdefault(key, {})[row["bias_correction"]] = row
        for (scheme, strategy, equalize), pair in found.items():
            what = f"{scheme} {STRATEGIES[strategy]}"
            cells = [cell(pair[corrected]) if corrected in pair else "-" for corrected in (False, True)]
            body.append([result["network"], what, EQUALIZE[equalize], *cells])
    if not body:
        return []
    return [
        "## Remedies",
        "",
        "From `results/remedies/*.json` (`benchmarks/remedies.py`): rounding to nearest, calibrated with the 64",
        "photographs, with channels equalised (`quantize.equalize`) and biases corrected (`quantize.bias_correction`).",
        "Top-1 % / agreement % / divergence. DFQ (arXiv:1906.04721) reports MobileNetV2 with eight-bit weights per",
        "tensor at 0.1% before and 71.2% after, of 71.7%; on other weights, without data. Its ReLU6 is a ReLU; here it",
        "stays one, by `weights` with a bound for each channel. MobileNetV2 saw images resized to 232 pixels here, to",
        "256 in the table.",
        "",
        table(["network", "bits and scales", "equalised by", "biases as they are", "biases corrected"], body),
    ]
