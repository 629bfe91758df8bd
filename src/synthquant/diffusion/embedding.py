"""Textual-inversion embeddings (arXiv:2208.01618) as safetensors files, in the form that diffusers loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from synthquant.core.errors import InputError, ModelError
from synthquant.core.tensor_file import read_tensors, write_sealed_tensors


@dataclass(frozen=True)
class Embedding:
    """One token and what a text encoder reads in its place."""

    token: str
    """Stands for the embedding in prompts."""
    vectors: Tensor
    """float32 `[n, width]`; `n` is 1 for an ordinary embedding."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """How it was made, as texts."""


def read_embedding(path: Path) -> Embedding:
    """Read an embedding of one token, by `write_embedding`, whose hash must fit, or by others.

    Raises `ModelError` if the file is missing, damaged or holds something else.
    """
    if not path.is_file():
        raise ModelError(f"embedding {path} does not exist; give the file that tune-prompt wrote")
    try:
        found = read_tensors(path)
    except InputError as error:
        raise ModelError(f"embedding: {error}") from error
    tensors = found.tensors
    if len(tensors) != 1:
        raise ModelError(f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:3])}), not one embedding")
    ((token, vectors),) = tensors.items()
    vectors = vectors.float().reshape(-1, vectors.shape[-1]) if vectors.ndim in (1, 2) else vectors
    if vectors.ndim != 2 or not vectors.numel() or not bool(torch.isfinite(vectors).all()):
        raise ModelError(f"{path} holds no embedding: {token!r} has shape {list(vectors.shape)} or is not finite")
    return Embedding(token, vectors, found.texts)


def write_embedding(path: Path, embedding: Embedding) -> None:
    """Write an embedding, with its hash, so that it is there whole or not at all; raises `OutputError`."""
    write_sealed_tensors(path, {embedding.token: embedding.vectors.float()}, embedding.origin)
