"""Weights from a file into a network: safe formats only, strict, with a message that says what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from synthquant.core.errors import ModelError

_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict")
_LISTED = 5


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, or in a file that `torch.load` reads with `weights_only=True`.

    A state dict may lie under one of the usual keys (`state_dict`, `model`, ...) and carry the `module.` prefix that
    data parallel training leaves. Floating-point tensors come back as float32.
    Raises `ModelError` if the file is missing, damaged, needs unpickling of code, or holds no tensors.
    """
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist; give the path of a .safetensors or .pth file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"weights file {path} does not hold a state dict (names to tensors); save model.state_dict()")
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {
        str(name).removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in content.items()
    }


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the file into `module`, which must have exactly its keys and shapes.

    `num_batches_tracked`, which inference does not use, may be missing. Raises `ModelError` that names up to five
    missing, unexpected and misshapen keys each.
    """
    weights = read_weights(path)
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in wanted]
    misshapen = [
        f"{name} is {list(weights[name].shape)} in the file and {list(value.shape)} in the model"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
    found = [f"{kind}: {_some(names)}" for kind, names in problems if names]
    if found:
        raise ModelError(f"weights file {path} does not fit the model; {'; '.join(found)}")
    # The model's own dictionary carries format versions, which some networks check while loading.
    wanted.update(weights)
    module.load_state_dict(wanted)


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
    """The first sentence or so of an exception's text, without line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
