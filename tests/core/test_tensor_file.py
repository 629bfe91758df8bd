from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.damage import same_or_refused

from synthquant.core.errors import InputError
from synthquant.core.tensor_file import digest_of, read_sealed_tensors, read_tensors, write_sealed_tensors

TENSORS = {
    "codes": torch.arange(-20, 20, dtype=torch.int8).view(4, 10),
    "half": torch.linspace(-1, 1, 6, dtype=torch.bfloat16),
    "scale": torch.tensor(0.1),
    "none": torch.empty(0, 3),
}
TEXTS = {"report": '{"name": "ü"}', "made_from": "x"}


def _content(path: Path) -> tuple[object, ...]:
    found = read_tensors(path)
    return found.sealed, dict(found.texts), digest_of(found.tensors)


def test_tensors_and_texts_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_sealed_tensors(path, TENSORS, TEXTS)
    found = read_sealed_tensors(path)
    assert found.sealed and found.texts == TEXTS and sorted(found.tensors) == sorted(TENSORS)
    assert all(torch.equal(found.tensors[name], value) for name, value in TENSORS.items())


def test_every_bit_of_a_sealed_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_sealed_tensors(path, TENSORS, TEXTS)
    size = path.stat().st_size
    assert same_or_refused(path, lambda: _content(path), flips=size) > 0.95 * size


def test_files_of_others_have_no_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    found = read_tensors(path)
    assert not found.sealed and found.texts == {"format": "pt"}
    with pytest.raises(InputError, match=r"a\.safetensors was changed or damaged"):
        read_sealed_tensors(path)
    with pytest.raises(InputError, match=r"b\.safetensors is missing or not a whole safetensors file"):
        read_tensors(tmp_path / "b.safetensors")


def test_the_digest_tells_names_types_shapes_and_values_apart() -> None:
    plain = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"b": torch.zeros(2, 3), "a": torch.ones(2)},
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": -torch.ones(2)},
        {"a": torch.zeros(2, 3)},
    ]
    assert digest_of(plain) == digest_of(dict(reversed(plain.items())))
    assert len({digest_of(plain), *map(digest_of, others)}) == 1 + len(others)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3), "a": torch.rand(2, 2, generator=torch.Generator().manual_seed(0))}
    texts = {name: f"text {name} \u00e9" for name in "qwertz"}
    for number in range(20):
        write_sealed_tensors(tmp_path / f"{number}", tensors, texts)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(20)}) == 1
    found = read_sealed_tensors(tmp_path / "0")
    assert found.texts == texts and torch.equal(found.tensors["a"], tensors["a"])
