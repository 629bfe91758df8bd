"""Q-Diffusion beside the authors' code: networks of the same widths, rows, iterations, machine and process.

    python benchmarks/reconstruction_vs_q_diffusion.py --official CHECKOUT --work FOLDER --out FILE

`CHECKOUT` is a clone of the authors' repository, which is only imported from there; it needs `einops` and knows GPUs
only, so that their name is read as the CPU's here. Theirs is their DDIM network, ours the network of diffusers that has
the same convolutions and attentions, both with random weights: W4A8, shortcuts split, both phases, all units. Rows and
iterations are in the proportion of the published 5,120 rows and 20,000 iterations of 32, so that what is spent on
caches counts as much as there. What is compared is processor time for each unit; repeats alternate.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from synthquant import make
from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.diffusion.trajectory import Trajectory
from synthquant.models.open import open_model
from synthquant.recipe import QuantizeSection, SynthesizeSection

WIDTHS = (1, 2, 2)
BATCH = 32


def ours(folder: Path, rows: int, iterations: int) -> dict[str, Any]:
    """Quantize the network of diffusers."""
    model = open_model(f"diffusers/{folder}")
    trajectory = Trajectory.open(folder.parent / "rows")
    values = {
        "method": "q_diffusion",
        "scheme": {
            "preset": "W4A8",
            "ends": "same",
            "split_shortcuts": "skip",
            "attention": {"softmax": {"num_bits": 8, "symmetric": True}},
        },
        "iterations": iterations,
        "activation_iterations": iterations,
        "batch_size": BATCH,
    }
    section = QuantizeSection.parse(values, "benchmark")
    network = make.fitted(model, trajectory)
    began = time.process_time()
    _, report = make.quantize(network, section, trajectory, 0)
    seconds = time.process_time() - began
    return _found(seconds, len(report.units), _parameters(model.module), rows)


def official(checkout: Path, width: int, trajectory: Trajectory, iterations: int) -> dict[str, Any]:
    """Quantize theirs, as their script for CIFAR-10 does."""
    sys.path.insert(0, str(checkout))
    from ddim.models.diffusion import Model
    from qdiff import BaseQuantBlock, QuantModel, QuantModule, block_reconstruction, layer_reconstruction

    shape = SimpleNamespace(
        type="simple", ch=width, out_ch=3, ch_mult=WIDTHS, num_res_blocks=2, attn_resolutions=[16], dropout=0.0,
        in_channels=3, resamp_with_conv=True,
    )  # fmt: skip
    config = SimpleNamespace(
        model=shape,
        data=SimpleNamespace(image_size=32),
        diffusion=SimpleNamespace(num_diffusion_timesteps=1000),
        split_shortcut=True,
    )
    torch.manual_seed(0)
    network = Model(config).eval()
    parameters = _parameters(network)
    given = next(batch.kwargs for batch in trajectory.batches(len(trajectory)))
    rows = given["sample"].float(), given["timestep"].float()
    weights = {"n_bits": 4, "channel_wise": True, "scale_method": "max"}
    activations = {
        "n_bits": 8, "symmetric": True, "channel_wise": False, "scale_method": "max", "leaf_param": True,
    }  # fmt: skip
    began, units = time.process_time(), 0
    quantized = QuantModel(model=network, weight_quant_params=weights, act_quant_params=activations, sm_abit=8).eval()
    quantized.set_quant_state(True, False)
    with torch.no_grad():
        quantized(rows[0][:8], rows[1][:8])

    def reconstruct(module: nn.Module, **settings: Any) -> int:
        done = 0
        for child in module.children():
            if isinstance(child, QuantModule):
                layer_reconstruction(quantized, child, **settings)
            elif isinstance(child, BaseQuantBlock):
                block_reconstruction(quantized, child, **settings)
            else:
                done += reconstruct(child, **settings)
                continue
            done += 1
        return done

    common = {"cali_data": rows, "batch_size": BATCH, "iters": iterations, "opt_mode": "mse"}
    units += reconstruct(quantized, **common, weight=0.01, asym=True, b_range=(20, 2), warmup=0.2, act_quant=False)
    quantized.set_quant_state(True, True)
    with torch.no_grad():
        quantized(rows[0][:64], rows[1][:64])
    units += reconstruct(quantized, **common, act_quant=True, lr=4e-4, p=2.4)
    return _found(time.process_time() - began, units, parameters, len(rows[0]))


def on_cpu() -> None:
    """Let tensors go to the CPU where the authors' code sends them to a GPU."""
    to = Tensor.to

    def sent(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)

    Tensor.to = sent  # type: ignore[assignment,method-assign]


def save_pipeline(folder: Path, width: int) -> None:
    """The network of diffusers that is theirs, layer by layer, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=tuple(width * factor for factor in WIDTHS), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=32, downsample_padding=0, attention_head_dim=None, norm_eps=1e-6,
    )  # fmt: skip
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _found(seconds: float, units: int, parameters: int, rows: int) -> dict[str, Any]:
    return {"processor_seconds": round(seconds, 1), "units": units, "parameters": parameters, "rows": rows}


def main() -> None:
    """Alternate and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--official", type=Path, required=True, help="clone of the authors' repository")
    parser.add_argument("--width", type=int, default=32, help="channels of the first level, a multiple of 32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=125, help="of each unit, in each phase")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.official, out = args.official.resolve(), args.out.resolve()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    folder = args.work / "pipeline"
    save_pipeline(folder, args.width)
    source = f"diffusers/{folder}"
    values = {"method": "self_sampling", "count": args.rows, "sampler_steps": 8, "steps": 8, "batch_size": BATCH}
    make.synthesize(open_model(source), SynthesizeSection.parse(values, "benchmark"), 0, args.work / "rows")
    trajectory = Trajectory.open(args.work / "rows")
    on_cpu()
    runs = []
    for repeat in range(args.repeats):
        for name in ("ours", "official") if repeat % 2 == 0 else ("official", "ours"):
            found = (
                ours(folder, args.rows, args.iterations)
                if name == "ours"
                else official(args.official, args.width, trajectory, args.iterations)
            )
            found |= {"name": name, "seconds_a_unit": found["processor_seconds"] / found["units"]}
            runs.append(found)
            print(json.dumps(found), flush=True)
    each = {name: sum(run["seconds_a_unit"] for run in runs if run["name"] == name) for name in ("ours", "official")}
    result = {
        "ratio": each["ours"] / each["official"],
        "runs": runs,
        "options": {"width": args.width, "iterations": args.iterations, "rows": args.rows, "batch": BATCH},
        "environment": environment("cpu"),
    }
    write_json(out, result)
    print(f"processor time of a unit: {result['ratio']:.2f} of the authors'")


if __name__ == "__main__":
    main()
