"""One pass: every image once, in any batches, from any store, and nothing left behind."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images
from torch import Tensor

from synthquant.core.errors import DataError, OutputError, UnsupportedModelError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.data.sources import open_images
from synthquant.models.float_model import FloatModel
from synthquant.select.batch_norm import BatchNormProbe
from synthquant.select.energy import EnergyProbe
from synthquant.select.scan import scan


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


class Count:
    """Counts the images it is shown."""

    name = "count"

    def __init__(self) -> None:
        self.passes: list[int] = []

    def watch(self, count: int) -> AbstractContextManager[object]:
        self.passes.append(count)
        return nullcontext()

    def rows(self, logits: Tensor) -> Tensor:
        return torch.full((len(logits), 1), float(len(self.passes)))


def test_every_image_is_run_once_however_many_probes_watch(model: FloatModel) -> None:
    calls: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    counter = Count()
    seen = scan(small_images(11), model, [EnergyProbe(1.0), counter, BatchNormProbe(model.module)], batch_size=4)
    handle.remove()
    assert calls == counter.passes == [4, 4, 3]
    assert seen.positions.tolist() == list(range(11))
    assert seen.tables["count"].flatten().tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_batches_do_not_change_the_rows(model: FloatModel) -> None:
    images = small_images(11)
    probes = [EnergyProbe(1.0), BatchNormProbe(model.module)]
    whole, parts = (scan(images, model, probes, batch_size=size) for size in (11, 3))
    for probe in probes:
        assert torch.allclose(whole.tables[probe.name], parts.tables[probe.name], rtol=1e-4, atol=1e-3)


def test_a_table_larger_than_memory_allows_is_in_a_file_and_is_the_same(model: FloatModel, tmp_path: Path) -> None:
    probe = BatchNormProbe(model.module)
    images = small_images(9)
    in_memory = scan(images, model, [probe]).tables[probe.name]
    in_file = scan(images, model, [probe], table_gib=0.0).tables[probe.name]
    assert torch.equal(in_memory, in_file)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells which files are mapped")
    assert "synthquant-scores-" in maps.read_text()


def test_a_table_that_has_no_place_is_said(model: FloatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OutputError, match=r"cannot make a temporary file of 72 B .* No space left"):
        scan(small_images(3), model, [EnergyProbe(1.0)], table_gib=0.0)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("synthquant")]


def test_pixel_moments_are_those_of_what_the_network_sees(model: FloatModel) -> None:
    images = small_images(6)
    moments = scan(images, model, [], batch_size=4).pixels
    pixels = model.preprocess.pixels(model_inputs(images, model.preprocess))
    assert torch.allclose(moments, torch.cat([pixels.mean((2, 3)), (pixels**2).mean((2, 3))], 1), atol=1e-6)


def test_broken_images_are_left_out(model: FloatModel, tmp_path: Path) -> None:
    from PIL import Image

    for name in "abc":
        Image.new("RGB", (20, 20), (ord(name), 9, 99)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    images = open_images(tmp_path)
    assert scan(images, model, [EnergyProbe(1.0)]).positions.tolist() == [0, 2]
    assert [entry.name for entry in images.set_aside if "b.png" in entry.name] == ["b.png"]
    for name in "ac":
        (tmp_path / f"{name}.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="none of the 3 images to select from can be read"):
        scan(open_images(tmp_path), model, [EnergyProbe(1.0)])


def test_what_is_not_finite_is_marked(model: FloatModel) -> None:
    pixels = torch.rand(5, 3, 16, 16)
    pixels[3, 0, 0, 0] = torch.nan
    seen = scan(ImageSet.from_tensors(pixels, dtype="float16"), model, [BatchNormProbe(model.module)])
    assert seen.finite.tolist() == [True, True, True, False, True]


def test_hooks_and_modes_are_put_back_when_something_fails(model: FloatModel) -> None:
    class Fails(Count):
        def rows(self, logits: Tensor) -> Tensor:
            raise UnsupportedModelError("no")

    model.module.train()
    with pytest.raises(UnsupportedModelError):
        scan(small_images(4), model, [BatchNormProbe(model.module), Fails()])
    assert all(part.training for part in model.module.modules())
    assert not any(part._forward_pre_hooks for part in model.module.modules())
