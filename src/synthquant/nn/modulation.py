"""MoDiff: layers that quantize how their input differs from the sampler's step before (arXiv:2506.22463).

A denoiser is called again and again with inputs that hardly change. So a layer `A` need not read its input `a_t`: it
reads the quantized difference to what it has read so far, and adds what comes of it to what it has put out so far:

    q_t = Q(a_t - r_{t+1}),  r_t = q_t + r_{t+1},  o_t = A q_t + o_{t+1}

where A is without its bias, which the first step has added. `r` is what was really read, so an error of one step is
part of the next difference and does not add up. At the first step there is nothing to subtract: `r_T = Q'(a_T)` with
the bits of the first step, `o_T = A r_T + b`.

`r` and `o` are kept in float32 while a sampler runs (`QuantModel.sampling`). What reads one tensor shares one `r`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from synthquant.core.errors import ModelError, SchemeError
from synthquant.core.formatting import size
from synthquant.core.modules import device_of, get_module, hooked
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.signature import Inputs
from synthquant.models.trace import Trace
from synthquant.nn.derived import derived_class
from synthquant.nn.input_schemes import ModulationScheme
from synthquant.nn.layers import QuantLayer, first_replaced
from synthquant.nn.reading import Reading
from synthquant.nn.sampler_run import SamplerRun
from synthquant.nn.scheme import LayerScheme, QuantArgs


class ModulatedLayer(QuantLayer):
    """A quantized layer that, while a sampler runs, reads differences and adds up what comes of them.

    Attributes:
        reading: what it reads, shared with other layers that read the same tensor.
        put_out: the running sum `o`, float32, or none outside of sampling.
        put_out_at: which step of the reading that is of; a layer that was left out at a step reads all of `r`.
        without_bias: this pass adds to what an earlier one put out.
    """

    reading: Reading
    put_out: torch.Tensor | None
    put_out_at: int
    without_bias: bool

    @property
    def bias(self) -> Any:
        """The bias that a forward pass adds: none where an earlier step has added it."""
        return None if self.without_bias else super().bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outside of sampling quantize the input and run the layer's own forward; in it, read the difference."""
        if not self.reading.run.active:
            return super().forward(*args, **kwargs)

        def read(x: torch.Tensor) -> torch.Tensor:
            difference = self.reading.take(x, self.input_quantizer)
            whole = self.reading.kept
            self.without_bias = self.put_out is not None and self.put_out_at == self.reading.steps - 1
            return difference if self.without_bias or whole is None else whole.to(difference.dtype)

        try:
            args, kwargs = first_replaced(read, args, kwargs)
            output: torch.Tensor = super(QuantLayer, self).forward(*args, **kwargs)
            kept = self.put_out if self.without_bias else None
        finally:
            self.without_bias = False
        self.put_out_at = self.reading.steps
        if kept is None:
            self.put_out = output.detach().to(torch.float32, copy=True)
            return output
        kept.add_(output.detach())
        return kept.to(output.dtype, copy=True)  # what follows may overwrite it


class ModulatedNetwork(nn.Module):
    """A network whose calls are steps of a sampler, while one runs."""

    modulation: Modulation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Check that this can be the next step, then the network's own forward."""
        modulation = self.modulation
        if modulation.run.active:
            modulation.run.step(args, kwargs)
            for reading in modulation.readings.values():
                reading.next_step()
        return super().forward(*args, **kwargs)


class Modulation:
    """The layers of a network that read differences, and what a sampler's run keeps of them.

    Attributes:
        run: the sampler's run: whether one is under way, and with which steps.
        layers: modulated layers by name, in execution order.
        readings: what they read, by the first layer that reads it.
        bytes_per_sample: bytes that are kept between steps for each row of a batch, of the size of the example; with
            classifier-free guidance an image has two rows.
    """

    def __init__(self, run: SamplerRun) -> None:
        self.run = run
        self.layers: dict[str, ModulatedLayer] = {}
        self.readings: dict[str, Reading] = {}
        self.bytes_per_sample = 0

    @property
    def calibrated(self) -> bool:
        """Whether every range is known that is not measured at run time."""
        return all(reading.calibrated for reading in self.readings.values())

    def require_calibrated(self) -> None:
        """Raise `ModelError` if static ranges are not set yet."""
        if not self.calibrated:
            raise ModelError(
                f"{self.run.network}: static ranges of differences are not set yet; quantize with a trajectory, or call"
                " calibrate_differences"
            )

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A sampler runs inside: the first call of the network is its first step.

        Raises:
            InputError: another run is under way.
        """
        self.run.begin()
        self._forget()
        try:
            yield
        finally:
            self.run.end()
            self._forget()

    def _forget(self) -> None:
        for reading in self.readings.values():
            reading.start()
        for layer in self.layers.values():
            layer.put_out, layer.put_out_at = None, 0

    def state(self) -> dict[str, torch.Tensor]:
        """Grids of differences by name, and the timesteps that they are of; nothing if ranges are dynamic."""
        found = {f"{n}.reading.{part}": t for n, reading in self.readings.items() for part, t in reading.grid().items()}
        return found | ({"modulation.timesteps": self.run.timesteps} if found else {})

    def make_room(self, state: Mapping[str, torch.Tensor]) -> None:
        """Let the timesteps be as many as a state has."""
        found = state.get("modulation.timesteps")
        if found is not None and found.ndim == 1:
            self.run.timesteps = torch.zeros(len(found), dtype=torch.float64)

    def __str__(self) -> str:
        """One line: what is kept between steps."""
        return (
            f"modulation: {len(self.layers)} layers read differences between the sampler's steps, and"
            f" {size(self.bytes_per_sample)} are kept between steps for each row of a batch; outside of"
            " sampling, where outputs are measured, it is the network of the first step"
        )


def modulated_plan(
    plan: Mapping[str, LayerScheme], scheme: ModulationScheme
) -> tuple[dict[str, LayerScheme], dict[str, QuantArgs]]:
    """What each layer reads at the first step and outside of sampling, and the differences that it reads later.

    Raises:
        SchemeError: differences have no such kind.
    """
    first, differences = {}, {}
    for name, own in plan.items():
        args = own.input_activations
        first[name] = own
        if args is None:
            continue
        if args.kind not in ("affine", "dynamic") or args.strategy != "tensor":
            raise SchemeError(f"{name}: modulation quantizes differences evenly, per tensor; not by kind {args.kind!r}")
        differences[name] = args
        wide = None if scheme.first_bits is None else args.at_least(scheme.first_bits)
        first[name] = own.model_copy(update={"input_activations": wide})
    return first, differences


def modulate(
    network: nn.Module,
    run: SamplerRun,
    scheme: ModulationScheme,
    differences: Mapping[str, QuantArgs],
    groups: Sequence[Sequence[str]],
    seen: Trace,
    example: Inputs,
) -> Modulation:
    """Let layers, which are of `ModulatedLayer`, read differences; in place.

    Args:
        network: the network, its layers quantized.
        run: what it is a part of.
        scheme: what was asked for.
        differences: how the differences are quantized that each layer reads.
        groups: layers that read the very same tensor.
        seen: a forward pass of the example.
        example: some samples.

    Raises:
        SchemeError: a layer runs more than once in a pass.
    """
    repeated = [name for name in differences if len(seen.calls(name)) != 1]
    if repeated:
        off = ", ".join(f'"{name}": {{"input_activations": null}}' for name in repeated)
        times = len(seen.calls(repeated[0]))
        raise SchemeError(
            f"{run.network}: {repeated[0]} runs {times} times in a pass, and modulation keeps one input for a layer;"
            f" leave out all that do with scheme.overrides={{{off}}}"
        )
    modulation, partners, kept = Modulation(run), {name: tuple(group) for group in groups for name in group}, 0
    for name, args in differences.items():
        (call,) = seen.calls(name)
        first = next(other for other in partners.get(name, (name,)) if differences.get(other) == args)
        if first not in modulation.readings:
            reading = Reading(args, run, dynamic=scheme.ranges == "dynamic")
            modulation.readings[first] = reading.to(device_of(network))
            kept += call.inputs[0].numel()
        layer = get_module(network, name)
        assert isinstance(layer, ModulatedLayer)
        layer.reading, layer.without_bias = modulation.readings[first], False
        layer.reading.readers += 1
        layer.put_out, layer.put_out_at = None, 0
        modulation.layers[name] = layer
        kept += call.outputs[0].numel()
    modulation.bytes_per_sample = math.ceil(kept * torch.float32.itemsize / len(example))
    network.__class__ = derived_class(ModulatedNetwork, type(network), prefix="Modulated")
    cast(ModulatedNetwork, network).modulation = modulation
    return modulation


def require_linear(network: nn.Module, modulation: Modulation, example: Inputs) -> None:
    """Raise `SchemeError` if a layer with a forward of its own is not linear in what it reads, its bias left out.

    Nothing may be quantized meanwhile.
    """
    known = {kind.forward for kind in QUANTIZABLE}

    def check(name: str, layer: ModulatedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def scaled(factor: float) -> torch.Tensor:
            own, named = first_replaced(lambda x: x * factor, args, kwargs)
            output: torch.Tensor = super(QuantLayer, layer).forward(*own, **named)
            return output

        layer.without_bias = True
        once, twice, nothing = scaled(1), scaled(2), scaled(0)
        layer.without_bias = False
        if bool(nothing.any()) or not torch.allclose(twice, 2 * once, rtol=1e-3, atol=1e-5):
            raise SchemeError(
                f"{modulation.run.network}: {name} is not linear in what it reads, so what comes of differences does"
                f' not add up; leave it out with scheme.overrides={{"{name}": {{"input_activations": null}}}}'
            )

    own = [(name, layer) for name, layer in modulation.layers.items() if _forward(layer) not in known]
    hooks = [(layer, partial(check, name)) for name, layer in own]
    if hooks:
        with hooked(pre=hooks, with_kwargs=True), torch.no_grad():
            example.call(network)


def _forward(layer: QuantLayer) -> Any:
    """The forward of a layer's own class, behind quantization's."""
    return cast(Any, super(QuantLayer, layer)).forward.__func__
