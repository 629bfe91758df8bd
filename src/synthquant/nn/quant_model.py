"""The quantized copy of a network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from synthquant.core.errors import ModelError
from synthquant.core.modules import device_of
from synthquant.core.progress import Progress
from synthquant.core.verbs import verb
from synthquant.models.blocks import Granularity, Unit
from synthquant.models.float_model import FloatModel
from synthquant.nn.build import Parts, build_parts
from synthquant.nn.coverage import CoverageRow, coverage_rows, summarize
from synthquant.nn.equalization import Equalization
from synthquant.nn.layers import switched
from synthquant.nn.scheme import QuantScheme

_EXTRA_STATE = "_extra_state"  # of PyTorch


class QuantModel(nn.Module):
    """A copy of a float model in which layers hold integer codes and tensors are fake-quantized.

    It keeps state, modes and coverage; `nn.build` makes its parts. It takes and gives what the float network does.

    Attributes:
        float_model: what it was made from.
        scheme: what was asked for, without `attention` where the network has none.
        module: the quantized network.
        folded: pairs (batch norm, layer it was folded into).
        fold: batch norms were folded where that is possible.
        equalization: how the folded network was changed before it was quantized, or none.
        layers: quantized layers by name, in execution order.
        quantizers: activation quantizers by name, each once.
        reads: for each layer whose input is quantized, the name of the quantizer of that tensor: at the layer, at the
            entry of a block around it, or (`deploy: full`) where the tensor is made.
        operations: what becomes of the operations outside layers, in execution order.
        output_quantizers: names of those of tensors that leave the network (`deploy: full`).
        splits: the parts of each layer that was split (`scheme.split_shortcuts`), by its name.
        softmaxes: names of the quantizers of what a softmax puts out.
        modulation: the layers that read differences between the steps of a sampler, or none.
        loaded: the state came from a checkpoint, so that float weights are not there.
    """

    def __init__(self, float_model: FloatModel, parts: Parts, equalization: Equalization | None = None) -> None:
        """Hold what was built; use `build`."""
        super().__init__()
        self.float_model = float_model
        self.scheme = parts.scheme
        self.module = parts.module
        self.folded = parts.folded
        self.fold = parts.fold
        self.layers = parts.layers
        self.quantizers = parts.quantizers
        self.reads = parts.reads
        self.operations = parts.operations
        self.output_quantizers = parts.output_quantizers
        self.splits = parts.splits
        self.softmaxes = parts.softmaxes
        self.operation_quantizers = nn.ModuleList(parts.operation_quantizers)
        self.modulation = parts.modulation
        self.loaded = False
        self.equalization = equalization
        self._products = parts.products
        self._units = parts.units

    @classmethod
    def build(
        cls,
        float_model: FloatModel,
        scheme: QuantScheme | str,
        equalization: Equalization | None = None,
        *,
        fold: bool = True,
    ) -> QuantModel:
        """Copy `float_model`, fold its batch norms and put in quantizers by `scheme`; ranges are not calibrated yet.

        Args:
            float_model: stays as it is.
            scheme: what is quantized, and how.
            equalization: changes the folded copy first: its float side then is the equalised network.
            fold: fold batch norms into layers; otherwise all of them stay, to be trained on.

        Raises:
            SchemeError: the scheme quantizes nothing, a pattern matches nothing, or there is no softmax where it names
                one.
            ModelError: the equalisation is one of another network, or batch norms are not to be folded with it.
        """
        parts = build_parts(float_model, QuantScheme.parse(scheme), equalization, fold=fold)
        return cls(float_model, parts, equalization).eval()

    def equalize(self, equalization: Equalization) -> None:
        """Change the float network that this one was made of, in place; ranges and codes have to be set anew.

        Raises:
            ModelError: it is of another network, batch norms are not folded, one of its layers is split, its input
                channels are rotated, or it was loaded from a checkpoint.
        """
        split = [name for name in (*equalization.rows, *equalization.columns) if name in self.splits]
        if split:
            raise ModelError(
                f"{self.float_model.name}: layer {split[0]} is split, so its channels cannot be scaled any more; leave"
                " scheme.split_shortcuts out"
            )
        if self.loaded or not self.fold or self.scheme.rotation is not None:
            why = "was loaded from a checkpoint" if self.loaded else "keeps its batch norms"
            why = why if self.scheme.rotation is None else "has rotated input channels"
            raise ModelError(f"{self.float_model.name}: a network that {why} cannot be equalised")
        equalization.apply(self.module)
        self.equalization = equalization if self.equalization is None else self.equalization.then(equalization)

    def rebuild(self, scheme: QuantScheme) -> None:
        """Become, in place, the network that another scheme makes of the same float one; nothing is calibrated yet.

        Raises:
            SchemeError: as `build`.
            ModelError: this one was loaded from a checkpoint, which holds no float weights.
        """
        if self.loaded:
            raise ModelError(f"{self.float_model.name}: loaded from a checkpoint, which holds no float weights")
        other = QuantModel.build(self.float_model, scheme, self.equalization, fold=self.fold)
        self.__dict__.update(other.__dict__)

    def sampling(self) -> AbstractContextManager[None]:
        """A sampler runs inside, whose steps are the calls of the network; only a modulated network cares.

        Each trajectory, a batch of images from noise to the end, has one of its own. Calls of a second-order scheduler
        at points between two steps are steps as well.

        Raises:
            InputError: another sampler runs, and from a call in it that cannot be the next step.
            ModelError: static ranges of differences are not set.
        """
        if self.modulation is None:
            return nullcontext()
        self.modulation.require_calibrated()
        return self.modulation.sampling()

    def trainable_copy(self) -> QuantModel:
        """A copy whose float parameters take gradients: biases, batch norms, layers that are left in floating point.

        Grids of activations stay fixed. Quantized weights are codes, which no gradient moves: give a layer a
        `weight_source` whose parameters do. The copy is in evaluation mode, and nothing in it is shared with this one
        but `float_model`.
        """
        twin = copy.deepcopy(self, {id(self.float_model): self.float_model})
        own = twin._of_quantization()
        for parameter in twin.module.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in own)
        return twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives: logits `[B, classes]` of normalised images, or any tree of tensors."""
        return self.module(*args, **kwargs)

    def save(self, folder: Path | str, *, float_graph: bool = False) -> Path:
        """Write a checkpoint of packed codes to `folder`, for `synthquant.load`; one that is there is replaced.

        With `float_graph` it keeps the float network beside them, weights included, as a program of `torch.export`:
        `synthquant.load(folder, trust_code=True)` then needs neither the module nor its code.

        Raises:
            ModelError: activation ranges are not calibrated yet, or the float weights are not there to be kept.
            UnsupportedModelError: `torch.export` cannot follow the network, or what it gives is not the same network.
            OutputError: the folder cannot be written.
        """
        written: Path = verb("save")(self, folder, float_graph=float_graph)
        return written

    def export(
        self,
        path: Path | str,
        target: str | None = None,
        *,
        images: Any = None,
        normalized: bool = False,
        verify: bool = True,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Path:
        """Write the network as a file for a runtime, run that file, and compare it with the network.

        Args:
            path: it ends in `.onnx`, or `.pt2` for a program of `torch.export`; it is there only once it is verified.
            target: what it is for, as `synthquant.quantize` takes it; none: `ort-cpu`, or what the suffix says.
            images: to verify on, whatever `synthquant.open_images` takes; none: noise, or the example of its inputs.
            normalized: `images` are normalised as the network wants them.
            verify: whether to verify at all.
            progress: by default bars on standard error.
            settings: of the exporter (`synthquant show onnx`), such as `min_agreement=0.995`.

        Raises:
            SchemeError, UnsupportedModelError: this network cannot be written in this form.
            VerificationError: what was written differs from the network by more than the exporter allows.
            MissingExtraError: the runtime is not installed.
            ModelError: no form of a file ends so, or activation ranges are not calibrated.
            OutputError: the file cannot be written.
        """
        ways: dict[str, Any] = {"images": images, "normalized": normalized, "verify": verify, "progress": progress}
        written: Path = verb("export")(self, path, target, **ways, **settings)
        return written

    def __repr__(self) -> str:
        """One line: bits, and what they reach; `print(quant_model.module)` has all parts."""
        bits = f"{self.scheme.name}, ends {self.scheme.ends}"
        state = "" if self.calibrated else ", not calibrated yet"
        return f"{type(self).__name__}({self.float_model.name}, {bits}{state}; {summarize(self.coverage())})"

    def units(self, granularity: Granularity = "block") -> list[Unit]:
        """Reconstruction units in execution order, those without a quantized layer left out."""
        return [unit for unit in self._units[granularity] if any(name in self.layers for name in unit.layers)]

    @property
    def first_layer(self) -> str:
        """Name of the layer that runs first, quantized or not."""
        return self._units["layer"][0].layers[0]

    @property
    def last_layer(self) -> str:
        """Name of the layer that runs last, quantized or not."""
        return self._units["layer"][-1].layers[-1]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.module)

    @contextmanager
    def mode(self, *, weights: bool, activations: bool) -> Iterator[None]:
        """Quantize weights and activations, or not, for a while.

        Raises:
            ModelError: float weights are asked for and the network was loaded from a checkpoint.
        """
        if not weights and self.loaded:
            raise ModelError(f"{self.float_model.name}: loaded from a checkpoint, which holds no float weights")
        readings = () if self.modulation is None else self.modulation.readings.values()
        quantizers = (*self.quantizers.values(), *readings)
        with switched(self.layers.values(), quantizers, weights=weights, activations=activations):
            yield

    def coverage(self) -> list[CoverageRow]:
        """What becomes of every layer, every other weight, every other matrix product and what else joins tensors."""
        reads = {layer: self.quantizers[name].args for layer, name in self.reads.items()}
        if self.modulation is not None:
            reads |= {name: layer.reading.args for name, layer in self.modulation.layers.items()}
        return coverage_rows(self.module, self._products, self.layers, reads, self.operations)

    def input_bits(self, name: str) -> int | None:
        """Bits of the tensor that layer `name` reads, wherever it is quantized; none if it is not."""
        return self.quantizers[self.reads[name]].num_bits if name in self.reads else None

    @property
    def calibrated(self) -> bool:
        """Whether every activation quantizer has its range."""
        return all(quantizer.calibrated for quantizer in self.quantizers.values())

    def require_calibrated(self) -> None:
        """Raise `ModelError` if an activation quantizer has no range yet; names it."""
        missing = [name for name, quantizer in self.quantizers.items() if not quantizer.calibrated]
        if len(missing) == sum(not quantizer.fixed for quantizer in self.quantizers.values()) > 0:
            raise ModelError(f"{self.float_model.name}: not calibrated yet; apply a quantization method first")
        if missing:
            raise ModelError(
                f"{self.float_model.name}: the quantizer {missing[0]} saw no data while ranges were set: the network"
                " does not always run the same modules; put that module on the scheme's ignore list"
            )

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the quantized network consists of, by name; float weights of quantized layers left out.

        `NAME.weight_codes` (uint8 or int16, the weight's shape), `NAME.weight_scale` and `NAME.weight_zero_point` (`[C,
        G, 1]`), the tensors of activation grids (`QUANTIZER.scale` ...), and other parameters and buffers.
        """
        state = self._float_state()
        for name, layer in self.layers.items():
            if layer.weight_quantizer is not None:
                state[f"{name}.weight_codes"] = layer.weight_quantizer.codes
                state[f"{name}.weight_scale"] = layer.weight_quantizer.scale
                state[f"{name}.weight_zero_point"] = layer.weight_quantizer.zero_point
        for name, quantizer in self.quantizers.items():
            state |= {f"{name}.{part}": tensor for part, tensor in quantizer.grid().items()}
        return state if self.modulation is None else state | self.modulation.state()

    @property
    def whole_numbers(self) -> set[str]:
        """Names of those tensors of the state, beside codes, that hold whole numbers."""
        weights = {f"{name}.weight_zero_point" for name, layer in self.layers.items() if layer.weight_quantizer}
        grids = {f"{name}.{part}" for name, quantizer in self.quantizers.items() for part in quantizer.whole_numbers}
        modulation = () if self.modulation is None else self.modulation.state()
        return weights | grids | {name for name in modulation if name.endswith(".zero_point")}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take a state written by `state`; float weights are dropped.

        Raises:
            ModelError: names or shapes differ; says which.
        """
        for name, layer in self.layers.items():
            if f"{name}.bias" in state:
                layer.make_room_for_bias(state[f"{name}.bias"])
            codes = state.get(f"{name}.weight_codes")
            if layer.weight_quantizer is not None and codes is not None:
                layer.weight_quantizer.make_room_for(codes)
        if self.modulation is not None:
            self.modulation.make_room(state)
        own = self.state()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape of", sorted(wrong))):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ModelError(
                    f"quantized checkpoint does not fit {self.float_model.name}: {what} {', '.join(names[:5])}{more}"
                )
        for name, value in own.items():
            value.copy_(state[name])
        for quantizer in self.quantizers.values():
            quantizer.load_grid(quantizer.grid())
        if self.modulation is not None:
            for reading in self.modulation.readings.values():
                reading.calibrated = True
        for layer in self.layers.values():
            layer.drop_float_weight()
        self.loaded = True

    def get_extra_state(self) -> torch.Tensor:
        """What `state_dict` holds beside tensors of the network: how it is quantized and was equalised, as bytes."""
        tensors = {} if self.equalization is None else self.equalization.tensors()
        if self.modulation is not None:
            tensors["timesteps"] = self.modulation.run.timesteps.clone()
        return torch.frombuffer(bytearray(save_safetensors(tensors | {"how": self._how()})), dtype=torch.uint8)

    def _how(self) -> torch.Tensor:
        """Scheme and folding as text, in bytes."""
        return torch.frombuffer(bytearray(f"{self.fold} {self.scheme.model_dump_json()}".encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Become equalised as the network was; raises `ModelError` if that is quantized or equalised otherwise."""
        tensors = load_safetensors(state.cpu().numpy().tobytes())
        steps = tensors.pop("timesteps", None)
        if not torch.equal(tensors.pop("how"), self._how()):
            raise ModelError(
                f"{self.float_model.name}: the state is of a network that is quantized otherwise than this one, to"
                f" {self.scheme.describe()}; build it with the same scheme"
            )
        wanted, _ = Equalization.split(tensors)
        if wanted is not None and self.equalization is None:
            self.equalize(wanted)
        if (wanted and wanted.fingerprint) != (self.equalization and self.equalization.fingerprint):
            raise ModelError(f"{self.float_model.name}: the state is of a network that was equalised otherwise")
        if self.modulation is not None and steps is not None:
            self.modulation.run.timesteps = steps

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Be ready for what another network of this kind may have: wider codes, further biases, no float weights."""
        if f"{prefix}{_EXTRA_STATE}" in state_dict:
            self.set_extra_state(state_dict[f"{prefix}{_EXTRA_STATE}"])  # before its parts are looked for
        inner = f"{prefix}module."
        state = {name.removeprefix(inner): value for name, value in state_dict.items() if name.startswith(inner)}
        for name, layer in self.layers.items():
            layer.make_room(state, name)
        self.loaded = any(layer.without_float_weight for layer in self.layers.values())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _float_state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers that quantization leaves alone."""
        own, entries = self._of_quantization(), self.module.state_dict(keep_vars=True)
        tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
        kept = {name: value for name, value in tensors.items() if not name.endswith(_EXTRA_STATE)}
        return {name: value.detach() for name, value in kept.items() if id(value) not in own}

    def _of_quantization(self) -> set[int]:
        """Identities of the tensors that make up grids and codes, and of the weights that these stand for."""
        parts: list[nn.Module] = [*self.quantizers.values()]
        parts += [] if self.modulation is None else self.modulation.readings.values()
        parts += [layer.weight_quantizer for layer in self.layers.values() if layer.weight_quantizer is not None]
        own = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
        own |= {id(layer.float_bias) for layer in self.layers.values() if layer.float_bias is not None}
        own |= {id(layer._parameters["weight"]) for layer in self.layers.values() if layer.weight_quantizer is not None}
        return own
