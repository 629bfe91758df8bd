"""docs/results/generated-images.md and its figure, from results/generated_images/*.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
METHODS = {"brecq": "BRECQ", "genie_m": "Genie-M"}
COUNT = 1024
GENQ = "text_to_image+energy:0.71+bn_sensitivity:0.71"
SWEEP_COUNT = 204  # a tenth of the pool: what the strictest filter leaves
KINDS = {
    "genie_d": "Genie-D", "text_to_image": "text-to-image", "mixed": "mixed-class prompts",
    "tuned:1": "tuned, 1 image a class", "tuned:10": "tuned, 10 images a class", "real": "real images",
}  # fmt: skip
FILTERS = {
    "energy": "energy", "bn_sensitivity": "BN sensitivity", "bn_distance": "BN distance",
    "bn_learned": "learned BN distance",
}  # fmt: skip


def title(entry: str) -> str:
    """The words for an entry of `--data`."""
    kind, *filters = entry.split("+")
    kept = [f"{FILTERS[name]} {share}" for name, _, share in (part.partition(":") for part in filters)]
    return ", ".join([KINDS[kind], *kept])


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds of shares, as percentages."""
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def collect(results: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All rows of each network, over its files (one for each seed)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["model"], []).extend(result["rows"])
    return found


def values(rows: list[dict[str, Any]], **fixed: Any) -> list[float]:
    """Top-1 of the rows that agree with `fixed`, by seed."""
    kept = [row for row in rows if all(row[key] == value for key, value in fixed.items())]
    return [row["top1"] for row in sorted(kept, key=lambda row: row["seed"])]


def data_table(rows: list[dict[str, Any]], model: str, table: Table) -> str:
    """A row for each kind of data, a column for each scheme and method."""
    mine = [row for row in rows if row["images"] == COUNT and row["source"] == model]
    columns = list(dict.fromkeys((row["scheme"], row["method"]) for row in mine))
    body = []
    for entry in sorted({row["data"] for row in mine}, key=_place):
        cells = [values(mine, data=entry, scheme=scheme, method=method) for scheme, method in columns]
        body.append([title(entry), *map(mean_and_spread, cells), str(max(map(len, cells)))])
    return table(["images", *(f"{scheme} {METHODS[method]}" for scheme, method in columns), "seeds"], body)


def aims_table(rows: dict[str, list[dict[str, Any]]], table: Table) -> str:
    """GenQ's choice (both filters) less real images and less Genie-D, in points, paired by seed."""
    body = []
    for model, mine in rows.items():
        mine = [row for row in mine if row["images"] == COUNT and row["source"] == model]
        for scheme, method in dict.fromkeys((row["scheme"], row["method"]) for row in mine):
            cells = [model.rpartition("/")[2], scheme, METHODS[method]]
            for other in ("real", "genie_d"):
                by_seed = [
                    {row["seed"]: row["top1"] for row in mine if (row["data"], row["scheme"], row["method"]) == key}
                    for key in ((GENQ, scheme, method), (other, scheme, method))
                ]
                seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
                cells.append(mean_and_spread([by_seed[0][seed] - by_seed[1][seed] for seed in seeds]))
            body.append(cells)
    return table(["network", "bits", "method", "less real images", "less Genie-D"], body)


def _place(entry: str) -> tuple[int, int, str]:
    """Sorts kinds of data as they are listed, unfiltered ones first."""
    kind, *filters = entry.split("+")
    return list(KINDS).index(kind), len(filters), entry


def transfer_table(rows: dict[str, list[dict[str, Any]]], table: Table) -> str:
    """Images made and chosen for one network, used for another (GenQ, table 5)."""
    body = []
    for model, mine in rows.items():
        for source in dict.fromkeys(row["source"] for row in mine):
            for key in dict.fromkeys((row["data"], row["scheme"], row["method"]) for row in mine):
                entry, scheme, method = key
                found = values(mine, data=entry, scheme=scheme, method=method, source=source, images=COUNT)
                if source != model and found:
                    own = values(mine, data=entry, scheme=scheme, method=method, source=model, images=COUNT)
                    names = [name.rpartition("/")[2] for name in (source, model)]
                    cells = [title(entry), scheme, METHODS[method], mean_and_spread(found), mean_and_spread(own)]
                    body.append([*names, *cells])
    header = ["made for", "used for", "images", "bits", "method", "top-1 %", "made for itself %"]
    return table(header, body) if body else ""


def sweeps(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Series of points over the number of images, and over the share that a filter keeps; only of more than two."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {"images": {}, "share that is kept": {}}
    for model, mine in rows.items():
        name = model.rpartition("/")[2]
        for row in mine:
            if row["source"] != model:
                continue
            kind, *filters = row["data"].split("+")
            end = f"{row['scheme']} {METHODS[row['method']]}"
            of_images = found["images"].setdefault(f"{name}, {title(row['data'])}, {end}", {})
            of_images.setdefault(row["images"], []).append(row["top1"])
            if row["images"] != SWEEP_COUNT or kind != "text_to_image":
                continue
            for filter_name, _, share in (part.partition(":") for part in filters if len(filters) == 1):
                series = found["share that is kept"].setdefault(f"{name}, {FILTERS[filter_name]}, {end}", {})
                series.setdefault(float(share), []).append(row["top1"])
    # Drawn from the whole pool: the end that every filter has in common.
    for series_name, series in found["share that is kept"].items():
        name, _, end = (part.strip() for part in series_name.split(","))
        whole = found["images"].get(f"{name}, {KINDS['text_to_image']}, {end}", {}).get(SWEEP_COUNT)
        if whole:
            series[1.0] = whole
    return {kind: {k: v for k, v in series.items() if len(v) > 2} for kind, series in found.items()}


def draw(found: dict[str, dict[str, dict[float, list[float]]]], path: Path) -> None:
    """Both sweeps side by side, with the standard deviation over seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "synthquant", "font.size": 9})
    from matplotlib import pyplot

    parts = {kind: series for kind, series in found.items() if series}
    figure, axes = pyplot.subplots(1, len(parts), figsize=(5.6 * len(parts), 4), layout="constrained", squeeze=False)
    for place, (kind, series) in zip(axes[0], parts.items(), strict=True):
        for name, points in sorted(series.items()):
            x = sorted(points)
            middle = [100 * statistics.mean(points[at]) for at in x]
            spread = [100 * statistics.stdev(points[at]) if len(points[at]) > 1 else 0.0 for at in x]
            place.errorbar(x, middle, spread, label=name, marker="o", markersize=3, capsize=2, linewidth=1.2)
        if kind == "images":
            place.set_xscale("log", base=2)
            place.xaxis.set_major_formatter("{x:g}")
        place.set_xlabel(kind)
        place.set_ylabel("top-1 %")
        place.grid(alpha=0.3)
        place.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def page(results: list[dict[str, Any]], folder: Path, table: Table) -> str:
    """The page; the figure of the sweeps is written beside it where there is one."""
    rows = collect(results)
    lines = [
        "# Drawn, selected and real images",
        "",
        "Written by `benchmarks/tables.py` from `results/generated_images/*.json` (`benchmarks/generated_images.py`).",
        f"Top-1 in percent, mean ± standard deviation over seeds; {COUNT:,} images. The number behind a filter is the",
        "share of the pool that it keeps. The networks were trained on the first half of the training images, the",
        "generator on the second; real images are from the first. Differences below the interval of a single top-1",
        "mean little.",
    ]
    for model, mine in rows.items():
        result = next(result for result in results if result["model"] == model)
        low, high = result["float"]["interval"]
        budget = result["budget"]
        lines += [
            "",
            f"## {model}",
            "",
            f"Float: {100 * result['float']['top1']:.2f} (95% interval {100 * low:.2f} to {100 * high:.2f},",
            f"{result['float']['count']} test images). {budget['iterations']} iterations of {budget['batch_size']}",
            f"images for each unit; Genie-D {budget['genie_d_iterations']}, tuning {budget['tuning_iterations']}",
            f"iterations; pool of {budget['pool']:,}.",
            "",
            data_table(mine, model, table),
        ]
    lines += [
        "",
        "## Drawn and selected images beside real ones and Genie-D",
        "",
        f"Points of top-1 that {title(GENQ)} is above (or below) others, paired by seed.",
        "",
        aims_table(rows, table),
    ]
    transfer = transfer_table(rows, table)
    if transfer:
        lines += ["", "## Images made for another network", "", transfer]
    found = sweeps(rows)
    if any(found.values()):
        draw(found, folder / "generated-images.svg")
        lines += [
            "",
            "## How many images, and how strict a filter",
            "",
            "Mean and standard deviation over seeds (GenQ, figures 5 and 6). Filters choose from the whole pool; of",
            f"what they keep {SWEEP_COUNT} images are drawn at random, so that all points have equally many.",
            "Points without a bar are of one seed: between them less than a point of top-1 says nothing.",
            "",
            "![sweeps](generated-images.svg)",
        ]
    return "\n".join(lines) + "\n"
