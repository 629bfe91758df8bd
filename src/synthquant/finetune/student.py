"""The quantized network while it is trained, beside the float network that teaches it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from synthquant.nn.quant_model import QuantModel
from synthquant.nn.weight_sources import CodeOffsets, LearnedStep
from synthquant.quantize.learn import learning

WeightForm = Literal["offsets", "weights"]
Group = Literal["weights", "weight_scales", "activation_scales", "others"]


class Student:
    """A trainable copy of a quantized network: every layer's weight comes from a source that an optimiser moves.

    Attributes:
        network: the copy, in evaluation mode: batch norms that were kept use the statistics that they have.
        parameters: what is learned, by name.
        groups: which of them belong together.
        units: what a step of each changes it by, in proportion: 1 where it is relative already or has no scale of its
            own, for steps of activations the size that `measure_units` found.
    """

    def __init__(self, quant_model: QuantModel, form: WeightForm, *, lsq_gradient_scale: bool) -> None:
        """Start where `quant_model` is, which stays as it is.

        With the form `weights`, where layers start from float weights and the step sizes, networks that were loaded
        take those weights from their float network.
        """
        self.network = quant_model.trainable_copy()
        self.parameters: dict[str, nn.Parameter] = {}
        self.groups: dict[str, Group] = {}
        self.units: dict[str, float] = {}
        self._lsq_gradient_scale = lsq_gradient_scale
        self._sources: list[CodeOffsets | LearnedStep] = []
        weights = _float_weights(quant_model) if form == "weights" else {}
        for name, parameter in self.network.module.named_parameters():
            if parameter.requires_grad:
                self._add(name, parameter, "others")
        for name, layer in self.network.layers.items():
            quantizer = layer.weight_quantizer
            if quantizer is None:
                continue
            scaled = {"lsq_gradient_scale": lsq_gradient_scale}
            source = LearnedStep(quantizer, weights[name], **scaled) if weights else CodeOffsets(quantizer, **scaled)
            layer.weight_source = source
            self._sources.append(source)
            self._add(f"{name}.weight", source.learned, "weights")
            self._add(f"{name}.weight_scale", source.factor, "weight_scales")
        for name, one in self.network.quantizers.items():
            for index, part in enumerate([] if one.fixed else one.learnable()):
                self._add(f"{name}.{index}", part, "activation_scales")
        self.measure_units()

    def measure_units(self) -> None:
        """Count steps of activations, from now on, in what they are now."""
        for name, group in self.groups.items():
            if group == "activation_scales":
                self.units[name] = float(self.parameters[name].detach().abs().mean())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let gradients pass through quantizers and reach all that is learned."""
        scales = [self.parameters[name] for name, group in self.groups.items() if group == "activation_scales"]
        quantizers = self.network.quantizers.values()
        with learning(quantizers, scales, lsq_gradient_scale=self._lsq_gradient_scale):
            yield

    def keep_legal(self) -> None:
        """Undo what is no grid after an optimiser's step."""
        for source in self._sources:
            source.keep_legal()
        for quantizer in self.network.quantizers.values():
            if not quantizer.fixed:
                quantizer.keep_legal()

    def values(self) -> dict[str, Tensor]:
        """What has been learned so far, by name; copies."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take values that `values` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Have other values for a while."""
        own = self.values()
        try:
            self.load(values)
            yield
        finally:
            self.load(own)

    def finished(self) -> QuantModel:
        """The quantized network that training has come to: codes again, nothing in it learns."""
        network = copy.deepcopy(self.network, {id(self.network.float_model): self.network.float_model})
        for layer in network.layers.values():
            layer.harden_weight()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        return network

    def _add(self, name: str, parameter: nn.Parameter, group: Group) -> None:
        self.parameters[name], self.groups[name], self.units[name] = parameter, group, 1.0


def _float_weights(quant_model: QuantModel) -> dict[str, Tensor]:
    """The float weights of the layers that are quantized, batch norms folded."""
    source = quant_model
    if quant_model.loaded:
        source = QuantModel.build(
            quant_model.float_model, quant_model.scheme, quant_model.equalization, fold=quant_model.fold
        )
    return {name: layer.float_weight.detach() for name, layer in source.layers.items() if layer.weight_quantizer}
