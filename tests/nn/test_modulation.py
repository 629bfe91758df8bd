"""MoDiff: layers that read differences between the steps of a sampler (arXiv:2506.22463)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.nn.toy_denoiser import TIMES, Denoiser, Rows, denoiser, inputs, trajectory
from torch import Tensor, nn

from synthquant.core.errors import InputError, SchemeError, UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.nn.modulation import ModulatedLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import Brecq, QDrop
from synthquant.quantize.rtn import Rtn

MODULATED: dict[str, Any] = {"preset": "W4A4", "modulation": {}}


def quantized(scheme: Any = MODULATED, network: nn.Module | None = None) -> QuantModel:
    model = QuantModel.build(denoiser(network), QuantScheme.parse(scheme))
    Rtn(observer="minmax").apply(model, Rows(trajectory()), Rng(0))
    return model


@pytest.fixture(scope="module")
def calibrated() -> QuantModel:
    return quantized()


@pytest.fixture
def model(calibrated: QuantModel) -> QuantModel:
    return copy.deepcopy(calibrated)


@torch.no_grad()
def run(network: Any, samples: list[Tensor], times: Any = TIMES) -> list[Tensor]:
    return [inputs(one, time).call(network)[0].clone() for one, time in zip(samples, times, strict=True)]


def sampled(model: QuantModel, samples: list[Tensor], times: Any = TIMES) -> list[Tensor]:
    with model.sampling():
        return run(model, samples, times)


def far(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def test_without_quantization_every_step_is_the_float_network_s(model: QuantModel) -> None:
    samples = trajectory()
    with model.mode(weights=False, activations=False):
        assert far(sampled(model, samples), run(model.float_model.module, samples)) < 1e-4
    assert set(model.modulation.layers) == set(model.layers)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["grouped", "down", "up", "to_q", "to_k", "time", "conv_out"])
def test_a_layer_follows_the_equations(model: QuantModel, name: str) -> None:
    layer = model.layers[name]
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0].clone(), output.clone())))
    sampled(model, trajectory())
    assert isinstance(layer, ModulatedLayer) and len(seen) == len(TIMES)
    bits = 8 if name in ("time", "conv_out") else 4
    assert layer.input_quantizer is not None and layer.input_quantizer.num_bits == 8
    weight, bias, float_layer = layer.weight, layer.bias, denoiser().module.get_submodule(name)
    r, o = torch.zeros(()), torch.zeros(())
    with torch.no_grad():
        float_layer.weight.copy_(weight)
        for step, (a, output) in enumerate(seen):
            float_layer.bias = nn.Parameter(bias) if step == 0 and bias is not None else None
            if step == 0:
                q = layer.input_quantizer(a)
            else:
                difference = a - r
                low = difference.flatten(1).amin(1).clamp(max=0).reshape(-1, *[1] * (a.ndim - 1))
                high = difference.flatten(1).amax(1).clamp(min=0).reshape(low.shape)
                scale = (high - low) / (2**bits - 1)
                zero = (-low / scale).round()
                q = ((difference / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
            r, o = q + r, float_layer(q) + o
            torch.testing.assert_close(output, o, rtol=1e-4, atol=1e-5)


def test_an_error_of_one_step_is_made_up_for_by_the_next() -> None:
    # What was really read is subtracted, so a tensor that stays the same is read more and more exactly.
    model, samples = quantized({**MODULATED, "attention": None}), trajectory()[:1] * 6
    with model.mode(weights=False, activations=True):
        found = sampled(model, samples, (900,) * 6)
        (wanted,) = run(model.float_model.module, samples[:1], (900,))
        static = run(model, samples[:1], (900,))
    errors = [float((one - wanted).abs().max()) for one in found]
    assert errors[0] == float((static[0] - wanted).abs().max())
    assert errors[-1] < errors[0] / 100


def test_the_first_step_and_all_that_is_no_sampling_have_eight_bits(model: QuantModel) -> None:
    samples, plain = trajectory(), quantized({"preset": "W4A8", "shortcuts": False})
    assert far(sampled(model, samples)[:1], run(plain, samples)[:1]) == 0
    assert far(run(model, samples), run(plain, samples)) == 0
    assert far(sampled(model, samples)[1:], run(plain, samples)[1:]) > 0.01
    assert far(run(model, samples), run(plain, samples)) == 0, "nothing is kept"


def test_the_first_step_may_be_float() -> None:
    model = quantized({"preset": "W4A4", "modulation": {"first_bits": None}})
    samples, weights = trajectory(), quantized({"preset": "W4A4", "input_activations": None, "attention": None})
    found = sampled(model, samples)
    assert not model.reads and "first step float" in model.scheme.describe()
    with model.mode(weights=True, activations=False):
        assert far(run(model, samples), run(weights, samples)) < 1e-5
    assert far(found[:1], run(model, samples)[:1]) == 0


def test_differences_are_read_better_than_tensors() -> None:
    samples = trajectory()
    wanted = run(denoiser().module, samples)
    errors = []
    for scheme in (MODULATED, {"preset": "W4A4", "input_activations": {"kind": "dynamic"}, "shortcuts": False}):
        model = quantized(scheme)
        with model.mode(weights=False, activations=True):
            errors.append(torch.cat([a - b for a, b in zip(sampled(model, samples), wanted, strict=True)][1:]).norm())
    assert errors[0] < errors[1] / 2


def test_layers_that_read_one_tensor_keep_it_once(model: QuantModel) -> None:
    modulation = model.modulation
    assert modulation is not None
    assert modulation.layers["to_q"].reading is modulation.layers["to_v"].reading
    assert set(modulation.layers) - set(modulation.readings) == {"to_k", "to_v"}
    with modulation.sampling():
        run(model, trajectory(), TIMES)
        read = [reading.kept for reading in modulation.readings.values()]
        made = [layer.put_out for layer in modulation.layers.values()]
        found = sum(tensor.nbytes for tensor in [*read, *made] if tensor is not None)
        assert modulation.bytes_per_sample == found / 3
        # Nothing else stays: each tensor is let go of when its last reader has read it.
        assert all(
            reading._given is None and not reading._difference.numel() for reading in modulation.readings.values()
        )
    assert all(reading.kept is None for reading in modulation.readings.values())
    assert all(layer.put_out is None for layer in modulation.layers.values())
    assert f"{found / 3 / 2**10:.1f} KiB are kept between steps" in str(modulation)


def test_a_sample_does_not_depend_on_the_others_of_its_batch(model: QuantModel) -> None:
    # With classifier-free guidance the two rows of an image keep their places.
    samples = trajectory(2)
    far_off = [torch.cat([one, 9 * one.flip(0)]) for one in samples]
    assert far([one[:2] for one in sampled(model, far_off)], sampled(model, samples)) < 1e-5


def test_a_layer_that_is_left_out_at_a_step_reads_all_it_has_missed(model: QuantModel) -> None:
    samples = trajectory()
    value, wanted = model.layers["to_v"], sampled(model, samples)
    with model.sampling():
        found = run(model, samples[:1], TIMES[:1])
        forward = type(value).forward
        value.forward = lambda x: forward(value, x) if left_in else torch.zeros_like(x)  # type: ignore[method-assign]
        left_in = False
        run(model, samples[1:2], TIMES[1:2])
        left_in = True
        assert isinstance(value, ModulatedLayer) and value.put_out_at == 1
        found += run(model, samples[2:], TIMES[2:])
        # `r` is another one, since attention was, but the layer has put out what it makes of it.
        assert value.put_out is not None and value.reading.kept is not None
        whole = torch.nn.functional.linear(value.reading.kept, value.weight, value.bias)
        torch.testing.assert_close(value.put_out, whole, rtol=1e-4, atol=1e-5)
    assert far(found[:1], wanted[:1]) == 0


@pytest.mark.parametrize("kind", ["half", "autocast"])
def test_half_precision_adds_up_what_was_multiplied(model: QuantModel, kind: str) -> None:
    # Under autocast what `conv_in` reads is float32 still; the layer takes digits off itself.
    samples, layer, half = trajectory(), model.layers["conv_in"], torch.bfloat16
    assert isinstance(layer, ModulatedLayer)
    wanted = torch.cat(sampled(model, samples))
    reading, read = layer.reading, []
    take = reading.take

    def watched(x: Tensor, first: Any) -> Tensor:
        read.append(take(x, first))
        return read[-1]

    reading.take = watched  # type: ignore[method-assign]
    if kind == "half":
        model.to(half)
        samples = [one.to(half) for one in samples]
    with model.sampling(), torch.autocast("cpu", half, enabled=kind == "autocast"):
        found = run(model, samples)
        assert reading.kept is not None and reading.kept.dtype == torch.float32
        assert torch.equal(reading.kept, torch.stack([one.float() for one in read]).sum(0))
    assert all(torch.equal(one.to(half).to(one.dtype), one) for one in read), "no more digits than are multiplied"
    assert all(one.dtype == half for one in found)
    assert float((torch.cat(found).float() - wanted).norm() / wanted.norm()) < 0.2


def test_samplers_run_without_recording_versions_too(model: QuantModel) -> None:
    samples, wanted = trajectory(), sampled(model, trajectory())
    with torch.inference_mode():
        assert far(sampled(model, samples), wanted) == 0


@pytest.mark.parametrize("method", [Brecq, QDrop])
def test_methods_learn_the_network_of_the_first_step(method: Any) -> None:
    settings = {"iterations": 2, "batch_size": 4, "activation_iterations": 2}
    known = {name: value for name, value in settings.items() if name in method.model_fields}
    models = [
        QuantModel.build(denoiser(), QuantScheme.parse(s)) for s in (MODULATED, {"preset": "W4A8", "shortcuts": False})
    ]
    for model in models:
        method(**known).apply(model, Rows(trajectory()), Rng(0))
    state = models[0].state()
    assert state.keys() == models[1].state().keys()
    assert all(torch.equal(value, models[1].state()[name]) for name, value in state.items())


def test_what_follows_may_overwrite_what_a_layer_put_out(model: QuantModel) -> None:
    # `conv_in` is followed by a ReLU in place: the sum that is kept has its negative values still.
    with model.sampling():
        run(model, trajectory())
        kept = model.layers["conv_in"].put_out
        assert isinstance(kept, Tensor) and bool((kept < 0).any())


def test_steps_that_cannot_be_the_next_are_refused_in_one_line(model: QuantModel) -> None:
    first, second, other = trajectory()[0], trajectory()[1], trajectory(2)[1]
    with pytest.raises(
        InputError, match=r"toy: step 2 of the sampler has a batch \[2, 3, 8, 8\] and .* \[3, 3, 8, 8\]"
    ):
        sampled(model, [first, other], TIMES[:2])
    with pytest.raises(InputError, match=r"toy: the timestep went from 700 back to 900: a new trajectory, or two"):
        sampled(model, [first, second, first], (900, 700, 900))
    with pytest.raises(InputError, match="toy: another sampler runs already"), model.sampling(), model.sampling():
        pass
    # A sampler that goes the other way, and one that calls twice in a step, are fine.
    assert len(sampled(model, [first, second, first], (100, 100, 900))) == 3
    assert len(sampled(model, [first, second, first], (900, 900, 100))) == 3
    assert model.modulation is not None and not model.modulation.run.active


def test_a_timestep_may_be_a_number_for_all(model: QuantModel) -> None:
    def call(time: Any) -> Tensor:
        found: Tensor = model(trajectory()[0], time)[0]
        return found

    with torch.no_grad(), model.sampling():
        call(torch.tensor(900))
        call(torch.tensor([700]))
        with pytest.raises(InputError, match="from 700 back to 900"):
            call(torch.tensor(900.0))


def test_a_layer_that_runs_again_in_a_step_is_refused(model: QuantModel) -> None:
    conv, attend = model.layers["conv_in"], model.layers["to_q"]
    for layer, x in ((conv, torch.zeros(3, 3, 8, 8)), (attend, torch.zeros(3, 16, 8))):
        with torch.no_grad(), model.sampling():
            layer(x)
            with pytest.raises(UnsupportedModelError, match="a layer that ran once, read two of them in one step now"):
                layer(x.clone())


class Twice(Denoiser):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return super().forward(super().forward(sample, timestep)[0], timestep)


class Squashed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class Untimed(Denoiser):
    def forward(self, sample: Tensor, noise: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return super().forward(sample, noise)


def test_networks_that_cannot_be_modulated_are_refused_in_one_line() -> None:
    with pytest.raises(
        SchemeError, match=r'time runs 2 times in a pass.*overrides={"time": {"input_activations": null'
    ):
        quantized(network=Twice())
    network = Denoiser()
    network.to_q = Squashed(8, 8)
    with pytest.raises(SchemeError, match="to_q is not linear in what it reads"):
        quantized(network=network)
    assert quantized({**MODULATED, "overrides": {"to_q": {"input_activations": None}}}, network).modulation is not None
    network.to_q = Doubled(8, 8)
    quantized(network=network)
    with pytest.raises(SchemeError, match="time: modulation quantizes differences evenly"):
        quantized({**MODULATED, "input_activations": {"kind": "twin_uniform"}})
    model = denoiser(Untimed())
    example = {"sample": torch.zeros(3, 3, 8, 8), "noise": torch.zeros(3)}
    object.__setattr__(model, "takes", type(model.example())((), example))
    with pytest.raises(UnsupportedModelError, match=r"toy: modulation works between the steps.*takes no timestep"):
        QuantModel.build(model, QuantScheme.parse(MODULATED))


def test_bits_of_single_layers() -> None:
    overrides = {"grouped": {"input_activations": {"num_bits": 3}}, "to_k": {"input_activations": {"num_bits": 6}}}
    model = quantized({**MODULATED, "overrides": {**overrides, "up": {"input_activations": None}}})
    assert model.modulation is not None
    bits = {name: layer.reading.args.num_bits for name, layer in model.modulation.layers.items()}
    # The ends are at 8 bits as in every scheme: the first layer that runs, the one behind it, and the last.
    assert bits == {"time": 8, "conv_in": 8, "grouped": 3, "down": 4, "to_q": 4, "to_k": 6, "to_v": 4, "conv_out": 8}
    assert model.modulation.layers["to_q"].reading is model.modulation.layers["to_v"].reading
    assert model.modulation.layers["to_q"].reading is not model.modulation.layers["to_k"].reading
    assert {row.name: row.input_bits for row in model.coverage() if row.name in model.layers} == {**bits, "up": None}
    products = [one.num_bits for name, one in model.quantizers.items() if "dot_product" in name or "matmul" in name]
    assert products == [8, 8, 8, 8]


def test_what_a_scheme_says_of_modulation() -> None:
    scheme = QuantScheme.parse(MODULATED)
    assert "differences between sampler steps, dynamic ranges, first step 8 bit" in scheme.describe()
    assert scheme.name == "W4A4" and QuantScheme.parse(scheme.model_dump()) == scheme
    assert "modulation" not in QuantScheme.parse("W4A4").model_dump()
    softmax = QuantScheme.parse({**MODULATED, "attention": {"softmax": {}}}).attention
    assert softmax is not None and softmax.softmax is not None and softmax.softmax.num_bits == 8
    for wrong, message in (
        ({"preset": "W4A16"}, "modulation quantizes activations"),
        ({"preset": "W4A4", "deploy": "full"}, "modulation quantizes what layers read, and no runtime has it"),
        ({"preset": "W4A4", "rotation": {}}, "modulation and rotation do not go together"),
        ({"preset": "W4A4", "modulation": {"first_bits": 9}}, "modulation.first_bits cannot have 9 bits"),
    ):
        with pytest.raises(SchemeError, match=message):
            QuantScheme.parse({"modulation": {}, **wrong})
