"""Q-Diffusion: sampler steps in equal shares, running ranges, and every method on denoisers with several inputs."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.denoisers import DENOISERS, STEPS, Denoiser, Stepped, denoiser
from tests.toy_networks import InMemory, toy
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.method_settings import build_method
from synthquant.core.rng import Rng
from synthquant.methods import QUANTIZERS, MemoryBudget
from synthquant.models.samples import Samples
from synthquant.models.signature import Inputs
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.observers import Samples as Rows
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import unit_fit
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.learn import Learnable, Learned, Phase, batches
from synthquant.quantize.q_diffusion import QDiffusion
from synthquant.quantize.running_ranges import RunningRange
from synthquant.quantize.sampler_steps import in_turns

SCHEME = {"preset": "W4A8", "split_shortcuts": "skip", "attention": {"softmax": {"num_bits": 8}}}
LEAST = {"iterations": 8, "activation_iterations": 4, "batch_size": 6, "calibration_images": 6}


def quantized(name: str, one: Denoiser, samples: Samples | None = None, **settings: Any) -> QuantModel:
    fields = QUANTIZERS.get(name).model_fields  # type: ignore[attr-defined]
    settings = {**LEAST, **({"observer": "minmax"} if "observer" in fields else {}), **settings}
    model = QuantModel.build(one.model, QuantScheme.parse(SCHEME))
    method = build_method(QUANTIZERS, name, {key: settings[key] for key in settings if key in fields}, name)
    method.apply(model, samples or one.samples, Rng(0))
    return model


def error(one: Denoiser, model: QuantModel) -> float:
    wanted = one.outputs(one.model.module)
    return float((one.outputs(model) - wanted).norm() / wanted.norm())


def test_all_steps_have_equal_shares_of_every_batch() -> None:
    steps = torch.tensor([7] * 5 + [3] * 9 + [1] * 6)
    drawn = batches(20, 8, "steps", torch.Generator().manual_seed(0), steps)
    several = list(islice(drawn, 90))
    for batch in several:
        shares = Counter(steps[batch].tolist())
        assert len(batch) == 8 and sorted(shares.values()) == [2, 3, 3]
    in_all = Counter(steps[torch.cat(several)].tolist())
    assert set(in_all.values()) == {240}
    rows = Counter(torch.cat(several).tolist())
    for step in (7, 3, 1):
        counts = [rows[index] for index in range(20) if steps[index] == step]
        assert max(counts) - min(counts) <= 1  # through epochs of its own
    assert not torch.equal(several[0].sort().values, several[1].sort().values)
    few = [steps[batch].tolist() for batch in islice(batches(20, 2, "steps", torch.Generator(), steps), 30)]
    assert all(len(set(batch)) == 2 for batch in few)
    assert set(Counter(step for batch in few for step in batch).values()) == {20}


def test_samples_that_name_no_steps_are_drawn_as_others() -> None:
    drawn = [
        list(islice(batches(9, 4, kind, torch.Generator().manual_seed(0)), 3)) for kind in ("steps", "permutation")
    ]  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


def test_units_learn_from_batches_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Phase, Learnable]] = []

    def learn(phase: Phase, unit: Learnable, rng: Rng, tick: object) -> Learned:
        seen.append((phase, unit))
        return Learned(None, (), ())

    monkeypatch.setattr(unit_fit, "learn_unit", learn)
    one = denoiser("transformer")
    quantized("q_diffusion", one)
    assert {phase.name for phase, _ in seen} == {"weights", "activations"}
    for phase, unit in seen:
        assert phase.sampling == "steps" and unit.steps is not None
        batch = next(batches(unit.count, phase.batch_size, phase.sampling, torch.Generator(), unit.steps))
        assert set(Counter(unit.steps[batch].tolist()).values()) == {2}


def test_first_samples_are_of_all_steps() -> None:
    one = denoiser("transformer")
    samples = CalibrationSet(QuantModel.build(one.model, "W8A8"), one.samples)
    assert in_turns(torch.tensor([5, 5, 5, 2, 2, 9])) == [3, 0, 5, 4, 1, 2]
    first = torch.cat([batch.kwargs["timestep"] for batch in samples.batches(6)])
    assert Counter(first.tolist()) == dict.fromkeys(STEPS, 2)
    everything = torch.cat([batch.kwargs["timestep"] for batch in samples.batches()])
    steps = samples.steps_of(12)
    assert steps is not None and torch.equal(torch.tensor(STEPS)[steps], everything)
    plain = CalibrationSet(QuantModel.build(one.model, "W8A8"), InMemory(one.inputs))
    assert plain.steps_of(12) is None and next(plain.batches(6)).kwargs["timestep"].tolist() == [900] * 4 + [500] * 2
    assert plain.fingerprint != samples.fingerprint


def test_steps_that_do_not_fit_are_refused() -> None:
    one = denoiser("transformer", 6)
    for steps in (torch.zeros(5, dtype=torch.int64), torch.zeros(6)):
        with pytest.raises(DataError, match="steps of samples must be 6 whole numbers, one for each sample"):
            quantized("rtn", one, Stepped(one.inputs, steps))

    class Torn(Stepped):
        def batches(self, size: int, indices: Any = None) -> Any:
            yield from super().batches(size, list(indices)[:-1])

    with pytest.raises(DataError, match="1 of 6 samples of a sampler's steps cannot be read; make the set anew"):
        quantized("q_diffusion", one, Torn(one.inputs, one.samples.steps))


def averaged(ends: Tensor) -> Tensor:
    """Average of `[N, 2]` by the authors' rule, one number at a time."""
    found = ends[0]
    for row in ends[1:]:
        found = found * 0.95 + row * 0.05
    return found


def test_running_ranges_are_averages_over_batches_of_the_whole_set() -> None:
    one = denoiser("transformer")
    model = quantized(
        "q_diffusion", one, iterations=0, activation_iterations=0, running_ranges="all", running_batch_size=6
    )
    plain = quantized("q_diffusion", one, iterations=0, activation_iterations=0)
    order = in_turns(one.samples.steps)
    images = one.inputs.kwargs["hidden_states"][order].reshape(2, -1)  # batches of 6, run by 2
    ends = torch.stack([images.amin(1), images.amax(1)], 1)
    low, high = averaged(ends).tolist()
    assert float(model.quantizers["pos_embed.proj.input_quantizer"].scale) * 255 == pytest.approx(high - low, rel=1e-5)
    first = images.reshape(12, -1)[:6]
    span = float(first.max() - first.min())
    assert float(plain.quantizers["pos_embed.proj.input_quantizer"].scale) * 255 == pytest.approx(span, rel=1e-5)
    assert all(quantizer.watcher is None for quantizer in model.quantizers.values())


def test_running_ranges_of_softmaxes_alone() -> None:
    one = denoiser("transformer")
    settings: dict[str, Any] = {"iterations": 0, "activation_iterations": 0, "running_batch_size": 4}
    every, softmaxes, none = (
        quantized("q_diffusion", one, running_ranges=which, **settings) for which in ("all", "softmax", None)
    )
    assert len(softmaxes.softmaxes) == 2
    for name, quantizer in softmaxes.quantizers.items():
        assert isinstance(quantizer, AffineQuantizer)
        same = every if name in softmaxes.softmaxes else none
        assert torch.equal(quantizer.scale, same.quantizers[name].grid()["scale"])
    for name in softmaxes.softmaxes:
        assert float(softmaxes.quantizers[name].grid()["zero_point"]) == 0
        assert not torch.equal(softmaxes.quantizers[name].grid()["scale"], none.quantizers[name].grid()["scale"])


def test_a_running_range_does_not_depend_on_how_many_run_at_once() -> None:
    values = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    found: list[Rows] = []
    for pieces in (1, 2, 4):
        watcher = RunningRange()
        assert watcher.empty
        for number, piece in enumerate(values.split(pieces), 1):
            watcher.observe_range(piece)
            if number * pieces % 4 == 0:
                watcher.end_batch()
        watcher.end_batch()  # nothing since the last one
        found.append(watcher.samples())
    rows = values.reshape(3, -1)
    wanted = averaged(torch.stack([rows.amin(1), rows.amax(1)], 1))
    for samples in found:
        assert torch.allclose(torch.cat([samples.low, samples.high]), wanted, rtol=1e-6)
    with pytest.raises(RuntimeError, match="no batch observed yet"):
        RunningRange().samples()


def test_nothing_is_dropped_out_while_a_unit_learns() -> None:
    states = [quantized("q_diffusion", denoiser("transformer", dropout=dropout)).state() for dropout in (0.0, 0.9)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_softmaxes_have_bits_of_their_own() -> None:
    one = denoiser("transformer", 6)
    scheme = QuantScheme.parse({**SCHEME, "attention": {"softmax": {"num_bits": 16}}})
    model = QuantModel.build(one.model, scheme)
    QDiffusion(iterations=0, activation_iterations=2, batch_size=3).apply(model, one.samples, Rng(0))
    bits = {name: quantizer.num_bits for name, quantizer in model.quantizers.items()}
    assert {bits[name] for name in model.softmaxes} == {16}
    assert {bits[name] for name in set(bits) - set(model.softmaxes)} == {8}


def test_resuming_and_small_caches_give_the_same_network(tmp_path: Path) -> None:
    one, states = denoiser("transformer"), []
    for memory, folder in ((MemoryBudget(), None), (MemoryBudget(host_gib=1e-4), tmp_path), (MemoryBudget(), tmp_path)):
        model = QuantModel.build(one.model, QuantScheme.parse(SCHEME))
        method = QDiffusion(**LEAST)  # type: ignore[arg-type]
        method.apply(model, one.samples, Rng(0), workdir=folder, memory=memory)
        states.append(model.state())
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())
    moved = Stepped(one.inputs, 2 - one.samples.steps)
    with pytest.raises(DataError, match="holds units of another run"):
        QDiffusion(**LEAST).apply(  # type: ignore[arg-type]
            QuantModel.build(one.model, QuantScheme.parse(SCHEME)), moved, Rng(0), workdir=tmp_path
        )


def test_networks_without_steps_and_without_attention() -> None:
    one = toy("unet")
    model = QuantModel.build(one.model, "W4A8")
    report = QDiffusion(iterations=20, activation_iterations=5, batch_size=8).apply(model, one.samples, Rng(0))
    assert report.method == "q_diffusion" and len(report.units) == 2 * len(model.units())
    inputs: Inputs = one.samples.inputs
    wanted = inputs.call(one.model.module)
    assert float((inputs.call(model) - wanted).norm() / wanted.norm()) < 0.3


# Each method on a UNet and on a transformer, and each kind of network with a learned one.
METHODS = {
    "unet": ("qdrop", "q_diffusion"),
    "conditional": ("brecq", "genie_m"),
    "transformer": ("brecq", "qdrop", "genie_m", "q_diffusion"),
}


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_method_takes_denoisers_with_several_inputs(kind: str) -> None:
    """Whole-number time steps, class labels and a context reach every unit; learning beats nearest rounding."""
    one = denoiser(kind)
    before = one.model.fingerprint
    nearest = error(one, quantized("rtn", one))
    for name in METHODS[kind]:
        model = quantized(name, one)
        assert model.calibrated and error(one, model) < nearest, name
        assert not model.training and all(layer.weight_source is None for layer in model.layers.values())
    assert one.model.fingerprint == before and not one.model.module.training
