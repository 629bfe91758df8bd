"""Quantization schemes as plain data, in the vocabulary of compressed-tensors."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from synthquant.core.errors import SchemeError
from synthquant.core.settings import Settings, parse_settings
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS
from synthquant.nn.input_schemes import ModulationScheme, RotationScheme
from synthquant.nn.observers import OBSERVERS

_PRESET = re.compile(r"W(\d+)A(?:(16)INT|(\d+))", re.IGNORECASE)
_WEIGHT_BITS = tuple(range(2, 9))
_ACTIVATION_BITS = (*range(2, 9), 16)
IMAGE_BITS = 8
_SPLIT = {"skip": "shortcuts split", "all": "shortcuts split, behind normalisations too"}
AFFINE = "affine"
"""The kind of quantizer that weights have, and activations unless another is named."""


class QuantArgs(Settings):
    """How one kind of tensor is quantized."""

    num_bits: int
    """Bits of one code: 2 to 8, and 16 for activations."""
    symmetric: bool = False
    """Zero sits in the middle of the grid; for activations that are never negative, at its lower end."""
    signed: bool = False
    """With `symmetric`, zero sits in the middle for activations that are never negative too, whose codes then are
    signed numbers with zero point 0, as TensorRT takes them; weights always are."""
    strategy: Literal["tensor", "channel", "group", "token"] = "tensor"
    """What shares one scale: the whole tensor (of kind `dynamic`, that of one sample), an output channel, a group
    inside an output channel, or (of kind `dynamic`) a token, which is a position of a feature map."""
    group_size: int | None = Field(default=None, gt=0)
    """Weights in a group (strategy `group` only); must divide the weights of one output channel."""
    observer: str | None = None
    """How the range is chosen: `minmax`, `running`, `brecq`, `genie`, `qdrop` or `percentile`; empty: as the method's
    paper does."""
    kind: str = AFFINE
    """How values are spaced: `affine` (evenly), or another registered kind of quantizer, for activations, such as
    `log_sqrt2` for softmaxes, or `dynamic`, whose range is measured at run time."""

    @model_validator(mode="after")
    def _consistent(self) -> QuantArgs:
        QUANTIZER_KINDS.get(self.kind)
        if self.observer is not None:
            OBSERVERS.get(self.observer)
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to strategy 'group' and only there")
        if self.signed and not self.symmetric:
            raise ValueError("signed puts zero in the middle of a symmetric grid: set symmetric too")
        return self

    @model_serializer(mode="wrap")
    def _without_what_came_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later where it is as before: such files are as they were."""
        fields: dict[str, Any] = handler(self)
        for name, usual in (("kind", AFFINE), ("signed", False)):
            if getattr(self, name) == usual:
                fields.pop(name, None)
        return fields

    @property
    def quant_max(self) -> int:
        """The largest code, `2**num_bits - 1`; the smallest is 0."""
        return int(2**self.num_bits) - 1

    def at_least(self, bits: int) -> QuantArgs:
        """The same with that many bits, if it has fewer."""
        return self if self.num_bits >= bits else self.model_copy(update={"num_bits": bits})


class LayerScheme(Settings):
    """What applies to one layer."""

    weights: QuantArgs | None = None
    """Weights; empty: left in floating point."""
    input_activations: QuantArgs | None = None
    """The tensor the layer reads; empty: left in floating point."""


class AttentionScheme(Settings):
    """What products of two activations read, those of attention above all: query and key, the softmax and the value."""

    softmax: QuantArgs | None = None
    """The softmax; empty: as `input_activations`, whose bits it has where it names none."""


class QuantScheme(Settings):
    """Bits, grids and exceptions for a whole network.

    `QuantScheme.parse("W4A4")` gives per-channel asymmetric weights and per-tensor asymmetric activations, as BRECQ,
    QDrop and Genie use for weights, those that products of attention read among them. `W4A16` is weight-only:
    activations stay in floating point. `W4A16int` quantizes them too, to 16 bit integers. A scheme that names no preset
    says everything itself: what is not in it is off.
    """

    weights: QuantArgs | None = None
    """Weights of convolutions and linear layers; empty: left in floating point."""
    input_activations: QuantArgs | None = None
    """Tensors read by these layers; empty: left in floating point."""
    ends: Literal["w8a8", "same"] = "w8a8"
    """`w8a8`: first and last layer, and what the first one puts out, at 8 bits (BRECQ, Genie); `same`: no exception.
    Whatever reads the network's first input is a first layer. The image itself is 8 bits either way."""
    shortcuts: bool = True
    """Where a block's input also feeds an identity shortcut, the shortcut reads the quantized tensor too (Genie)."""
    deploy: Literal["papers", "full"] = "papers"
    """`papers`: quantize what layers read, as research codes do; `full`: also what sums, concatenations, products of
    two tensors, pooling, attention and activations that runtimes do not fuse read and put out, and the logits (at 8
    bits), each tensor once where it is made, so that an integer runtime needs no floating point between kernels."""
    attention: AttentionScheme | None = None
    """Products of two activations read quantized tensors: query and key, the softmax and the value, each on a grid of
    its own; what they put out and residual sums stay in floating point. Presets say so, for networks that have such
    products. Null: they stay in floating point, unless deploy is `full`, which quantizes them in any case."""
    split_shortcuts: Literal["skip", "all"] | None = None
    """Layers that read feature maps joined along their channels, as the shortcuts of a UNet are, become one layer for
    each map, with ranges of its own for what it reads and for its weights (Q-Diffusion). `skip`: layers that read the
    concatenation itself; `all`: also those that read it through normalisations and activations; null: none."""
    modulation: ModulationScheme | None = None
    """Quantize differences between the steps of a sampler, at the bits of `input_activations`, in place of what layers
    with weights read; products of attention stay at 8 bits, and no shortcut is quantized. Outside of sampling the
    network is the one of the first step. Null: off."""
    rotation: RotationScheme | None = None
    """Layers rotate what they read and quantize it in ranges measured at run time: for each token where they are linear
    or 1x1 convolutions, else for each sample; the method `rotation` sets it. Null: off."""
    ignore: tuple[str, ...] = ()
    """Layers (and operations, with deploy `full`; products, with `attention`) left in floating point, by glob or,
    behind `re:`, by regular expression."""
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Pattern -> fields of `weights` and `input_activations` to change there (null: leave it in floating point);
    the last match wins, and wins over `ends`. For an operation (deploy `full`), `input_activations` is what it puts
    out, unless a layer reads that; for a product (`attention`), what it reads, where a softmax goes by its own name."""

    @model_validator(mode="after")
    def _bits_in_range(self) -> QuantScheme:
        _check_weights(self.weights)
        _check_activations(self.input_activations)
        if self.weights is None and self.input_activations is None:
            raise ValueError("nothing to quantize: give weights, input_activations or both")
        if self.attention is not None:
            if self.input_activations is None:
                raise ValueError("attention quantizes activations: give input_activations, or leave attention empty")
            _check_activations(self.attention.softmax)
        if self.deploy == "full" and self.input_activations is None:
            raise ValueError("deploy 'full' quantizes activations: give input_activations, or leave deploy at 'papers'")
        if self.deploy == "full" and not self.shortcuts:
            raise ValueError("deploy 'full' quantizes shortcuts too: leave shortcuts on, or deploy at 'papers'")
        self._check_readers()
        return self

    def _check_readers(self) -> None:
        """What layers read is quantized where they read it, in one way."""
        for name, asked in (("modulation", self.modulation), ("rotation", self.rotation)):
            if asked is not None and self.deploy == "full":
                raise ValueError(f"{name} quantizes what layers read, and no runtime has it: leave deploy at 'papers'")
        softmax = self.attention.softmax if self.attention is not None else None
        if self.rotation is not None and softmax is not None and softmax.kind not in (AFFINE, "dynamic"):
            raise ValueError(
                f"rotation measures ranges at run time, for which a softmax of kind {softmax.kind!r} has none"
            )
        if self.modulation is None:
            return
        if self.rotation is not None:
            raise ValueError("modulation and rotation do not go together; leave one of them out")
        if self.input_activations is None:
            raise ValueError("modulation quantizes activations: give input_activations, or leave modulation out")
        if self.modulation.first_bits is not None:
            _require_bits(self.modulation.first_bits, _ACTIVATION_BITS, "modulation.first_bits")

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave fields out that are null and came later: such files are as they were before there were such fields."""
        fields: dict[str, Any] = handler(self)
        for name in ("attention", "split_shortcuts", "modulation", "rotation"):
            if getattr(self, name) is None:
                fields.pop(name, None)
        return fields

    @classmethod
    def parse(cls, value: str | dict[str, Any] | QuantScheme) -> QuantScheme:
        """A scheme from a preset name (`W4A4`), a mapping (optionally with `preset` as its base), or a scheme.

        Raises:
            SchemeError: unknown preset, unsupported bits, or a wrong field.
        """
        if isinstance(value, QuantScheme):
            return value
        if isinstance(value, str):
            value = {"preset": value}
        fields = dict(value)
        preset = fields.pop("preset", None)
        merged = _preset(str(preset)) if preset is not None else {}
        for key, change in fields.items():
            known = merged.get(key)
            merged[key] = {**known, **change} if isinstance(known, dict) and isinstance(change, dict) else change
        if preset is not None and merged.get("input_activations") is not None:
            merged.setdefault("attention", {})
        _give_bits(merged)
        try:
            return parse_settings(cls, merged, "scheme")
        except ValueError as error:
            raise SchemeError(str(error)) from error

    def with_rotation(self, rotation: RotationScheme) -> QuantScheme:
        """The same with rotated input channels; raises `SchemeError` if that does not go with the rest."""
        return QuantScheme.parse(self.model_dump() | {"rotation": rotation.model_dump()})

    @property
    def name(self) -> str:
        """Short name such as `W4A4`; `A16` stands for activations in floating point, `A16int` for 16 bit integers."""
        weights = self.weights.num_bits if self.weights else 32
        bits = self.input_activations.num_bits if self.input_activations else 16
        return f"W{weights}A{bits}{'int' if self.input_activations and bits == 16 else ''}"

    def describe(self) -> str:
        """One line that tells bits, grids and the rule for the ends, to be printed with every result."""
        ends = {
            "w8a8": "first and last layer W8A8, first layer's output 8 bit",
            "same": "same bits in every layer, image 8 bit",
        }[self.ends]
        parts = [f"{role} {_describe(args)}" for role, args in self._roles()]
        if self.rotation is not None and self.input_activations is not None:
            parts[-1] = f"activations {self.input_activations.num_bits} bit symmetric, ranges of tokens or samples"
        extra = ["every tensor between integer kernels, logits 8 bit (deploy full)"] if self.deploy == "full" else []
        extra += [self._describe_attention()] if self.attention else []
        extra += [_SPLIT[self.split_shortcuts]] if self.split_shortcuts else []
        extra += [self.modulation.describe()] if self.modulation else []
        extra += [self.rotation.describe()] if self.rotation else []
        extra += [f"{len(self.ignore)} ignore patterns"] if self.ignore else []
        extra += [f"{len(self.overrides)} overrides"] if self.overrides else []
        return f"{self.name} ({'; '.join([*parts, ends, *extra])})"

    def _describe_attention(self) -> str:
        softmax = self.attention and self.attention.softmax
        return f"products of attention, softmax {_describe(softmax)}" if softmax else "products of attention"

    def resolve(
        self,
        layers: Sequence[str],
        after_first: Sequence[str] = (),
        operations: Sequence[str] = (),
        parts: Mapping[str, str] | None = None,
        image_readers: Sequence[str] = (),
    ) -> dict[str, LayerScheme]:
        """The scheme of each layer that is quantized.

        Args:
            layers: names of all quantizable layers in execution order.
            after_first: those that read what the first layer puts out.
            operations: names that patterns may match as well.
            parts: of layers that are parts of a split one, the name of that; patterns that match it match them.
            image_readers: those that read the network's first input as it is: first layers too, whenever they run. A
                denoiser embeds the time before it looks at its noisy image.

        Raises:
            SchemeError: a pattern that matches no layer, or an override that is not a valid scheme.
        """
        parts = parts or {}
        for pattern in (*self.ignore, *self.overrides):
            if not any(matches(pattern, name) for name in (*layers, *operations, *parts.values())):
                raise SchemeError(
                    f"scheme: pattern {pattern!r} matches no layer; layers are {', '.join(layers[:5])}, ..."
                )
        firsts = {parts.get(name, name) for name in (layers[0], *image_readers)}
        ends = firsts | {parts.get(layers[-1], layers[-1])}
        named = {name: parts.get(name, name) for name in layers if not self.ignores(name)}
        return {
            name: self._layer(name, whole, whole in firsts, whole in ends, name in after_first)
            for name, whole in named.items()
        }

    def ignores(self, name: str) -> bool:
        """Whether a layer or an operation is left in floating point."""
        return any(matches(pattern, name) for pattern in self.ignore)

    def operation(self, name: str, *, after_first: bool = False, softmax: bool = False) -> QuantArgs | None:
        """How a tensor that no layer reads is quantized; none: it is left in floating point.

        Args:
            name: where it is made, or the product that reads it.
            after_first: it is made by the first layer.
            softmax: it is made by a softmax.

        Raises:
            SchemeError: an override that is not a valid scheme.
        """
        apart = self.modulation is not None or self.rotation is not None
        wide = apart or (after_first and self.ends == "w8a8")
        inputs = _at_least(self.input_activations, 8) if wide else self.input_activations
        if softmax and self.attention is not None:
            inputs = self.attention.softmax or inputs
        if self.rotation is not None and inputs is not None:
            inputs = inputs.model_copy(update={"kind": "dynamic", "symmetric": True})
        return self._overridden(name, LayerScheme(input_activations=inputs)).input_activations

    def _layer(self, name: str, whole: str, is_first: bool, is_end: bool, after_first: bool) -> LayerScheme:
        weights, inputs = self.weights, self.input_activations
        if self.ends == "w8a8" and is_end:
            weights, inputs = _at_least(weights, 8), _at_least(inputs, 8)
        elif (self.ends == "w8a8" and after_first) or is_first:
            inputs = _at_least(inputs, IMAGE_BITS)
        return self._overridden(name, LayerScheme(weights=weights, input_activations=inputs), whole)

    def _overridden(self, name: str, scheme: LayerScheme, whole: str | None = None) -> LayerScheme:
        fields: dict[str, Any] = scheme.model_dump()
        for pattern, change in self.overrides.items():
            if matches(pattern, name) or (whole is not None and matches(pattern, whole)):
                for role, wanted in change.items():
                    base = fields.get(role)
                    fields[role] = {**base, **wanted} if isinstance(base, dict) and isinstance(wanted, dict) else wanted
        try:
            scheme = parse_settings(LayerScheme, fields, f"scheme override for {name}")
            _check_weights(scheme.weights)
            _check_activations(scheme.input_activations)
        except ValueError as error:
            raise SchemeError(str(error)) from error
        return scheme

    def _roles(self) -> list[tuple[str, QuantArgs]]:
        pairs = (("weights", self.weights), ("activations", self.input_activations))
        return [(role, args) for role, args in pairs if args is not None]


def matches(pattern: str, name: str) -> bool:
    """Whether a layer name fits a glob (`*.fc`) or a regular expression behind `re:`."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise SchemeError(f"scheme: {pattern!r} is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern)


def _preset(name: str) -> dict[str, Any]:
    match = _PRESET.fullmatch(name)
    if match is None:
        raise SchemeError(f"unknown scheme {name!r}; write it as W<bits>A<bits>, for example W8A8, W4A4, W2A4 or W4A16")
    weight_bits, activation_bits = int(match[1]), int(match[2] or match[3])
    _require_bits(weight_bits, _WEIGHT_BITS, f"scheme {name}: weights")
    _require_bits(activation_bits, _ACTIVATION_BITS, f"scheme {name}: activations")
    preset: dict[str, Any] = {"weights": {"num_bits": weight_bits, "strategy": "channel"}}
    if activation_bits != 16 or match[2]:
        preset["input_activations"] = {"num_bits": activation_bits}
    return preset


def _give_bits(fields: dict[str, Any]) -> None:
    """Give a softmax that names no bits those of activations, or the 8 of products beside modulation or rotation."""
    attention, activations = fields.get("attention"), fields.get("input_activations")
    if not (isinstance(attention, dict) and isinstance(activations, dict) and "num_bits" in activations):
        return
    softmax = attention.get("softmax")
    if isinstance(softmax, dict):
        apart = fields.get("modulation") is not None or fields.get("rotation") is not None
        bits = max(activations["num_bits"], 8 if apart else 0)
        fields["attention"] = {**attention, "softmax": {"num_bits": bits, **softmax}}


def _require_bits(bits: int, allowed: tuple[int, ...], where: str) -> None:
    if bits not in allowed:
        also = " (or 16)" if 16 in allowed else ""
        raise SchemeError(f"{where} cannot have {bits} bits; choose {allowed[0]} to 8{also}")


def _check_weights(args: QuantArgs | None) -> None:
    if args is None:
        return
    _require_bits(args.num_bits, _WEIGHT_BITS, "weights")
    if args.kind != AFFINE:
        raise SchemeError(f"weights cannot have kind {args.kind!r}; only {AFFINE!r} is supported")
    if args.strategy == "token":
        raise SchemeError("weights cannot have strategy 'token'; choose tensor, channel or group")


def _check_activations(args: QuantArgs | None) -> None:
    if args is None:
        return
    _require_bits(args.num_bits, _ACTIVATION_BITS, "input_activations")
    strategies = QUANTIZER_KINDS.get(args.kind).strategies
    if args.strategy not in strategies:
        known = " and ".join(map(repr, strategies))
        raise SchemeError(f"input_activations cannot have strategy {args.strategy!r}; only {known} is supported")


def _at_least(args: QuantArgs | None, bits: int) -> QuantArgs | None:
    return None if args is None else args.at_least(bits)


def _describe(args: QuantArgs) -> str:
    kind = ("symmetric" if args.symmetric else "asymmetric") if args.kind == AFFINE else args.kind
    share = f"group {args.group_size}" if args.strategy == "group" else f"per {args.strategy}"
    return f"{args.num_bits} bit {kind} {share}"
