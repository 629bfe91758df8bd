"""Write docs/results/*.md and the figures of README.md from results/*.json.

    python benchmarks/tables.py

Numbers in the documentation come from here only: text between `<!-- results:NAME -->` and `<!-- /results -->` in
README.md and in guides is replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import decisions_page
import diffusion_page
import diverse_page
import fine_tuning_page
import generated_tables
import imagenet_page
import memory_page
import robustness_table
import small_tasks_page
import transformers_page
from synthquant.core.formatting import ACCURACY_COLUMNS
from synthquant.export.presets import PRESETS
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "src" / "synthquant" / "models" / "zoo"
AIMS = {"cifar10-resnet20": 90, "cifar10-mobilenetv2": 91, "cifar10-vit": 82}
METHODS = {"rtn": "RTN", "adaround": "AdaRound", "brecq": "BRECQ", "qdrop": "QDrop", "genie_m": "Genie-M"}
KINDS = {"noise": "noise", "zeroq": "ZeroQ", "genie_d": "Genie-D", "real": "real images"}


def load(folder: str) -> list[dict[str, Any]]:
    """All results of a benchmark, by file name."""
    return [read(path) for path in sorted((ROOT / "results" / folder).glob("*.json"))]


def read(path: Path) -> dict[str, Any]:
    """One file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def plain(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of texts, all columns left-aligned."""
    return table(header, rows).replace("---:", "---")


def percent(value: float | None) -> str:
    """A share as a percentage with two digits."""
    return "-" if value is None else f"{100 * value:.2f}"


def mean(values: list[float]) -> str:
    """Mean of percentages over seeds, with the spread where there are several."""
    if not values:
        return "-"
    middle = sum(values) / len(values)
    return percent(middle) + (f" ± {50 * (max(values) - min(values)):.2f}" if len(values) > 1 else "")


def zero_shot() -> str:
    """docs/results/zero-shot.md: one table for each network and scheme."""
    results = load("zero_shot")
    lines = [
        "# Zero-shot quantization: every method on every kind of data",
        "",
        "Written by `benchmarks/tables.py` from `results/zero_shot/*.json`; top-1 in percent, and in brackets the",
        "Kullback-Leibler divergence from the float network, which is less noisy. Seeds: mean ± half the range.",
        "Activations are quantized where layers read them, asymmetric per tensor; weights per channel.",
        "`W4A4-same` gives all layers 4 bits; the others keep the first and last layer at 8 bits.",
    ]
    for name in dict.fromkeys(result["name"] for result in results):
        mine = {result["kind"]: result for result in results if result["name"] == name}
        first = next(iter(mine.values()))
        low, high = first["float"]["interval"]
        budget = first["budget"]
        lines += [
            "",
            f"## {name}",
            "",
            f"Float: {percent(first['float']['top1'])} (95% interval {percent(low)} to {percent(high)},"
            f" {first['float']['count']} images). Budget: {budget['count']} images,"
            f" {budget['iterations']} iterations of {budget['batch_size']} images for each unit,"
            f" on {first['environment'].get('device', 'cpu')}.",
        ]
        for scheme in dict.fromkeys(row["scheme"] for row in first["rows"]):
            kinds = [kind for kind in KINDS if kind in mine]
            body = []
            for method, title in METHODS.items():
                cells = [cell(rows_of(mine[kind], scheme, method)) for kind in kinds]
                if set(cells) != {"-"}:
                    body.append([title, *cells])
            lines += ["", f"### {scheme}", "", table(["method", *[KINDS[kind] for kind in kinds]], body)]
    return "\n".join(lines) + "\n"


def rows_of(result: dict[str, Any], scheme: str, method: str) -> list[dict[str, Any]]:
    """The rows of a scheme and method, one for each seed."""
    return [row for row in result["rows"] if (row["scheme"], row["method"]) == (scheme, method)]


def cell(rows: list[dict[str, Any]]) -> str:
    """Top-1 and, in brackets, the divergence from the float network; `-` without a row."""
    if not rows:
        return "-"
    return f"{mean([row['top1'] for row in rows])} ({sum(row['kl'] for row in rows) / len(rows):.3g})"


def promise() -> str:
    """The README's table: Genie-D and Genie-M on the bundled network, beside real images."""
    results = {result["kind"]: result for result in load("zero_shot") if result["name"] == "cifar10-resnet20-1000"}
    float_top1 = results["genie_d"]["float"]["top1"]
    body = []
    for scheme in ("W8A8", "W4A4", "W4A4-same", "W2A4"):
        made, real = (
            [row["top1"] for row in rows_of(results[kind], scheme, "genie_m")] for kind in ("genie_d", "real")
        )
        if made:
            loss = float_top1 - sum(made) / len(made)
            body.append([scheme, mean(made), f"{100 * loss:.2f}", mean(real), str(len(made))])
    return table(["bits", "no data: top-1 %", "lost", "1,024 real images: top-1 %", "seeds"], body)


def beside_genie() -> str:
    """docs/results/beside-genie.md: time and accuracy beside the official code."""
    lines = [
        "# Beside the official Genie code",
        "",
        "Written by `benchmarks/tables.py` from `results/vs_genie/*.json`: same network, images, budget and process.",
    ]
    for result in load("vs_genie"):
        lines += ["", f"## {result['benchmark']}", ""]
        rows = result["rows"]
        keys = [key for key in rows[0] if isinstance(rows[0][key], int | float | str)]
        body = [[f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in keys] for row in rows]
        lines.append(table(keys, body))
        ratios = {key: value for key, value in result.items() if key.endswith(("ratio", "difference"))}
        lines += ["", *[f"{key.replace('_', ' ')}: {value:.3f}  " for key, value in ratios.items()]]
    return "\n".join(lines) + "\n"


def onnx_files() -> str:
    """docs/results/onnx.md: exported networks beside float."""
    lines = [
        "# Exported networks",
        "",
        "Written by `benchmarks/tables.py` from `results/onnx/*.json` (`benchmarks/onnx_networks.py`): W8A8, symmetric",
        "weights, `deploy: full`, preset `ort-cpu`, rounded to nearest. *Agreement*: same top class as the quantized",
        "network in torch, in ONNX Runtime (ORT) and OpenVINO, on images that were not used to calibrate; *ties aside*",
        "leaves out images whose two classes the network hardly tells apart; *control* is the quantized network in",
        "torch with 64-bit floats, which no file can be expected to beat: rounding to a grid turns a difference in the",
        "last digit of a sum into a whole step, and every layer makes more of them. Networks with random weights (of",
        "variance 1 / fan-in where there is no batch norm) have their last layer fitted to the images; they check",
        "arithmetic, not accuracy, and some are chaotic. *Speed*: float time divided by quantized time, batch 1;",
        "*peer*: the same for ONNX Runtime's own quantizer. A dash was not measured.",
        "",
    ]
    body = []
    for result in load("onnx"):
        layers, found, times = result["layers"], result["agreement"], result.get("milliseconds")
        ort = found["onnxruntime"]
        aside = 1 - (ort["differing"] - ort["ties"]) / found["images"]
        body.append(
            [
                result["network"],
                result["weights"],
                f"{layers['integer']} of {layers['integer'] + layers['floating']}",
                percent(ort["agreement"]),
                percent(aside),
                percent(found["openvino"]["agreement"]),
                percent(found["float64"]["agreement"]) if "float64" in found else "-",
                str(found["images"]),
                f"{result['bytes']['quantized'] / result['bytes']['float']:.3f}",
                f"{times['float'] / times['quantized']:.2f}" if times else "-",
                f"{times['float'] / times['peer']:.2f}" if times else "-",
            ]
        )
    header = ["network", "weights", "layers on integers", "agreement ORT %", "ties aside %", "OpenVINO %", "control %"]
    rows = table([*header, "images", "size", "speed", "peer"], body)
    return "\n".join([*lines, rows]) + "\n" + onnx_accuracy()


def onnx_accuracy() -> str:
    """Top-1 of the same file in two runtimes."""
    lines = [
        "",
        "## Top-1 of the files",
        "",
        "Written from `results/onnx_accuracy/*.json` (`benchmarks/onnx_accuracy.py`, which types the commands of the",
        "guide). In our own checkpoint codes are packed at their own bits; ONNX files hold 8-bit numbers.",
        "",
    ]
    body = []
    for result in load("onnx_accuracy"):
        for row in result["rows"]:
            runtimes = [percent(row["top1"][name]) for name in ("torch", "onnxruntime", "openvino")]
            sizes = [f"{row['bytes'][name]:,}" for name in ("onnx", "checkpoint")]
            body.append([result["network"], row["case"], row["preset"], *runtimes, str(row["count"]), *sizes])
    header = ["network", "scheme", "preset", "torch %", "ORT %", "OpenVINO %", "images", "ONNX bytes", "packed bytes"]
    return "\n".join([*lines, table(header, body)]) + "\n"


def spoilt() -> list[str]:
    """How many of the spoilt images among photographs each filter takes out, one table for each network."""
    lines = []
    for result in load("spoilt_images"):
        rows = result["rows"]
        names = list(dict.fromkeys(row["filter"] for row in rows))
        found = {(row["flaw"], row["filter"]): sum(row["found"]) / len(row["found"]) for row in rows}
        body = [
            [flaw, *(f"{100 * found[flaw, name]:.0f}" for name in names)]
            for flaw in dict.fromkeys(row["flaw"] for row in rows)
        ]
        lines += [
            "",
            f"## Spoilt images found, {result['model']}",
            "",
            f"Percent of {result['spoilt']} spoilt images that a filter takes out of {result['count']} photographs",
            f"when it keeps {result['kept']} of them ({100 * (1 - result['kept']):.0f} by chance); mean of"
            f" {len(result['seeds'])} seeds (`benchmarks/spoilt_images.py`).",
            "",
            table(["flaw", *(f"`{name}`" for name in names)], body),
        ]
    return lines


def filters() -> str:
    """docs/results/filters.md: what the filters find, and what batch-norm sensitivity costs beside its definition."""
    (result,) = load("bn_sensitivity")
    lines = [
        "# Filters: what they find, and what batch-norm sensitivity costs",
        "",
        "Written by `benchmarks/tables.py`. What `bn_learned` learns from is none of the flaws below.",
        *spoilt(),
        "",
        "## Batch-norm sensitivity: one forward pass beside the definition",
        "",
        "From `results/bn_sensitivity/*.json` (`benchmarks/bn_sensitivity.py`). The",
        "definition (GenQ, arXiv:2312.05272, equation 7) runs the network on B - 1 images for each of B; `select`",
        "takes the same scores from the sums of one pass. Same process, same images; a `*` was run for some of the",
        "images and multiplied.",
        "",
    ]
    body = [
        [
            str(row["images"]),
            f"{row['fast_seconds']:.3g}",
            f"{row['brute_seconds']:.4g}{'*' if row['brute_is_extrapolated'] else ''}",
            f"{row['speedup']:.0f}",
            f"{row['largest_difference'] / row['largest_score']:.1e}",
        ]
        for row in result["rows"]
    ]
    header = ["B", "one pass, s", "definition, s", "ratio", "largest difference / largest score"]
    return "\n".join([*lines, table(header, body)]) + "\n"


def stable_diffusion(results: list[dict[str, Any]]) -> str:
    """docs/results/stable-diffusion.md: the commands at the size of Stable Diffusion v1-5, and images per second."""
    lines = [
        "# The size of Stable Diffusion v1-5",
        "",
        "Written by `benchmarks/tables.py` from `results/stable_diffusion/*.json` (`benchmarks/stable_diffusion.py`).",
        "The architecture at full size with random weights, through the commands that users type: images mean nothing,",
        "time and memory do. Each command is a process of its own; its time holds opening the pipeline.",
    ]
    names = {"tune_prompt": "tune-prompt", "synthesize": "synthesize"}
    for result in results:
        place = result["environment"]
        body = []
        for key, name in names.items():
            row = result[key]
            what = (
                f"{row['steps']} steps of {row['batch']}"
                if "batch" in row
                else f"{row['count']} of {row['steps']} steps"
            )
            cells = [f"{row['size']}x{row['size']}", f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 2**30:.1f}"]
            body.append([f"{name}, {what}", *cells])
        device = f"CPU, {place['threads']} thread(s)" if place["device"] == "cpu" else place["device"]
        lines += ["", f"## {device}, {result['dtype']}", ""]
        lines += [table(["command", "pixels", "seconds", "main memory, GiB"], body)]
        rows = [
            [
                str(row["batch"]),
                str(row["steps"]),
                "yes" if row["compiled"] else "no",
                f"{row['images_per_second']:.2f}",
            ]
            for row in result["speed"]
        ]
        if rows:
            lines += ["", table(["batch", "steps", "compiled", "images a second"], rows)]
    return "\n".join(lines) + "\n"


def zoo() -> str:
    """docs/results/zoo.md: the bundled networks, how they were trained and what they reach."""
    lines = [
        "# Bundled networks",
        "",
        "Written by `benchmarks/tables.py` from their cards and from `results/zoo/*.json`. Top-1 is what",
        "`synthquant evaluate` finds on the 5,000 bundled test images; *aim* is what is wanted of it. All",
        "weights are stored in half precision. Aims that are missed wait for a GPU: these were trained on a CPU.",
        "",
    ]
    body = []
    for card in map(read, sorted((ZOO / "weights").glob("*.json"))):
        measured = read(ROOT / "results" / "zoo" / f"{card['name']}.json")
        low, high = measured["interval"]
        aim = AIMS.get(card["name"])
        cells = [percent(measured["top1"]), f"{percent(low)} to {percent(high)}", f"{aim}" if aim else "-"]
        start = card.get("start", "random weights").removeprefix("weights of zoo/")
        epochs = f"{card['epochs']:g}" + ("" if start == "random weights" else f" after those of {start}")
        trained = [epochs, f"{card['seconds'] / 60:.0f} min", card["device"].partition(" (")[0]]
        body.append([f"`zoo/{card['name']}`", card["architecture"], *cells, *trained])
    header = ["network", "what", "top-1 %", "95% interval", "aim", "epochs", "time", "on"]
    lines += [table(header, body)]
    for card in map(read, sorted((ZOO / "pipelines").glob("*/card.json"))):
        name, found = card["name"], card["reached"]
        fid = found["fid"]
        fresh = ROOT / "results" / "zoo" / f"{name}.png"
        if fresh.exists():  # as the check of the generators left it; one copy is enough
            fresh.replace(ROOT / "docs" / "results" / fresh.name)
        lines += [
            "",
            f"## `zoo/{name}`",
            "",
            f"{card['architecture']}. {card['steps']:,} steps in {card['seconds'] / 60:.0f} minutes on "
            f"{card['device'].partition(' (')[0]}; {card['data']}. {card['schedule']}.",
            "",
            f"Samples: {found['sampling']['sampler']}, {found['sampling']['inference_steps']} steps. Black or of one"
            f" colour: {found['empty']['black']} and {found['empty']['constant']} of {found['empty']['count']:,}.",
        ]
        for classifier, seen in found.get("recognised", {}).items():
            lines.append(
                f"{classifier} puts {percent(seen['share'])}% of {seen['samples']:,} samples into the class of their"
                f" prompt, and {percent(seen['real_test_images'])}% of real test images (aim: 80%)."
            )
        lines += [
            f"Frechet distance in the features of a classifier ({fid['features']}), comparable with nothing published:"
            f" {fid['samples_to_real']:.2f} for {fid['samples']:,} samples; two halves of real images: "
            f"{fid['half_to_half']:.2f}, with as few images {fid['half_to_half_at_that_count']['distance']:.2f}.",
            "",
            f"![samples of {name}]({name}.png)",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write everything."""
    folder = ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zero-shot.md").write_text(zero_shot())
    (folder / "beside-genie.md").write_text(beside_genie())
    (folder / "onnx.md").write_text(onnx_files())
    (folder / "filters.md").write_text(filters())
    (folder / "zoo.md").write_text(zoo())
    if results := load("stable_diffusion"):
        (folder / "stable-diffusion.md").write_text(stable_diffusion(results))
    if results := load("generated_images"):
        (folder / "generated-images.md").write_text(generated_tables.page(results, folder, table))
    if (parts := load("dsg_parts")) or load("low_pass"):
        (folder / "diverse-images.md").write_text(diverse_page.page(parts, load("low_pass"), table))
    if results := load("fine_tuning"):
        (folder / "fine-tuning.md").write_text(fine_tuning_page.page(results, table))
    if results := load("vision_transformers"):
        (folder / "transformers.md").write_text(transformers_page.page(results, table))
    if (pipelines := load("quantized_diffusion")) or load("shortcut_split"):
        found = diffusion_page.page(pipelines, load("shortcut_split"), load("vs_q_diffusion"), table)
        (folder / "diffusion.md").write_text(found)
    if results := load("robustness"):
        (folder / "robustness.md").write_text(robustness_table.page(results, table))
    if peaks := load("memory/peaks"):
        (folder / "memory.md").write_text(memory_page.page(peaks, load("memory/batches"), table))
    if small := load("small_tasks"):
        (folder / "other-tasks.md").write_text(small_tasks_page.page(small, table))
    networks = load("imagenet")
    (folder / "imagenet.md").write_text(imagenet_page.page(networks, table))
    imagenet = imagenet_page.promise(networks, table)
    fill(ROOT / "README.md", {"demo": demo(), "zero_shot": promise(), "imagenet": imagenet})
    fill(ROOT / "docs" / "guides" / "export.md", {"kinds": kinds()})
    fill(ROOT / "docs" / "guides" / "fine-tuning.md", {"speed": tuning_speed()})
    fill(ROOT / "docs" / "guides" / "which-method.md", decisions())


def decisions() -> dict[str, str]:
    """The tables of the guide that says which method is for what."""
    measured = decisions_page.Measured(load("zero_shot"), load("imagenet"))
    return {
        "situations": decisions_page.situations(measured, load("quantized_diffusion"), load("onnx"), plain),
        "images": decisions_page.images(measured, table),
        "methods": decisions_page.methods(measured, table),
    }


def fill(page: Path, contents: dict[str, str]) -> None:
    """Replace what stands between the marks of a page."""
    text = page.read_text()
    for name, content in contents.items():
        pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)", re.DOTALL)
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    page.write_text(text)


def kinds() -> str:
    """The export guide's table: which preset takes which kind of activation quantizer."""
    body = [
        [f"`{kind}`", *("yes" if preset.takes(kind) else "no" for preset in PRESETS.values())]
        for kind in QUANTIZER_KINDS.names()
    ]
    return table(["kind", *(f"`{name}`" for name in PRESETS)], body)


def tuning_speed() -> str:
    """The fine-tuning guide's table: what a step takes beside one of training the float network."""
    results = load("fine_tuning_speed")
    body = [
        [
            f"`{result['model']}`",
            *(f"{1000 * result['seconds'][part]:.0f}" for part in ("float", "fine_tuning")),
            f"{result['ratio']:.2f}",
            f"{1000 * result['seconds']['teacher']:.0f}",
        ]
        for result in results
    ]
    header = ["network, 64 images", "float step, ms", "fine-tuning step, ms", "ratio", "teacher beside it, ms"]
    where = results[0]["environment"]
    return table(header, body) + f"\n\nProcessor time on {where['cpu']}, one thread, torch {where['torch']}."


def demo() -> str:
    """The README's table: what `synthquant demo` printed."""
    (result,) = load("demo")
    shown = ("top1", "agreement", "kl", "size_bytes")
    body = [
        [
            row["name"],
            *("-" if row[name] is None else ACCURACY_COLUMNS[name].form(row[name]) for name in shown),
        ]
        for row in result["rows"]
    ]
    where = result["environment"]
    return (
        table(["network", *(ACCURACY_COLUMNS[name].heading for name in shown)], body)
        + f"\n\nOn {where['cpu']}, {where['threads']} threads, torch {where['torch']}."
    )


if __name__ == "__main__":
    main()
