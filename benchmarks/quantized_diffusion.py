"""Q-Diffusion's table on `zoo/cifar10-ddpm`: quantized pipelines beside the float one, from the same noises.

    nice -n 19 python benchmarks/quantized_diffusion.py --real TRAIN.parquet --work runs/quantized_diffusion

A row is four commands: `synthesize` (the trajectory to calibrate with), `quantize`, `sample` (2,048 images from the
noises of the float images) and `compare` (with real images, and pair by pair with the float ones). Rows come in the
order of what they decide and land one at a time in `results/quantized_diffusion/NAME.json`; trajectories, runs and
images lie in `--work`. Called again after a kill it goes on where the command that was killed stopped; a row is done
again where its commands or the pipeline have changed. `--dry-run` says what is missing, `--only WORD ...` does rows
whose name has all of these words.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.sources import open_images
from synthquant.diffusion.pipelines import open_pipeline

MODEL = "zoo/cifar10-ddpm"
FEATURES = "zoo/cifar10-resnet20"
# Softmaxes at 8 bits whose grid begins at 0, as in the code of the authors.
SOFTMAX = ("scheme.attention.softmax.num_bits=8", "scheme.attention.softmax.symmetric=true")
# As in their code: no exception for first and last layer, ranges by the smallest and largest value.
PUBLISHED = ("observer=minmax", "scheme.ends=same")
# What the recipes do beyond that, in rows that are called "corrected".
SEARCHED = ("observer=genie",)
CORRECTED = ("output_correction=true",)
SPLIT = ("scheme.split_shortcuts=skip",)
MODULATED = ("scheme.modulation={}",)


@dataclass(frozen=True)
class Row:
    """One pipeline, quantized once and sampled; no scheme: the float one."""

    what: str
    scheme: str = ""
    method: str = ""
    settings: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ("steps=null",)
    seed: int = 0
    steps: int = 25

    @property
    def name(self) -> str:
        """Name of its file."""
        words = [self.scheme or "float", self.what, *([f"seed {self.seed}"] if self.seed else []), f"DDIM-{self.steps}"]
        return "--".join(words).replace(" ", "_")


def plan() -> list[Row]:
    """All rows, those that decide most first."""
    published = [Row("min-max", "W4A8", "rtn"), Row("full", "W4A8", "q_diffusion", SPLIT)]
    full = {"method": "q_diffusion", "settings": (*SEARCHED, *SPLIT, *CORRECTED)}
    modulated = {"method": "q_diffusion", "settings": (*SEARCHED, *SPLIT, *MODULATED, *CORRECTED)}
    least = {"method": "rtn", "settings": ("observer=minmax", *CORRECTED)}
    rows = [Row("float"), *published, Row("full corrected", "W4A8", **full), Row("full corrected", "W8A8", **full)]
    rows += [Row("full + MoDiff corrected", "W4A4", **modulated), Row("min-max corrected", "W4A8", **least)]
    rows += [Row("full corrected", scheme, **full) for scheme in ("W4A4", "W4A16")]
    rows += [
        Row("min-max corrected", "W8A8", **least),
        Row("min-max corrected", "W4A4", **least),
        Row("full + MoDiff corrected", "W4A8", **modulated),
        Row("no split corrected", "W4A8", "q_diffusion", (*SEARCHED, *CORRECTED)),
        Row("one step corrected", "W4A8", **full, calibration=("steps=1", "which=middle")),
        Row("five steps corrected", "W4A8", **full, calibration=("steps=5",)),
    ]
    for seed in (1, 2):
        rows += [Row("min-max corrected", "W4A8", **least, seed=seed)]
        rows += [Row("full corrected", "W4A8", **full, seed=seed)]
        rows += [Row("full + MoDiff corrected", "W4A4", **modulated, seed=seed)]
    rows += [Row("float", steps=100), Row("min-max corrected", "W4A8", **least, steps=100)]
    rows += [Row("full corrected", scheme, **full, steps=100) for scheme in ("W4A8", "W8A8")]
    return [*rows, Row("full + MoDiff corrected", "W4A4", **modulated, steps=100)]


class Table:
    """The rows that are there, and what they are made of."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.pipeline = open_pipeline(MODEL).fingerprint

    def path(self, row: Row) -> Path:
        """The file of a row."""
        return Path(self.args.out / f"{row.name}.json")

    def finished(self, row: Row) -> bool:
        """Whether a row was made by these commands, of this pipeline."""
        path = self.path(row)
        found = json.loads(path.read_text()) if path.exists() else {}
        return (found.get("commands"), found.get("pipeline")) == (self.shown(row), self.pipeline)

    def shown(self, row: Row) -> list[str]:
        """A row's commands as texts, with paths of this machine left out."""
        return [shlex.join(self._without_paths(command)) for command in self.commands(row)]

    def commands(self, row: Row) -> list[list[str]]:
        """What makes a row, up to its images."""
        images = ["--count", str(self.args.count), "--steps", str(row.steps)]
        images += _set([f"batch_size={self.args.batch}", f"keep_steps={self.args.kept}"])
        sampled = ["sample", MODEL, *images, "--out", str(self.images(row))]
        if not row.scheme:
            return [sampled]
        calibration, run = self._calibration(row), self.work / f"run--{row.name}"
        wanted = [f"sampler_steps={row.steps}", "batch_size=40", *row.calibration]
        made = ["synthesize", MODEL, "--method", "self_sampling", "--count", str(self.args.calibration)]
        made += [*_set(wanted), "--seed", str(row.seed), "--out", str(calibration)]
        iterations = self.args.iterations
        learned = [f"iterations={iterations}", f"activation_iterations={iterations}"]
        common = [*(() if "corrected" in row.what else PUBLISHED), *(() if row.scheme == "W4A16" else SOFTMAX)]
        settings = [*common, *([] if row.method == "rtn" else learned), *row.settings]
        quantized = ["quantize", MODEL, "--images", str(calibration), "--scheme", row.scheme, "--method", row.method]
        quantized += [*_set(settings), "--seed", str(row.seed), "--out", str(run)]
        return [made, quantized, ["sample", str(run), *images, "--out", str(self.images(row))]]

    def images(self, row: Row) -> Path:
        """The folder of a row's images."""
        return self.work / f"images--{row.name}"

    def real(self) -> Path:
        """So many real images, drawn once by seed."""
        folder = self.work / f"real-{self.args.real_count}"
        if not folder.exists():
            images = open_images(str(self.args.real))
            order = torch.randperm(len(images), generator=Rng(0).generator("real images"))
            images.subset(order[: self.args.real_count]).save(folder)
        return folder

    def _calibration(self, row: Row) -> Path:
        words = "-".join(setting.replace("=", "-") for setting in row.calibration)
        return self.work / f"calibration--{words}--{row.steps}-{row.seed}"

    def _without_paths(self, command: list[str]) -> list[str]:
        return [text.removeprefix(f"{self.work}/") for text in command]


def make(row: Row, table: Table) -> dict[str, Any]:
    """Run a row's commands and return what is kept of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in table.commands(row):
        _synthquant(command)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    beside = table.images(Row("float", steps=row.steps))
    compared = ["compare", str(table.images(row)), str(table.real()), "--features", FEATURES, "--json"]
    compared += ["--baseline", str(beside)] if row.scheme else []
    found = json.loads(_synthquant(compared))
    for name in ("images", "reference", "baseline"):
        found[name] = found[name] and Path(found[name]).name
    run = table.work / f"run--{row.name}" / "run.json"
    stages = json.loads(run.read_text())["stages"] if row.scheme else {}
    return {
        "name": row.name,
        "commands": table.shown(row),
        "pipeline": table.pipeline,
        "quality": found,
        "accuracy": stages.get("evaluate", {}).get("metrics", {}).get("accuracy"),
        "coverage": stages.get("quantize", {}).get("metrics", {}).get("coverage_summary"),
        "processor_seconds": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
        "environment": environment("cpu"),
    }


def _synthquant(command: list[str]) -> str:
    """Run a command of the library; its progress goes where ours goes. Raises `CalledProcessError`."""
    code = "import sys; from synthquant.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True, check=True).stdout


def _set(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--real", type=Path, required=True, help="real images, as open_images takes them")
    parser.add_argument("--real-count", type=int, default=10_000, help="so many of them, drawn by seed")
    parser.add_argument("--count", type=int, default=2048, help="images of a row")
    parser.add_argument("--kept", type=int, default=32, help="images whose error is followed through the steps")
    parser.add_argument("--batch", type=int, default=64, help="images drawn together")
    parser.add_argument("--calibration", type=int, default=1000, help="rows of a trajectory")
    parser.add_argument("--iterations", type=int, default=300, help="of each unit, in each of the two phases")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/quantized_diffusion"))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    table = Table(args)
    rows = [row for row in plan() if all(word in row.name for word in args.only)]
    missing = [row for row in rows if not table.finished(row)]
    print(f"{len(missing)} of {len(rows)} rows are missing", flush=True)
    for row in missing:
        if args.dry_run:
            print("\n  ".join([row.name, *table.shown(row)]))
            continue
        float_row = Row("float", steps=row.steps)
        if row.scheme:  # at once if they are all there
            _synthquant(table.commands(float_row)[0])
        args.out.mkdir(parents=True, exist_ok=True)
        found = make(row, table)
        write_json(table.path(row), found)
        print(row.name, json.dumps(found["quality"]["frechet"]), f"{found['processor_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
