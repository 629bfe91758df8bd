from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.damage import same_or_refused

from synthquant.core.errors import ModelError
from synthquant.diffusion.embedding import Embedding, read_embedding, write_embedding


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "token.safetensors"
    write_embedding(path, Embedding("<a>", torch.tensor([[1.0, 2.0]]), {"seed": "3"}))
    found = read_embedding(path)
    assert (found.token, found.origin) == ("<a>", {"seed": "3"})
    assert torch.equal(found.vectors, torch.tensor([[1.0, 2.0]]))


def test_every_damage_to_a_file_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token.safetensors"
    write_embedding(path, Embedding("<a>", torch.randn(1, 32), {"seed": "3", "images": "abc"}))

    def content() -> tuple[object, ...]:
        found = read_embedding(path)
        return found.token, found.origin, found.vectors.tolist()

    assert same_or_refused(path, content, flips=200) > 190


def test_vectors_of_other_tools_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, dtype=torch.float16)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(3, 4)}, tmp_path / "three.safetensors")
    assert read_embedding(tmp_path / "one.safetensors").vectors.shape == (1, 4)
    assert read_embedding(tmp_path / "three.safetensors").vectors.shape == (3, 4)


def test_files_that_hold_no_embedding(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(ModelError, match="does not exist"):
        read_embedding(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match=r"file\.safetensors is missing or not a whole safetensors file"):
        read_embedding(path)
    save_file({"clip_l": torch.ones(4), "clip_g": torch.ones(8)}, path)
    with pytest.raises(ModelError, match="holds 2 tensors"):
        read_embedding(path)
    for wrong in (torch.ones(2, 2, 2), torch.full((4,), float("nan"))):
        save_file({"a": wrong}, path)
        with pytest.raises(ModelError, match="holds no embedding"):
            read_embedding(path)
