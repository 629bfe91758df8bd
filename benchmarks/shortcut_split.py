"""Whether splitting the shortcuts of a denoiser helps: ranges of their halves, and output errors with and without.

    python benchmarks/shortcut_split.py --pipeline zoo/cifar10-ddpm --out results/shortcut_split/cifar10-ddpm.json
    python benchmarks/shortcut_split.py --consistency FOLDER --count 64 --out results/shortcut_split/terrain-unet.json

The first takes any unconditional diffusers pipeline, by name or folder. The second takes a consistency model: a folder
with `sampling.py`, which has `load(folder) -> (unet, embed)` and `denoise(unet, embed, noisy, sigma, difficulty)`; its
code is run. Calibrated on what the denoiser is given at all steps of its sampler, measured on other seeds: signal to
quantization noise of its output [dB], and for a consistency model the PSNR of samples of one and of four steps beside
float ones of the same seeds. Ranges are to both ends, in nearest rounding and in Q-Diffusion. Rows are written one at
a time; what is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.files import write_json
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.diffusion.pipelines import Sampling
from synthquant.evaluate.agreement import measure_output_sqnr
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.models.signature import Inputs, joined
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.q_diffusion import QDiffusion
from synthquant.quantize.rtn import Rtn
from synthquant.quantize.shortcut_ranges import HalfRange, shortcut_ranges

SCHEMES = ("W8A8", "W4A8")
SPLITS = (None, "skip", "all")
SIGMAS = (80.0, 20.0, 4.0, 0.8)
"""Noise levels of four steps of a consistency model; the first one alone is its single step."""


class Recorded:
    """What a denoiser was given, with the step of each sample."""

    def __init__(self, by_step: dict[int, Inputs]) -> None:
        self.inputs = joined(list(by_step.values()))
        self.steps = torch.cat([torch.full((len(inputs),), step) for step, inputs in by_step.items()])

    @property
    def fingerprint(self) -> str:
        """Hash of all of it."""
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in self.inputs.tensors)).hexdigest()

    def __len__(self) -> int:
        """How many samples."""
        return len(self.inputs)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        """Yield them, `size` at a time."""
        chosen = torch.tensor(list(range(len(self)) if indices is None else indices))
        for part in chosen.split(size):
            yield self.inputs.filled([tensor[part] for tensor in self.inputs.tensors])


@dataclass(frozen=True)
class Subject:
    """A denoiser, what it is calibrated with and measured on, and what its samples are compared by, if anything."""

    model: FloatModel
    calibration: Recorded
    test: Recorded
    psnr: Callable[[nn.Module], dict[str, float]] | None = None


def of_pipeline(source: str, steps: int, count: int) -> Subject:
    """Record an unconditional pipeline: `count` samples for calibration, a quarter as many from other seeds."""
    model = open_model(ModelSource(source=source))
    pipeline, sampling = model.pipeline, Sampling(steps=steps)  # type: ignore[attr-defined]

    def record(first_seed: int, wanted: int) -> Recorded:
        seeds = range(first_seed, first_seed + max(1, wanted // steps))
        return Recorded(pipeline.record(None, list(seeds), sampling, range(steps)))

    return Subject(model, record(0, count), record(10_000, count // 4))


def of_consistency_model(folder: Path, count: int, drawn: int) -> Subject:
    """Record a consistency model at four noise levels; `drawn` samples are compared by themselves."""
    spec = importlib.util.spec_from_file_location("sampling", folder / "sampling.py")
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    unet, embed = code.load(folder)
    size, channels = unet.config.sample_size, unet.config.in_channels

    @torch.no_grad()
    def draw(network: nn.Module, seeds: Sequence[int], sigmas: Sequence[float]) -> Tensor:
        fields = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            x, difficulty = torch.zeros(1, channels, size, size), torch.rand(1, generator=generator)
            for sigma in sigmas:
                noisy = x + sigma * torch.randn(x.shape, generator=generator)
                x = code.denoise(network, embed, noisy, torch.full((1,), sigma), difficulty)
            fields.append(x)
        return torch.cat(fields)

    def record(first_seed: int, wanted: int) -> Recorded:
        found: dict[int, list[Inputs]] = {}
        number = 0

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal number
            given = {"sample": args[0].clone(), "timestep": args[1].clone(), **kwargs, "return_dict": False}
            found.setdefault(number % len(SIGMAS), []).append(Inputs((), given))
            number += 1

        handle = unet.register_forward_pre_hook(see, with_kwargs=True)
        draw(unet, range(first_seed, first_seed + max(1, wanted // len(SIGMAS))), SIGMAS)
        handle.remove()
        return Recorded({step: joined(calls) for step, calls in found.items()})

    calibration = record(0, count)
    unet.requires_grad_(False)
    source = ModelSource(source=folder.name, task="other")
    model = FloatModel(unet, calibration.inputs.rows(0, 3), folder.name, source, "other")
    seeds, wanted = range(20_000, 20_000 + drawn), {}
    for steps in (1, len(SIGMAS)):
        wanted[f"psnr_{steps}_steps"] = SIGMAS[:steps], draw(unet, seeds, SIGMAS[:steps])

    def psnr(network: nn.Module) -> dict[str, float]:
        return {name: _psnr(draw(network, seeds, sigmas), known) for name, (sigmas, known) in wanted.items()}

    return Subject(model, calibration, record(10_000, count // 4), psnr)


def _psnr(found: Tensor, wanted: Tensor) -> float:
    """In dB, with the range of all wanted values as the peak."""
    error = float((found - wanted).square().mean())
    return 10 * math.log10(float(wanted.max() - wanted.min()) ** 2 / error)


def report_ranges(subject: Subject, count: int) -> list[dict[str, Any]]:
    """Measure and print the halves of every layer that can be split."""
    halves = shortcut_ranges(subject.model, subject.calibration, mode="all", count=count)
    print(f"{'layer':44} {'what it reads':>34} {'ratio':>7} {'weights':>30} {'ratio':>7}")
    for name in dict.fromkeys(half.layer for half in halves):
        parts = [half for half in halves if half.layer == name]
        read = " | ".join(f"{half.low:7.2f} .. {half.high:6.2f}" for half in parts)
        weights = " | ".join(f"{half.weight_low:6.2f} .. {half.weight_high:5.2f}" for half in parts)
        spans = _ratio(parts, lambda half: half.span), _ratio(parts, lambda half: half.weight_span)
        print(f"{name:44} {read:>34} {spans[0]:7.1f} {weights:>30} {spans[1]:7.1f}")
    return [half.row() | {"span": half.span, "weight_span": half.weight_span} for half in halves]


def _ratio(parts: Sequence[HalfRange], span: Callable[[HalfRange], float]) -> float:
    return max(map(span, parts)) / max(min(map(span, parts)), 1e-12)


def measure(subject: Subject, scheme: str, split: str | None, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and measure once."""
    fields = {"preset": scheme, "split_shortcuts": split, "ends": args.ends}
    model = QuantModel.build(subject.model, QuantScheme.parse(fields))
    began = time.process_time()
    if method == "rtn":
        Rtn(observer="minmax", calibration_images=args.count).apply(model, subject.calibration, Rng(args.seed))
    else:
        settings = {"iterations": args.iterations, "activation_iterations": args.iterations}
        learned = QDiffusion(**settings, batch_size=args.batch_size, calibration_images=args.count)  # type: ignore[arg-type]
        learned.apply(model, subject.calibration, Rng(args.seed), progress=ConsoleProgress())
    seconds = time.process_time() - began
    found = measure_output_sqnr(model, subject.test, count=len(subject.test))
    row = {"scheme": scheme, "split": split, "method": method, "seed": args.seed, "sqnr": found.total}
    return row | {"cpu_seconds": round(seconds, 1)} | (subject.psnr(model.module) if subject.psnr else {})


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", help="an unconditional diffusers pipeline")
    source.add_argument("--consistency", type=Path, help="a folder with sampling.py and a UNet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=25, help="of the pipeline's sampler")
    parser.add_argument("--count", type=int, default=200, help="samples for calibration")
    parser.add_argument("--iterations", type=int, default=100, help="of each phase and unit of q_diffusion")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--drawn", type=int, default=8, help="samples of a consistency model for the PSNR")
    parser.add_argument("--ends", choices=("w8a8", "same"), default="w8a8")
    parser.add_argument("--methods", nargs="+", choices=("rtn", "q_diffusion"), default=["rtn", "q_diffusion"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.pipeline:
        subject = of_pipeline(args.pipeline, args.steps, args.count)
    else:
        subject = of_consistency_model(args.consistency, args.count, args.drawn)
    options = {"iterations": args.iterations, "batch_size": args.batch_size, "ends": args.ends}
    options |= {"calibration": len(subject.calibration), "test": len(subject.test)}
    result: dict[str, Any] = {"network": subject.model.name, "options": options, "rows": []}
    if args.out.exists():
        found = json.loads(args.out.read_text())
        if found["options"] != options:
            parser.error(f"{args.out} was made with {found['options']}; give another --out")
        result = found
    else:
        result |= {"environment": environment(), "ranges": report_ranges(subject, args.count)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    done = {(row["scheme"], row["split"], row["method"], row["seed"]) for row in result["rows"]}
    for method in args.methods:
        for scheme in args.schemes:
            for split in SPLITS:
                if (scheme, split, method, args.seed) not in done:
                    result["rows"].append(row := measure(subject, scheme, split, method, args))
                    print(json.dumps(row), flush=True)
                    write_json(args.out, result)


if __name__ == "__main__":
    main()
