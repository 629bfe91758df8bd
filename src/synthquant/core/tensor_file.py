"""Safetensors files that carry the hash of their own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from synthquant.core.errors import InputError
from synthquant.core.files import SEAL, changed, write_bytes

_FORMAT = "synthquant"
_FORMAT_VERSION = "2"


@dataclass(frozen=True)
class TensorFile:
    """Content of a safetensors file."""

    tensors: Mapping[str, Tensor]
    """Tensors by name."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """What else it says, without format and hash."""
    sealed: bool = False
    """Whether this package wrote it, and its hash was found to fit."""


def write_sealed_tensors(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors and texts, atomically, with a hash of both in the metadata; raises `OutputError`.

    The same content gives the same bytes.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**texts, _FORMAT: _FORMAT_VERSION, SEAL: _seal(own, texts)}
    write_bytes(path, _with_header_in_order(save(own, metadata=metadata)))


def read_sealed_tensors(path: Path) -> TensorFile:
    """Return what `write_sealed_tensors` wrote; raises `InputError` for anything else, whatever became of it."""
    found = read_tensors(path)
    if not found.sealed:
        raise changed(path)
    return found


def read_tensors(path: Path) -> TensorFile:
    """Return the content of a safetensors file of this package, whose hash must fit, or of somebody else.

    A file of this package is known by two entries of its metadata: losing one does not make it somebody else's.

    Raises `InputError` if it is missing, not a safetensors file, or not as this package wrote it.
    """
    try:
        with safe_open(path, "pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is missing or not a whole safetensors file: {error}") from error
    version, seal = texts.pop(_FORMAT, None), texts.pop(SEAL, None)
    if version is None and seal is None:
        return TensorFile(tensors, texts)
    if version != _FORMAT_VERSION or seal != _seal(tensors, texts):
        raise changed(path)
    return TensorFile(tensors, texts, sealed=True)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, types, shapes and values, whatever the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _with_header_in_order(file: bytes) -> bytes:
    """A safetensors file with the entries of its metadata sorted: the library's order differs from write to write."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def _seal(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    text = json.dumps([digest_of(tensors), dict(texts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
