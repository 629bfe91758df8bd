"""Static ranges of differences between the steps of a sampler."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.toy_denoiser import TIMES, Rows, denoiser, inputs, trajectory
from torch import Tensor

from synthquant.core.errors import DataError, InputError, ModelError, SchemeError
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export import Onnx, TorchProgram
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.nn.modulation import ModulatedLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.difference_ranges import calibrate_differences, modulation_report
from synthquant.quantize.rtn import Rtn

STATIC: dict[str, Any] = {"preset": "W4A4", "modulation": {"ranges": "static"}}


def rounded(scheme: Any = STATIC) -> QuantModel:
    model = QuantModel.build(denoiser(), QuantScheme.parse(scheme))
    Rtn(observer="minmax").apply(model, Rows(trajectory()), Rng(0))
    return model


@pytest.fixture
def model() -> QuantModel:
    model = rounded()
    assert calibrate_differences(model, Rows(trajectory()), observer="minmax") == 3
    return model


@torch.no_grad()
def sampled(model: QuantModel, samples: list[Tensor], times: tuple[float, ...] = TIMES) -> list[Tensor]:
    with model.sampling():
        return [inputs(one, time).call(model)[0] for one, time in zip(samples, times, strict=True)]


def test_ranges_are_of_differences_between_steps(model: QuantModel) -> None:
    # What `conv_in` reads is the sample itself, so its differences are known.
    samples = trajectory()
    differences = torch.stack([after - before for before, after in pairwise(samples)])
    layer = model.layers["conv_in"]
    assert isinstance(layer, ModulatedLayer)
    low, high = float(differences.min()), float(differences.max())
    torch.testing.assert_close(layer.reading.scale, torch.tensor([(high - low) / 255]))
    assert float(layer.reading.zero_point) == round(-low / float(layer.reading.scale))
    # That of every other layer, too, by a loop over the network with quantized weights.
    for name in ("grouped", "to_k", "up"):
        layer, seen = model.layers[name], []
        assert isinstance(layer, ModulatedLayer)
        hook = layer.register_forward_hook(lambda _, args, output, into=seen: into.append(args[0]))
        with model.mode(weights=True, activations=False), torch.no_grad():
            for one, time in zip(samples, TIMES, strict=True):
                inputs(one, time).call(model)
        hook.remove()
        found = torch.stack([after - before for before, after in pairwise(seen)])
        torch.testing.assert_close(layer.reading.scale, (found.max() - found.min())[None] / 15, rtol=1e-3, atol=1e-5)


def test_a_sampled_network_reads_differences_on_that_grid(model: QuantModel) -> None:
    samples, layer = trajectory(), model.layers["grouped"]
    assert isinstance(layer, ModulatedLayer)
    kept: list[Tensor] = []
    with model.sampling(), torch.no_grad():
        for one, time in zip(samples, TIMES, strict=True):
            inputs(one, time).call(model)
            assert layer.reading.kept is not None
            kept.append(layer.reading.kept.clone())
    codes = (kept[2] - kept[1]) / layer.reading.scale
    assert float((codes - codes.round()).abs().max()) < 1e-2 and len(codes.round().unique()) <= 16
    assert float(codes.abs().max()) > 1


def test_rows_may_lie_in_any_order_and_have_two_rows_of_an_image(model: QuantModel) -> None:
    rows, samples = Rows(trajectory()), trajectory()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    shuffled = Rows(samples)
    for name in ("sample", "time", "steps", "images"):
        setattr(shuffled, name, getattr(rows, name)[order])
    guided = Rows(samples)
    guided.images = torch.zeros(len(rows), dtype=torch.int64)  # three rows of one image at each step
    for other in (shuffled, guided):
        again = rounded()
        calibrate_differences(again, other, observer="minmax")
        assert again.modulation is not None and model.modulation is not None
        assert again.modulation.run.timesteps.tolist() == list(TIMES)
        for name, tensor in model.modulation.state().items():
            torch.testing.assert_close(again.modulation.state()[name], tensor)


def test_only_so_many_images_are_looked_at() -> None:
    model = rounded()
    assert calibrate_differences(model, Rows(trajectory()), images=1, observer="minmax") == 1
    first = trajectory()
    layer = model.layers["conv_in"]
    assert isinstance(layer, ModulatedLayer)
    differences = torch.stack([after[:1] - before[:1] for before, after in pairwise(first)])
    torch.testing.assert_close(layer.reading.scale, (differences.max() - differences.min())[None] / 255)


def test_images_that_lack_a_step_are_left_out(model: QuantModel) -> None:
    rows, again = Rows(trajectory(4)), rounded()
    keep = torch.arange(len(rows)) != len(rows) - 1  # the fourth image's last step
    for name in ("sample", "time", "steps", "images"):
        setattr(rows, name, getattr(rows, name)[keep])
    assert calibrate_differences(again, rows) == 3


def test_a_search_cuts_off_what_the_next_step_makes_up_for(model: QuantModel) -> None:
    searched = rounded()
    calibrate_differences(searched, Rows(trajectory()))
    assert model.modulation is not None and searched.modulation is not None
    ways = zip(searched.modulation.readings.values(), model.modulation.readings.values(), strict=True)
    shares = [float(one.scale / whole.scale) for one, whole in ways]
    assert max(shares) <= 1.001 and min(shares) < 0.9
    # A scheme may say so.
    asked = rounded({**STATIC, "input_activations": {"observer": "minmax"}})
    calibrate_differences(asked, Rows(trajectory()))
    assert asked.modulation is not None
    for one, whole in zip(asked.modulation.readings.values(), model.modulation.readings.values(), strict=True):
        torch.testing.assert_close(one.scale, whole.scale)


def test_the_report_says_what_is_kept() -> None:
    class Told(Progress):
        def say(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    model = rounded()
    report = modulation_report(model, Rows(trajectory()), Told())
    assert told == [str(model.modulation)] and "KiB are kept between steps for each row of a batch" in told[0]
    assert report is not None and model.modulation is not None
    assert (report.layers, report.images, report.bytes_per_row) == (9, 3, model.modulation.bytes_per_sample)
    dynamic = modulation_report(rounded({"preset": "W4A4", "modulation": {}}), None)
    assert dynamic is not None and dynamic.images is None
    assert modulation_report(rounded("W4A4"), None) is None


def test_another_sampler_is_refused(model: QuantModel) -> None:
    samples = trajectory(steps=6)
    assert len(sampled(model, samples[:3], TIMES[:3])) == 3
    known = r"of a sampler with 5 steps \(900, 700, 500, 300, \.\.\.\), and step "
    with pytest.raises(InputError, match=known + "2 of this one is at 600; sample with those steps, or quantize with"):
        sampled(model, samples[:2], (900, 600))
    with pytest.raises(InputError, match=known + "6 of this one is at 50"):
        sampled(model, samples, (*TIMES, 50))


def test_a_set_that_is_no_whole_trajectory_is_refused() -> None:
    model = rounded()
    with pytest.raises(ModelError, match="static ranges of differences are not set yet"):
        sampled(model, trajectory())
    scattered, short = Rows(trajectory()), Rows(trajectory())
    scattered.images = torch.arange(len(scattered))
    short.timesteps = (*TIMES, 50)
    unfinished = Rows(trajectory())
    unfinished.sample[2] = float("nan")
    for source, message in (
        (None, "toy: static ranges of differences are set from a trajectory"),
        (ImageSet.from_tensors(torch.zeros(2, 3, 8, 8)), "toy: static ranges of differences are set from a trajectory"),
        (Rows(trajectory(), consecutive=False), "toy: static ranges of differences need all 5 steps of the sampler"),
        (short, "toy: static ranges of differences need all 6 steps .* the trajectory has 5 of them; record all"),
        (scattered, "toy: the trajectory has no image with rows at all of its 5 steps"),
        (unfinished, "a row of the trajectory cannot be read or is not finite"),
    ):
        with pytest.raises(DataError, match=message):
            calibrate_differences(model, source)
        assert model.modulation is not None and not model.modulation.calibrated and not model.modulation.run.active
        assert all(reading.watcher is None for reading in model.modulation.readings.values())


@pytest.mark.parametrize("ranges", ["static", "dynamic"])
def test_a_checkpoint_samples_the_same(ranges: str, tmp_path: Path) -> None:
    model = rounded({"preset": "W4A4", "modulation": {"ranges": ranges}})
    if ranges == "static":
        with pytest.raises(ModelError, match="static ranges of differences are not set yet"):
            save_checkpoint(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        calibrate_differences(model, Rows(trajectory()))
    wanted = sampled(model, trajectory())
    folder = save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(folder, float_model=model.float_model)
    assert loaded.modulation is not None and loaded.scheme == model.scheme
    assert all(torch.equal(a, b) for a, b in zip(sampled(loaded, trajectory()), wanted, strict=True))
    assert loaded.modulation.run.timesteps.tolist() == (list(TIMES) if ranges == "static" else [])
    again = save_checkpoint(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    if ranges == "static":
        with pytest.raises(InputError, match="is at 600"):
            sampled(loaded, trajectory()[:2], (900, 600))


def test_export_is_refused_in_one_line(model: QuantModel, tmp_path: Path) -> None:
    for exporter, path in ((Onnx(preset="simulate"), tmp_path / "net.onnx"), (TorchProgram(), tmp_path / "net.pt2")):
        for refuse in (exporter.check, lambda network, to=exporter, path=path: to.export(network, path)):
            with pytest.raises(
                SchemeError, match="toy: modulation keeps tensors between the steps of a sampler, and no"
            ):
                refuse(model)
        assert not path.exists()


def test_groups_of_layers_are_set_alike(model: QuantModel) -> None:
    state = model.modulation.state() if model.modulation is not None else {}
    assert "to_q.reading.scale" in state and "to_v.reading.scale" not in state
    names = [name for name in model.state() if "reading" in name]
    assert sorted(names) == sorted(name for name in state if "reading" in name)
