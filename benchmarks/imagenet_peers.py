"""Sections of docs/results/imagenet.md: exported files beside ONNX Runtime's quantizer, and Sony's toolkit.

From `results/imagenet_files/*.json` (`imagenet_files.py`) and `results/mct/*.json` (`beside_mct.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthquant.evaluate.paired import PerImage, mean_difference

Table = Callable[[list[str], list[list[str]]], str]
Result = dict[str, Any]

ROOT = Path(__file__).parent.parent
OURS = {
    "W8A8": "W8A8",
    "W7A8": "W7A8, `ends: same`",
    "W8A8-equalized": "W8A8, `equalize: activations`",
    "W7A8-equalized": "W7A8, `ends: same`, `equalize: activations`",
}
RUNTIME = {
    "runtime": "its own quantizer",
    "runtime-pixels": "its own, image's range from pixels",
    "runtime-pixels-minmax": "its own, the same, smallest and largest values",
    "runtime-pixels-7": "its own, image's range from pixels, 7-bit weights",
}
METHODS = {"rtn": "RTN", "genie_m": "Genie-M", "ptq": "MCT PTQ", "gptq": "MCT GPTQ"}
DATA = {"genie_d": "Genie-D", "mct": "MCT", "real": "64 photographs"}


def load(folder: str) -> list[Result]:
    """All results of a benchmark, by file name."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "results" / folder).glob("*.json"))]


def cell(row: Result) -> str:
    """Top-1, agreement and divergence."""
    return f"{100 * row['top1']:.2f} / {100 * row['agreement']:.2f} / {row['kl']:.3g}"


def files(rows: list[Result], table: Table) -> list[str]:
    """Accuracy, size and speed of the files, beside the table's `rows`."""
    results = load("imagenet_files")
    if not results:
        return []
    lines = [
        "## Files in ONNX Runtime",
        "",
        "From `results/imagenet_files/*.json` (`benchmarks/imagenet_files.py`): preset `ort-cpu`, every tensor between",
        "integer kernels (`deploy: full`: residuals and logits, too), symmetric weights. *As written*: graph",
        "optimisations off, exact sums. *Integer kernels*: as a user runs it, on this CPU without VNNI, where sums of",
        "products of eight-bit weights overflow 16 bits: only 7-bit weights are right there. Top-1 % / agreement % /",
        "divergence.",
    ]
    for result in results:
        papers = _table_rows(rows, result["network"])
        body = [_file_row(row, papers) for row in sorted(result["rows"], key=_order)]
        header = ["file", "images", "as written", "integer kernels", "layers on integers", "bytes of float"]
        lines += [
            "",
            f"### {result['network']}, files",
            "",
            table(header, body),
            *_placement(result, papers),
        ]
        if "latency" in result:
            lines += ["", *_latency(result, table)]
    return lines


def _name(row: Result) -> str:
    return f"{OURS[row['kind']]}, {METHODS[row['method']]}" if row["kind"] in OURS else RUNTIME[row["kind"]]


def _order(row: Result) -> tuple[int, str]:
    return [*OURS, *RUNTIME].index(row["kind"]), row["method"] + row["data"]


def _file_row(row: Result, papers: list[Result]) -> list[str]:
    layers, size = row["layers"], row["bytes"]
    same = row["data"] != "genie_d" or row["images"] in {one["images_fingerprint"] for one in papers}
    return [
        _name(row),
        DATA[row["data"]] + ("" if same else ", other images than the table's"),
        *(cell(row[way]) if way in row else "-" for way in ("exact", "integer")),
        f"{layers['integer']} of {layers['integer'] + layers['floating']}",
        f"{size['quantized'] / size['float']:.3f}",
    ]


def _placement(result: Result, papers: list[Result]) -> list[str]:
    """What the residuals cost: the table's W8A8, quantized where layers read, beside the file's."""
    sentences = []
    for row in sorted(result["rows"], key=_order):
        same = [
            one
            for one in papers
            if (row["kind"], one["scheme"]) == ("W8A8", "W8A8")
            and (one["data"], one["method"]) == (row["data"], row["method"])
            and (row["data"] == "real" or one["images_fingerprint"] == row["images"])
        ]
        if same:
            mine, other = (PerImage.unpacked(one["per_image"]) for one in (row["exact"], same[0]))
            change = mean_difference(mine.kl, other.kl)
            sentences.append(
                f"{_name(row)}, {DATA[row['data']]}: {cell(same[0])} where layers' inputs are quantized and nothing"
                f" else; in the file the divergence is {change.value:+.3g} ({change.low:+.3g} to {change.high:+.3g})"
                " away from that.  "
            )
    return ["", *sentences] if sentences else []


def _latency(result: Result, table: Table) -> list[str]:
    found = result["latency"]
    times = found["milliseconds"]
    names = OURS | RUNTIME | {"float": "float"}
    body = [[names[name], f"{value:.2f}", f"{times['float'] / value:.2f}"] for name, value in times.items()]
    where = found["environment"]["cpu"]
    return [
        f"Processor milliseconds of an image at one thread, files in turns, {where}"
        f"{'' if found['vnni'] else ', no VNNI'}:",
        "",
        table(["file", "ms", "float / it"], body),
    ]


def toolkit(found: list[Result], table: Table) -> list[str]:
    """Sony's images and quantizers beside ours, which stand in the table."""
    lines = []
    for result in load("mct"):
        made = result.get("images")
        lines += [
            "## Beside Sony's Model Compression Toolkit",
            "",
            "From `results/mct/*.json` (`benchmarks/beside_mct.py`, `mct_images.py`): the toolkit's data generation",
            "and post-training quantization with defaults (target IMX500: power-of-two ranges of activations, biases",
            "corrected, residual sums quantized, all layers with the bits named).",
            "Top-1 % / agreement % / divergence on the same photographs.",
        ]
        if made:
            lines += [
                "",
                f"The toolkit (version {made['toolkit']}, torch {made['torch']}): {made['count']} images of"
                f" {made['iterations']} iterations in {made['processor_seconds']:.0f} s of the processor,"
                f" {made['peak_memory_bytes'] / 2**30:.1f} GiB; what Genie-D's took stands"
                " under *What it costs*.",
            ]
        mine = next(one for one in found if one["network"] == result["network"])
        if mine["float"]["per_image"] != result["float"]["per_image"]:
            lines += [
                "",
                "The toolkit's rows saw images resized to 232 pixels, of which the float network recognises"
                f" {100 * result['float']['top1']:.2f}%, the table's 256 ({100 * mine['float']['top1']:.2f}%).",
            ]
        rows = [*result["rows"], *_table_rows(found, result["network"])]
        schemes = [name for name in ("W8A8", "W4A8", "W4A4") if any(row["scheme"] == name for row in rows)]
        body = []
        for data in ("mct", "genie_d", "real"):
            for method in METHODS:
                mine = {r["scheme"]: cell(r) for r in rows if (r["data"], r["method"]) == (data, method)}
                if mine:
                    body.append([METHODS[method], DATA[data], *(mine.get(name, "-") for name in schemes)])
        lines += ["", table(["quantizer", "images", *schemes], body), ""]
    return lines


def _table_rows(results: list[Result], network: str) -> list[Result]:
    """Rows of the table, seed 0."""
    rows = {result["network"]: result["rows"] for result in results}.get(network, [])
    return [row for row in rows if (row["label"], row["seed"]) == ("default", 0)]
