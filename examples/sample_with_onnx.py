"""Draw images with an exported denoiser in ONNX Runtime and a scheduler of diffusers; synthquant is not needed.

    synthquant export RUN --to onnx --preset ort-cpu --out denoiser.onnx
    python examples/sample_with_onnx.py denoiser.onnx --pipeline PIPELINE --count 16 --steps 50 --out images.png

For an unconditional pipeline that draws pixels. PIPELINE is the folder (or the name on the hub) of the pipeline that
was quantized, or what `--to diffusers` wrote: its scheduler is taken. The noise is that of `synthquant sample`: a
random generator for each seed, on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import onnxruntime
import torch
from PIL import Image


def open_denoiser(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """The denoiser in ONNX Runtime, on the CPU; 0 threads: as many as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_scheduler(pipeline: str) -> diffusers.SchedulerMixin:
    """The scheduler of a pipeline."""
    _, kind = diffusers.DiffusionPipeline.load_config(pipeline)["scheduler"]
    return getattr(diffusers, kind).from_pretrained(pipeline, subfolder="scheduler")


def sample(
    denoiser: onnxruntime.InferenceSession, scheduler: diffusers.SchedulerMixin, seeds: Sequence[int], steps: int
) -> np.ndarray:
    """Images uint8 `[N, H, W, C]`, one for each seed."""
    inputs = {entry.name: entry for entry in denoiser.get_inputs()}
    times = {"tensor(float)": np.float32, "tensor(int64)": np.int64}[inputs["timestep"].type]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, *inputs["sample"].shape[1:])
    images = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    scheduler.set_timesteps(steps)
    images = images * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        given = {
            "sample": scheduler.scale_model_input(images, time).numpy(),
            "timestep": np.full(len(seeds), time.item(), times),
        }
        noise = torch.from_numpy(denoiser.run(None, given)[0])
        images = scheduler.step(noise, time, images, generator=generators).prev_sample
    pixels = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (pixels * 255).round().to(torch.uint8).numpy()


def grid(images: np.ndarray) -> Image.Image:
    """All images in rows of the same length."""
    columns = int(np.ceil(len(images) ** 0.5))
    missing = -len(images) % columns
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
    count, height, width, channels = images.shape
    rows = images.reshape(count // columns, columns, height, width, channels).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(-1, columns * width, channels).squeeze())


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("denoiser", type=Path, help="what `synthquant export RUN --to onnx` wrote")
    parser.add_argument("--pipeline", required=True, help="whose scheduler is taken")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones follow")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="PNG with all images")
    args = parser.parse_args()
    scheduler = open_scheduler(args.pipeline)
    seeds = range(args.seed, args.seed + args.count)
    images = sample(open_denoiser(args.denoiser, args.threads), scheduler, seeds, args.steps)
    grid(images).save(args.out)
    print(f"{len(images)} images in {args.out}")


if __name__ == "__main__":
    main()
