"""What a unit reads, reached without running the units before it, against plain hooks on the whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.denoisers import denoiser
from tests.nn.networks import Block, Encoder, Keywords, Network, Upsampling, float_model
from tests.quantize.phases import a_phase
from torch import nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import DataError, UnsupportedModelError
from synthquant.methods import MemoryBudget
from synthquant.models.blocks import Unit, find_units
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.signature import Inputs, TensorSpec
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.cache import CacheStore, LeafCaches, Stream
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.reconstruct import Reconstruction
from synthquant.quantize.replay import NETWORK_INPUT, Replay
from synthquant.quantize.unit_fit import UnitFit


class Stages(nn.Module):
    """A residual network with pooling and in-place activations between its units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 6), Block(6, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Skipping(nn.Module):
    """Later units read the outputs of much earlier ones, changed in place in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 3, padding=1)
        self.d = nn.Linear(4 + 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x)
        second = self.b(first.clone())
        first *= 2
        third = self.c(torch.cat([first, torch.relu_(second)], 1))
        return self.d(torch.cat([third.mean((2, 3)), x.mean((2, 3))], 1))


class Windows(nn.Module):
    """A unit that reads two rows for each image, as shifted windows do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2)
        y = self.inner(y.reshape(len(x) * 2, -1, 4)).reshape(len(x), -1, 4)
        return self.head(y.mean(1))


def replay_of(network: nn.Module, granularity: Any = "block") -> tuple[nn.Module, Replay]:
    module = float_model(network).module
    example = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    layers = {name for name, part in module.named_modules() if isinstance(part, QUANTIZABLE)}
    return module, Replay(module, find_units(module, example, granularity, layers), example)


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def watch(network: nn.Module, units: list[Unit], x: torch.Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """Arguments and outputs of all units in one plain forward pass."""
    inputs: dict[int, Any] = {}
    outputs: dict[int, Any] = {}
    handles = []
    for index, unit in enumerate(units):
        module = network.get_submodule(unit.name)

        def before(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            inputs[index] = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf,
                                            (args, kwargs))  # fmt: skip

        def after(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            outputs[index] = tensors(output)

        handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    with torch.no_grad():
        network(x.clone())
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("granularity", ["block", "layer", "network"])
@pytest.mark.parametrize("kind", [Stages, Network, Upsampling, Skipping, Keywords, Windows, Encoder])
def test_rolling_forward_equals_hooks_on_the_whole_network(kind: type[nn.Module], granularity: str) -> None:
    network, replay = replay_of(kind(), granularity)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs, outputs = watch(network, replay.units, x)
    for index, unit in enumerate(replay.units):
        needs_images = NETWORK_INPUT in replay.sources[index]
        asked: set[int] = set()

        def stored(source: int, asked: set[int] = asked) -> list[torch.Tensor]:
            asked.add(source)
            return [tensor.clone() for tensor in outputs[source]]

        leaves, origins = replay.run_to(index, 5, Inputs.of(x.clone()) if needs_images else None, stored)
        assert asked <= replay.sources[index] <= replay.needed_after(index - 1)
        for leaf, wanted in zip(leaves, replay.inputs[index].per_sample(inputs[index]), strict=True):
            assert torch.allclose(leaf, wanted, atol=1e-6), unit.name
        for leaf, origin in zip(leaves, origins, strict=True):
            given = {NETWORK_INPUT: [x], **outputs}
            assert origin is None or torch.equal(leaf, given[origin[0]][origin[1]])
        args, kwargs = replay.inputs[index].rebuild([leaf.clone() for leaf in leaves])
        for found, wanted in zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(inputs[index]), strict=True):
            same = torch.allclose(found, wanted, atol=1e-6) if isinstance(found, torch.Tensor) else found == wanted
            assert same, unit.name
        with torch.no_grad():
            result = tensors(replay.run_unit(index, [leaf.clone() for leaf in leaves]))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(result, outputs[index], strict=True))


def test_sources_of_a_long_skip_connection() -> None:
    _, replay = replay_of(Upsampling())
    names = [unit.name for unit in replay.units]
    assert names == ["stem", "down", "middle", "up", "out", "fc"]
    assert replay.sources == [{NETWORK_INPUT}, {0}, {1}, {2}, {0, 3}, {4}]
    assert replay.needed_after(2) == {0, 2} and replay.needed_after(4) == {4}


def test_an_output_that_is_read_as_it_is_is_told_from_a_changed_one() -> None:
    network, replay = replay_of(Network())
    _, outputs = watch(network, replay.units, torch.randn(4, 3, 8, 8))
    origins = [
        replay.run_to(index, 4, Inputs.of(torch.zeros(4, 3, 8, 8)), lambda source: [outputs[source][0].clone()])[1]
        for index in range(len(replay.units))
    ]
    assert [unit.name for unit in replay.units] == ["stem", "blocks.0", "blocks.1", "fc"]
    # after the stem an activation works in place
    assert origins == [[(NETWORK_INPUT, 0)], [None], [(1, 0)], [None]]


def test_a_way_without_gradient_makes_all_earlier_units_sources() -> None:
    _, replay = replay_of(Keywords(), "layer")
    assert replay.sources[0] == {NETWORK_INPUT} and replay.sources[1] == {0}
    _, blocks = replay_of(Keywords(), "block")
    assert [unit.name for unit in blocks.units] == ["stem", "blocks.0", "blocks.1", "fc"]
    assert blocks.sources[2] == {NETWORK_INPUT, 0, 1}, "its gate is a comparison with what the stem gave"
    kinds = blocks.inputs[1].specs
    assert [kind.per_sample for kind in kinds] == [1, 1, 0, 0, 0] and kinds[4].per_count == 1


def test_nothing_is_left_behind() -> None:
    network, replay = replay_of(Network())
    outputs = watch(network, replay.units, torch.randn(2, 3, 8, 8))[1]
    replay.run_to(2, 2, None, lambda source: outputs[source])
    assert not any("forward" in part.__dict__ for part in network.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    with pytest.raises(ZeroDivisionError):
        replay.run_to(2, 2, None, lambda source: [1 / 0])  # type: ignore[list-item]
    assert not any("forward" in part.__dict__ for part in network.modules())


def test_run_from_takes_stored_outputs_and_runs_the_rest() -> None:
    network, replay = replay_of(Stages())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    _, outputs = watch(network, replay.units, x)
    for index in range(len(replay.units)):
        logits = replay.run_from(index, Inputs.of(x), lambda source: [outputs[source][0].clone()])
        assert torch.allclose(logits, network(x), atol=1e-5)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.again(self.stem(x)))
        return self.fc(x.mean((2, 3)))


class Random(Network):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.rand_like(x))


class OddValue(Network):
    """Gives a unit something that cannot be cached."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = {"mean": x.mean(), "pairs": x.flatten(1) @ x.flatten(1).T, "set": {1, len(x)}}[self.what]
        return self.inner(self.stem(x), value)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, _: Any) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


def odd(what: str) -> nn.Module:
    network = OddValue(what)
    network.inner = Inner()
    return network


@pytest.mark.parametrize(
    ("network", "names", "said"),
    [
        (Twice(), ["stem", "again", "fc"], "module 'again' runs more than once"),
        (Random(), ["stem", "blocks.0"], "module 'stem' does not read the same twice"),
        (odd("set"), ["stem", "inner"], "takes or returns a set that changes with the batch"),
        (odd("mean"), ["stem", "inner"], "depends on the samples but has no row"),
        (odd("pairs"), ["stem", "inner"], "only tensors with the samples in one dimension"),
    ],
)
def test_what_cannot_be_replayed_is_said(network: nn.Module, names: list[str], said: str) -> None:
    module = float_model(network).module
    with pytest.raises(UnsupportedModelError, match=said):
        Replay(module, [Unit(name, (name,)) for name in names], torch.randn(3, 3, 8, 8))


def test_a_number_that_a_unit_has_no_entry_for_is_named() -> None:
    class Chosen(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Embedding(3, 5)

        def forward(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            return self.fc(x.mean((2, 3))) + self.shift(which)

    class Choosing(Network):
        def forward(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            return self.inner(self.stem(x), which)

    network = Choosing()
    network.inner = Chosen()
    which = torch.tensor([0, 1, 2])
    replay = Replay(network.eval(), [Unit("inner", ("inner.fc",))], Inputs((torch.randn(3, 3, 8, 8), which)))
    features = torch.randn(3, 4, 8, 8)
    assert replay.run_unit(0, [features, which]).shape == (3, 5)
    with pytest.raises(DataError, match=r"no entry for one of its whole numbers .*input 1 of 'inner' runs from 0 to 3"):
        replay.run_unit(0, [features, torch.tensor([3, 0, 1])])


def test_what_the_network_is_given_is_cached_once_for_all_units_that_read_it() -> None:
    one = denoiser("conditional", 6)
    model = QuantModel.build(one.model, "W8A8")
    engine = Reconstruction(model, CalibrationSet(model, one.samples), "block", MemoryBudget(), None)
    fitted, teacher, reading = engine.fitted, Stream(), []
    context = [name for name, _ in one.inputs.named()].index("encoder_hidden_states")
    for index, unit in enumerate(engine.units):
        fit = UnitFit(fitted, index, a_phase(inputs="teacher"))
        fit.gather(teacher, Stream())
        teacher.outputs[index] = fit.targets
        assert fit.teacher is not None
        if any(rows is fitted.given[context] for rows in fit.teacher.rows):
            reading.append(unit.name)
            place = next(place for place, rows in enumerate(fit.teacher.rows) if rows is fitted.given[context])
            assert torch.equal(fit.teacher.read(0, 6)[place], fitted.inputs(0, 6).tensors[context])
    assert reading == [unit.name for unit in engine.units if "attentions" in unit.name] and len(reading) == 4


def test_a_cache_that_is_shared_still_knows_of_infinite_values() -> None:
    store = CacheStore(MemoryBudget(), torch.device("cpu"))
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    caches = LeafCaches([TensorSpec(1, (2,))], [store.allocate((2, 2))])
    caches.write(0, [mask], [])  # kept elsewhere
    assert caches.infinite == {0}
