"""Denoisers of diffusers of the smallest size with random weights, and samples of them at several sampler steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.toy_networks import InMemory
from torch import Tensor, nn

from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs

DENOISERS = ("unet", "conditional", "transformer")
STEPS = (900, 500, 100)


class Stepped(InMemory):
    """Samples that were taken at sampler steps, those of a step one after the other."""

    def __init__(self, inputs: Inputs, steps: Tensor) -> None:
        super().__init__(inputs)
        self.steps = steps


@dataclass(frozen=True)
class Denoiser:
    """A denoiser and what it is quantized with."""

    model: FloatModel
    samples: Stepped

    @property
    def inputs(self) -> Inputs:
        return self.samples.inputs

    def outputs(self, network: Any) -> Tensor:
        """What a network gives for all samples."""
        with torch.no_grad():
            output: Tensor = self.inputs.clone().call(network)[0]
        return output


def denoiser(kind: str, count: int = 12, **changes: Any) -> Denoiser:
    """Return one of `DENOISERS`, the same on every call, with `count` samples; `changes` of its configuration."""
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, size = _build(kind, changes)
    steps = torch.arange(count) * len(STEPS) // count
    kwargs: dict[str, Any] = {"sample": torch.randn(count, *size, generator=generator)}
    kwargs["timestep"] = torch.tensor(STEPS)[steps]
    if kind == "conditional":
        kwargs["encoder_hidden_states"] = torch.randn(count, 5, 8, generator=generator)
    if kind == "transformer":
        kwargs = {"hidden_states": kwargs["sample"], "timestep": kwargs["timestep"]}
        kwargs["class_labels"] = torch.randint(10, (count,), generator=generator)
    inputs = Inputs(kwargs=kwargs | {"return_dict": False})
    module.eval().requires_grad_(False)
    source = ModelSource(source=f"tiny/{kind}", task="other")
    model = FloatModel(module, inputs.rows(0, 3), kind, source, "other")
    return Denoiser(model, Stepped(inputs, steps))


def _build(kind: str, changes: Mapping[str, Any]) -> tuple[nn.Module, tuple[int, int, int]]:
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    if kind == "transformer":
        sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
        sizes |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4}
        return DiTTransformer2DModel(**sizes | dict(changes)), (4, 8, 8)
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
    sizes |= {"block_out_channels": (8, 16), "attention_head_dim": 8}
    if kind == "unet":
        sizes |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        sizes |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        return UNet2DModel(**sizes | dict(changes)), (3, 8, 8)
    sizes |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8}
    sizes |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "mid_block_type": "UNetMidBlock2DCrossAttn"}
    return UNet2DConditionModel(**sizes | dict(changes)), (3, 8, 8)
