"""MobileNetV2 and EfficientNet-Lite0 on 436 photographs: the rows of docs/results/imagenet.md.

    nice -n 19 python benchmarks/imagenet_table.py --photographs sample.parquet \
        --weights mobilenetv2=mobilenet_v2.safetensors --weights efficientnet-lite0=tf_efficientnet_lite0.safetensors

64 photographs drawn by seed are the real images to calibrate with, all others are measured on. Rows come in the order
of what they decide, each in a process of its own, and land one at a time in `results/imagenet/NETWORK.json`; images and
unfinished rows lie in `--work`. Called again after a kill it goes on; a row is done again where its settings, its
images or the network have changed. `--dry-run` says what is missing and what it will cost.
`--set quantize.FIELD=VALUE` changes all rows (with `--label NAME` they stand beside the others instead of in their
place), `--set METHOD.FIELD=VALUE` those of one method.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from photographs import CALIBRATION, divided
from runtime_quantizer import Network, exact_network, quantize_with_runtime
from synthquant.core.files import write_bytes, write_json
from synthquant.core.overrides import apply_overrides
from synthquant.core.progress import ConsoleProgress
from synthquant.core.quant_report import QuantReport
from synthquant.core.record import environment, peak_memory_bytes, reset_peak_memory
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.evaluate.accuracy import Evaluation, evaluate_model
from synthquant.evaluate.paired import PerImage
from synthquant.make import quantize
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.recipe import QuantizeSection, SynthesizeSection
from zero_shot_matrix import settings_of, synthetic_images

ROOT = Path(__file__).parent.parent
NETWORKS = {
    "mobilenetv2": "torchvision/mobilenet_v2.IMAGENET1K_V1",
    "efficientnet-lite0": "timm/tf_efficientnet_lite0",
}
SYNTHETIC = ("genie_d", "zeroq", "noise")
IDENTITY = ("label", "data", "scheme", "method", "seed")
RUNTIME = "onnxruntime"
"""Method of the row of the runtime's own quantizer."""
# Processor seconds of one thread of an AVX2 machine, as the first rows took: of an image and iteration of inversion, of
# an image and iteration of all units, and of every row.
COSTS = {"synthesis": 0.145, "reconstruction": 0.13, "calibration": 22.0, "evaluation": 20.0, "start": 8.0}


@dataclass(frozen=True)
class Row:
    """One network, quantized once: a row of the table, or the float network, or a set of images (no scheme)."""

    network: str
    data: str
    scheme: str
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        return "--".join(str(value) for value in asdict(self).values() if value != "")

    @property
    def decisive(self) -> bool:
        """Whether an aim at eight or four bits hangs on it."""
        wanted = ("rtn", "genie_m") if self.scheme == "W8A8" else ("genie_m",)
        return self.seed == 0 and self.data in ("genie_d", "real") and self.scheme != "W6A6" and self.method in wanted


def plan(networks: list[str], seeds: list[int]) -> list[Row]:
    """All rows, those that decide most first, both networks in turns."""
    kinds = ("genie_d", "real")
    order = [("real", "W8A8", RUNTIME)]
    order += [(kind, "W8A8", method) for method in ("rtn", "genie_m") for kind in kinds]
    order += [(kind, scheme, "genie_m") for scheme in ("W4A8", "W4A4", "W6A6") for kind in kinds]
    order += [(kind, scheme, "rtn") for scheme in ("W4A8", "W4A4", "W6A6") for kind in kinds]
    order += [(kind, scheme, method) for scheme in ("W4A4", "W4A8") for method in ("qdrop", "brecq") for kind in kinds]
    others = ("zeroq", "noise")
    order += [(kind, scheme, method) for method in ("genie_m", "rtn") for scheme in ("W4A4", "W4A8") for kind in others]
    rows = [Row(network, *entry) for entry in order for network in networks]
    again = [(kind, scheme, "genie_m") for scheme in ("W8A8", "W4A4", "W4A8") for kind in kinds]
    return rows + [Row(network, *entry, seed) for seed in seeds for entry in again for network in networks]


class Table:
    """The rows of one network that are there."""

    def __init__(self, network: str, args: argparse.Namespace) -> None:
        self.path: Path = args.out / f"{network}.json"
        self.work: Path = args.work / network
        self.network, self.args = network, args
        self.work.mkdir(parents=True, exist_ok=True)
        empty: dict[str, Any] = {"network": network, "model": NETWORKS[network], "images": {}, "rows": []}
        self.content: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else empty

    def finished(self, row: Row) -> bool:
        """Whether the row is there with these settings, made from the images that are there now."""
        found = self._find(row)
        if found is None or found["settings"] != section_of(row, self.args).model_dump(mode="json"):
            return False
        known = self.content["images"].get(f"{row.data}-{row.seed}", {})
        return row.data not in SYNTHETIC or (
            known.get("settings") == image_settings(row.data, self.args)
            and known.get("fingerprint") == found["images_fingerprint"]
        )

    def add(self, row: Row, values: dict[str, Any]) -> None:
        """Put a row in the place of the former one."""
        former = self._find(row)
        rows = [one for one in self.content["rows"] if one is not former]
        identity = {key: value for key, value in asdict(row).items() if key != "network"}
        self.content["rows"] = [*rows, {"label": self.args.label, **identity, **values}]
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def _find(self, row: Row) -> dict[str, Any] | None:
        wanted = (self.args.label, row.data, row.scheme, row.method, row.seed)
        same = (one for one in self.content["rows"] if wanted == tuple(one[key] for key in IDENTITY))
        return next(same, None)


def section_of(row: Row, args: argparse.Namespace) -> QuantizeSection:
    """How a row quantizes; of the runtime's own quantizer, the scheme that comes nearest."""
    method = "rtn" if row.method == RUNTIME else row.method
    # these networks have no attention, and rows say of it what they said before presets did
    values: dict[str, Any] = {"method": method, "scheme": {"preset": row.scheme, "attention": None}}
    if row.method == RUNTIME:
        return QuantizeSection.parse(values, row.name)
    values |= settings_of(method, args.iterations, args.batch_size, args.rounding_weight)
    changes = [text.partition(".") for text in args.set]
    wanted = [rest for section, _, rest in changes if section in ("quantize", method)]
    return QuantizeSection.parse(apply_overrides(values, wanted), row.name)


def image_settings(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """All settings of a method that makes images."""
    values: dict[str, Any] = {"method": kind, "count": args.count}
    if kind != "noise":
        values |= {"iterations": args.synthesis_iterations, "batch_size": args.synthesis_batch_size}
    wanted = [rest for section, _, rest in (text.partition(".") for text in args.set) if section == kind]
    return SynthesizeSection.parse(apply_overrides(values, wanted), "images").settings


class Clock:
    """Wall and processor seconds of a piece of work, and how many processes have begun it."""

    def __init__(self, note: Path, device: str) -> None:
        self.sittings = 1 + (int(note.read_text()) if note.exists() else 0)
        note.write_text(str(self.sittings))
        self._device = device
        reset_peak_memory(device)
        self._wall, self._user, self._system = time.perf_counter(), *_processor()

    def values(self) -> dict[str, Any]:
        """Return seconds and peak memory of this sitting, which is all of the work if `sittings` is 1."""
        user, system = _processor()
        return {
            "seconds": round(time.perf_counter() - self._wall, 1),
            "user_seconds": round(user - self._user, 1),
            "system_seconds": round(system - self._system, 1),
            "peak_memory_bytes": peak_memory_bytes(self._device),
            "sittings": self.sittings,
        }


def _processor() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


def images_of(row: Row, model: FloatModel, real: ImageSet, table: Table) -> ImageSet:
    """The images that a row calibrates with; what making them cost is kept in the table."""
    if row.data == "real":
        return real
    name, settings = f"{row.data}-{row.seed}", image_settings(row.data, table.args)
    known = table.content["images"].get(name)
    folder = table.work / f"images-{name}-{digest(settings)}"
    if known is not None and known["settings"] == settings and folder.exists():
        return ImageSet.open(folder)
    clock = Clock(folder.with_suffix(".sittings"), table.args.device)
    images = synthetic_images(row.data, model, table.args.count, settings, row.seed, folder)
    table.content["images"][name] = {
        "settings": settings,
        "count": len(images),
        "fingerprint": images.fingerprint,
        "seed": row.seed,
        **clock.values(),
        "environment": environment(table.args.device),
    }
    table.save()
    return images


def digest(values: dict[str, Any]) -> str:
    """A short name of settings."""
    return f"{Rng(0).seed_for(json.dumps(values, sort_keys=True)) & 0xFFFFFFFF:08x}"


def measured(network: Network | QuantModel, model: FloatModel, test: ImageSet, reference: Tensor) -> dict[str, Any]:
    """Columns of a row."""
    found = evaluate_model(network, model.preprocess, test, reference_logits=reference)
    return columns(found, test, reference)


def columns(found: Evaluation, test: ImageSet, reference: Tensor) -> dict[str, Any]:
    """What an evaluation says, and what it says of every image."""
    if test.labels is None or found.set_aside:
        raise SystemExit(f"the photographs need labels, and all must be readable: {found.set_aside}")
    images = PerImage.of(found.logits, torch.as_tensor(test.labels), reference)
    values = {"top1": found.top1, "agreement": found.agreement, "kl": found.kl, "count": found.count}
    return {**values, "per_image": images.packed()}


def float_logits(model: FloatModel, test: ImageSet, table: Table) -> Tensor:
    """The float network's logits on the photographs that are measured on, and its row in the table."""
    identity = {"model": model.fingerprint, "preprocess": prepared(model), "images": test.fingerprint}
    file = table.work / f"float-{digest(identity)}.safetensors"
    if "float" in table.content and file.exists():
        return load_file(file)["logits"]
    found = evaluate_model(model.module, model.preprocess, test)
    write_bytes(file, save({"logits": found.logits}))
    table.content |= {"fingerprint": model.fingerprint, "preprocess": prepared(model)}
    table.content["float"] = columns(found, test, found.logits)
    table.save()
    return found.logits


def prepared(model: FloatModel) -> dict[str, Any]:
    """How the network's images are prepared."""
    return model.preprocess.model_dump(mode="json")


def do_row(row: Row, args: argparse.Namespace) -> None:
    """Quantize and measure once, and keep the row."""
    table = Table(row.network, args)
    model = open_model(NETWORKS[row.network], weights=args.files.get(row.network), device=args.device)
    real, test = divided(args.photographs)
    known = [table.content.get(key) for key in ("fingerprint", "preprocess")]
    if known not in ([None, None], [model.fingerprint, prepared(model)]):
        raise SystemExit(f"{table.path} is of other weights or preprocessing of {row.network}; choose another --out")
    reference = float_logits(model, test, table)
    images = images_of(row, model, real, table)
    key = digest({**section_of(row, args).model_dump(mode="json"), "images": images.fingerprint})
    work = table.work / f"{row.name}-{args.label}-{key}"
    clock = Clock(work.with_suffix(".sittings"), args.device)
    if row.method == RUNTIME:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "runtime.onnx"
            quantize_with_runtime(model, model_inputs(images, model.preprocess), path)
            cost, diverged = clock.values(), []
            values = measured(exact_network(path), model, test, reference)
    else:
        quant_model, report = quantized(row, model, images, work, args)
        cost, diverged = clock.values(), list(report.diverged)
        values = measured(quant_model, model, test, reference)
    settings = section_of(row, args).model_dump(mode="json")
    made = {"settings": settings, "changes": args.set, "images_fingerprint": images.fingerprint, "diverged": diverged}
    table.add(row, {**values, **cost, **made, "environment": {**environment(args.device), "seed": str(row.seed)}})
    short = {name: values[name] for name in ("top1", "agreement", "kl")}
    print(row.name, json.dumps({**short, **cost}), flush=True)


def quantized(
    row: Row, model: FloatModel, images: ImageSet, work: Path, args: argparse.Namespace
) -> tuple[QuantModel, QuantReport]:
    """The network as a row quantizes it; finished units lie in `work`."""
    section = section_of(row, args)
    work.mkdir(parents=True, exist_ok=True)
    return quantize(model, section, images, row.seed, ConsoleProgress(), workdir=work)


def estimate(row: Row, made: set[str], args: argparse.Namespace) -> float:
    """Processor seconds that a row will take, with its images where they are not there yet."""
    seconds = COSTS["start"] + COSTS["calibration"] + COSTS["evaluation"]
    images = f"{row.network}-{row.data}-{row.seed}"
    if row.data in ("genie_d", "zeroq") and images not in made:
        made.add(images)
        seconds += COSTS["synthesis"] * args.count * image_settings(row.data, args)["iterations"]
    settings = section_of(row, args).settings
    steps = settings.get("iterations", 0) + settings.get("activation_iterations", 0)
    return seconds + COSTS["reconstruction"] * steps * settings.get("batch_size", 0)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True, help="labelled photographs, in any form synthquant takes")
    parser.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2], help="besides 0")
    parser.add_argument("--only", action="append", default=[], help="part of a row's name")
    parser.add_argument("--count", type=int, default=CALIBRATION, help="synthetic images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--iterations", type=int, default=60, help="of each unit, of methods that learn")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounding-weight", type=float, default=0.1, help="of BRECQ and QDrop")
    parser.add_argument("--synthesis-iterations", type=int, default=200)
    parser.add_argument("--synthesis-batch-size", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--remedies", action="store_true", help="equalize and bias_correction, for all methods")
    parser.add_argument("--label", default="default", help="keeps rows of other settings apart")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "imagenet")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "imagenet")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--row", help="do this row only, here")
    args = parser.parse_args()
    args.files = dict(text.split("=", 1) for text in args.weights)
    if args.remedies:
        args.set = ["quantize.equalize=activations", "quantize.bias_correction=true", *args.set]
    return args


def main() -> None:
    """Do what is missing, a process a row."""
    args = parsed()
    rows = [row for row in plan(args.networks, args.seeds) if all(part in row.name for part in args.only)]
    if args.row is not None:
        torch.set_num_threads(1)
        do_row(next(row for row in rows if row.name == args.row), args)
        return
    missing = [row for row in rows if not Table(row.network, args).finished(row)]
    if args.dry_run:
        made: set[str] = set()
        costs = [estimate(row, made, args) for row in missing]
        first = [cost for row, cost in zip(missing, costs, strict=True) if row.decisive]
        for row, cost in zip(missing, costs, strict=True):
            print(f"{row.name:50} {cost:6.0f} s")
        print(
            f"{len(first)} rows that decide (Genie-M and rtn, seed 0, Genie-D and real): {sum(first) / 60:.0f} minutes"
        )
        print(f"{len(missing)} of {len(rows)} rows are missing: {sum(costs) / 3600:.1f} processor hours at one thread")
        return
    failed = []
    # without the thresholds the allocator gives memory back at every step, which costs a third of the time
    variables = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32), "OMP_NUM_THREADS": "1"}
    for row in missing:
        command = [sys.executable, *sys.argv, "--row", row.name]
        if subprocess.run(command, env={**variables, **os.environ}).returncode:
            failed.append(row.name)
    if failed:
        raise SystemExit(f"{len(failed)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
