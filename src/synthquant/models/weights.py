"""Weights from a file into a network: safe formats only, strict, with a message that says what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from synthquant.core.errors import ModelError, plain_line

# Keys under which files keep a state dict, in the order in which they are looked for; one may lie in another.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights"),
    *("ema", "params_ema", "state_dict_ema", "model_ema"),
)
# What data parallel training, averaging, torch.compile and wrappers such as Lightning's put before names.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
# Counters of `thop` and of weight averaging, which are no weights; and one of batch norm that inference does not use.
_COUNTERS = ("total_ops", "total_params", "n_averaged")
_OPTIONAL = "num_batches_tracked"
_LISTED = 5


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, or in a file that `torch.load` reads with `weights_only=True`.

    A state dict may lie under one of the usual keys (`state_dict`, `model`, `ema`, ...), also one in another.
    Floating-point tensors come back as float32.
    Raises `ModelError` if the file is missing, damaged, needs unpickling of code, or holds no tensors.
    """
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist; give the path of a .safetensors or .pth file")
    content = _unwrapped(_read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path))
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"weights file {path} does not hold a state dict (names to tensors); save model.state_dict()")
    return {str(name): value.float() if value.is_floating_point() else value for name, value in content.items()}


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the file into `module`, which must have exactly its keys and shapes.

    Prefixes that wrappers leave (`module.`, `_orig_mod.`, `model.`, ...) are taken off where the names fit then and
    not before. `num_batches_tracked`, which inference does not use, may be missing; counters that are no weights are
    left out. Raises `ModelError` that names up to five missing, unexpected and misshapen keys each, or tensors of
    whole numbers where weights should be.
    """
    wanted = module.state_dict()
    weights = _fitting(read_weights(path), wanted)
    missing, unexpected = _differing(weights, wanted)
    misshapen = [
        f"{name} is {list(weights[name].shape)} in the file and {list(value.shape)} in the model"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
    found = [f"{kind}: {_some(names)}" for kind, names in problems if names]
    if found:
        raise ModelError(f"weights file {path} does not fit the model; {'; '.join(found)}")
    whole = [name for name in weights if wanted[name].is_floating_point() and not weights[name].is_floating_point()]
    if whole:
        raise ModelError(
            f"weights file {path} holds whole numbers ({weights[whole[0]].dtype}) for {_some(whole)}; they are codes or"
            " were cast, so save the float weights"
        )
    # The model's own dictionary carries format versions, which some networks check while loading.
    wanted.update(weights)
    module.load_state_dict(wanted)


def _unwrapped(content: object) -> object:
    """The innermost mapping that the usual keys lead to."""
    while isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    return content


def _fitting(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with as many prefixes taken off as make their names fit best, without counters."""
    kept = {name: value for name, value in weights.items() if name in wanted or not _is_counter(name)}
    candidates = [kept]
    # A part that was compiled by itself carries the mark in the middle of its names.
    marked = {name.replace("_orig_mod.", ""): value for name, value in kept.items()}
    for start in (kept, marked):
        names = start
        while prefix := next((each for each in _PREFIXES if names and all(n.startswith(each) for n in names)), None):
            names = {name.removeprefix(prefix): value for name, value in names.items()}
            candidates.append(names)
        candidates.append(start)
    return min(candidates, key=lambda candidate: sum(map(len, _differing(candidate, wanted))))


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _differing(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names that are missing in the file, and names that the model does not have."""
    missing = [name for name in wanted if name not in weights and not name.endswith(_OPTIONAL)]
    return missing, [name for name in weights if name not in wanted]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"weights file {path} is damaged or no safetensors file ({one_line(error)})") from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, TypeError, ValueError) as error:
        raise ModelError(
            f"weights file {path} is damaged or holds more than tensors ({one_line(error)});"
            " save model.state_dict() as .safetensors"
        ) from error


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first sentence or so of an exception's text, without line breaks and escape codes."""
    text = plain_line(str(error)) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
