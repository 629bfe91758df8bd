"""What a sampler really gives its denoiser: calls in one form, watched while a pipeline draws."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import DataError, UnsupportedModelError
from synthquant.core.modules import device_of
from synthquant.diffusion.library import denoiser_output
from synthquant.models.signature import Inputs, joined

_TIME = "timestep"
# What pipelines of DDIM and DDPM give the step of every scheduler, though some take none of it.
_OPTIONAL = ("eta", "use_clipped_model_output", "generator")


class Enough(Exception):
    """Ends a pipeline's call: all that was asked for has been seen."""


def normal_form(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """Return a call of a denoiser as keyword arguments, in the order of its forward's parameters.

    What is none is left out, `return_dict` is False, a time step for all samples becomes one for each, `[B]`, and
    arguments without a row for each sample are named constant. Two calls that mean the same are the same so.

    Raises `UnsupportedModelError` for an argument that mixes tensors with and without rows.
    """
    signature = inspect.signature(module.original.forward if isinstance(module, StandIn) else module.forward)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        further = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if further else {name: value}
    known = {name: value for name, value in given.items() if value is not None}
    if "return_dict" in signature.parameters:
        known |= {"return_dict": False}
    main = next((leaf for leaf in pytree.tree_leaves(known) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if main is None:
        raise UnsupportedModelError(f"{type(module).__name__} was called without a tensor of samples")
    rows = len(main)
    if _TIME in known:
        time = torch.as_tensor(known[_TIME], device=main.device)
        known[_TIME] = time.reshape(-1).expand(rows) if time.numel() == 1 else time
    constants = set()
    for name, value in known.items():
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        fitting = [bool(tensor.ndim) and len(tensor) == rows for tensor in tensors]
        if tensors and not any(fitting):
            constants.add(name)
        elif not all(fitting):
            raise UnsupportedModelError(
                f"{type(module).__name__} is given {name} with some tensors that have a row for each of {rows} samples"
                " and some that have not"
            )
    order = list(signature.parameters)
    ordered = sorted(known, key=lambda name: order.index(name) if name in order else len(order))
    return Inputs((), {name: known[name] for name in ordered}, frozenset(constants))


class Recorder:
    """Keeps what a denoiser is given at some of the sampler's steps, on the CPU.

    Args:
        wanted: numbers of these steps; a step ends where the scheduler makes the next image of what was predicted.
        at_first: end with the first call that is wanted, before the denoiser runs.
    """

    def __init__(self, wanted: Collection[int], *, at_first: bool = False) -> None:
        self.step = 0
        self.found: dict[int, Inputs] = {}
        self._wanted, self._last, self._at_first = frozenset(wanted), max(wanted), at_first
        self._calls: list[Inputs] = []

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The denoiser is called; a pre-hook of it."""
        if self.step in self._wanted:
            self._calls.append(normal_form(module, args, kwargs).to(torch.device("cpu")).clone())
            if self._at_first:
                self._end_step()
                raise Enough

    def end_step(self) -> None:
        """The scheduler makes the next image. Raises `Enough` after the last step that is wanted."""
        self._end_step()
        if self.step > self._last:
            raise Enough

    def _end_step(self) -> None:
        if self._calls:
            try:
                self.found[self.step] = joined(self._calls)
            except (DataError, ValueError, RuntimeError) as error:
                raise UnsupportedModelError(
                    f"the calls of one step of the sampler cannot be joined to one batch ({error})"
                ) from error
        self._calls = []
        self.step += 1


@contextmanager
def steps_of(
    scheduler: Any, generators: Sequence[torch.Generator], before: Callable[[], None] | None = None
) -> Iterator[None]:
    """Let a scheduler draw its noise from one generator for each image, and call `before` each of its steps.

    Some pipelines (DiT, latent diffusion) do not hand their generators on to the scheduler, whose noise would then be
    that of the process.
    """
    step = scheduler.step
    takes = inspect.signature(step).parameters

    @functools.wraps(step)
    def watched(model_output: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        kwargs = {name: value for name, value in kwargs.items() if name in takes or name not in _OPTIONAL}
        if "generator" in takes and kwargs.get("generator") is None:
            # Guidance may have doubled the batch; its halves then share their generators.
            kwargs["generator"] = list(generators) * max(1, len(model_output) // len(generators))
        return step(model_output, *args, **kwargs)

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


class StandIn(nn.Module):
    """Another network in a denoiser's place: it is called as diffusers calls, and the network in the normal form.

    What pipelines ask of a denoiser beside its output (its `config`, parts of it) is answered by the original.
    """

    def __init__(self, module: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._original: tuple[nn.Module] = (original,)  # in a tuple, so that its weights are none of this module

    @property
    def original(self) -> nn.Module:
        """The denoiser in whose place it is."""
        return self._original[0]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of what it takes."""
        original: Any = self.original
        dtype: torch.dtype = original.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return device_of(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict noise; a tuple, or an object with an attribute `sample` unless `return_dict` is false."""
        output = normal_form(self._original[0], args, kwargs).call(self.module)
        sample = pytree.tree_leaves(output)[0]
        return denoiser_output(sample) if kwargs.get("return_dict", True) else (sample,)

    def __getattr__(self, name: str) -> Any:
        if name in self._modules or "_original" not in self.__dict__:
            return super().__getattr__(name)
        return getattr(self._original[0], name)
