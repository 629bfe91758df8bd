"""What a network is meant for: a runtime's preset or another exporter, and the scheme with which it takes everything.

A target is a preset of the ONNX exporter (`ort-cpu`, `openvino`, ...) or the name of another exporter (`torch`,
`checkpoint`, ...). Nothing here knows what a runtime takes: fields of a scheme come from `Preset.scheme`, and refusals
from the exporter's own `check` and `rehearse`, which are asked before anything is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast, runtime_checkable

from torch import nn

from synthquant.core.cpu import has_vnni
from synthquant.core.errors import RecipeError, SchemeError, UnknownNameError
from synthquant.core.method_settings import build_method
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings, parse_settings
from synthquant.export import Onnx
from synthquant.export.presets import PRESETS, Preset
from synthquant.methods import EXPORTERS, Exporter
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.calibrate import calibrate_weights

DEFAULT_SCHEME = "W4A4"
"""Scheme where neither it nor a target is named."""
_INTEGER = "W8A8"
# Sums of two products of 8 bits overflow 16 bits where a CPU adds in those.
_INTEGER_WITHOUT_VNNI = {"preset": "W7A8", "ends": "same"}
_GROUP = 32


@runtime_checkable
class GraphExporter(Protocol):
    """An exporter that follows the network, which it may not be able to."""

    def rehearse(self, quant_model: QuantModel) -> None:
        """Do what `export` does with a network of some ranges, and drop it; raises what that would."""
        ...


def target_names() -> tuple[str, ...]:
    """Return the names of all targets."""
    others = [name for name, cls in EXPORTERS.items() if "preset" not in cast(type[Settings], cls).model_fields]
    return (*PRESETS, *others)


def exporter_for(target: str, settings: Mapping[str, Any] = MappingProxyType({})) -> Exporter:
    """Return the exporter of a target, with these of its fields set.

    Raises:
        UnknownNameError: there is no such target.
        RecipeError: it has no such field, or a value of no use.
    """
    if target not in target_names():
        raise UnknownNameError("target", target, target_names())
    if target not in PRESETS:
        return build_method(EXPORTERS, target, settings, "export")
    if "preset" in settings:
        raise RecipeError(f"export: the target {target} is the preset; leave 'preset' out")
    return parse_settings(Onnx, {**settings, "preset": target}, "export")


def default_scheme(target: str | None) -> dict[str, Any]:
    """Return what is quantized to where no scheme is named: as `QuantScheme.parse` takes it, without the target's own.

    For integer kernels W8A8, or, on a CPU without VNNI, W7A8 with ends alike. Raises as `exporter_for`.
    """
    if target is None or not _preset_of(target).runs_integers:
        return {"preset": DEFAULT_SCHEME}
    return {"preset": _INTEGER} if has_vnni() else dict(_INTEGER_WITHOUT_VNNI)


def scheme_for(target: str, scheme: str | Mapping[str, Any] | QuantScheme | None = None) -> QuantScheme:
    """Return a scheme that a target takes: what is given, and for what that leaves open, what the target needs.

    Args:
        target: as `target_names` has it.
        scheme: a preset such as `W8A8`, a mapping as in recipes, or a scheme, of which the fields count that were set;
            none: `default_scheme`.

    Raises:
        UnknownNameError: there is no such target.
        SchemeError: the scheme makes no sense, or no activation is quantized and the target runs integers.
    """
    preset = _preset_of(target)
    if isinstance(scheme, QuantScheme):
        scheme = scheme.model_dump(exclude_unset=True)
    given: dict[str, Any] = {"preset": scheme} if isinstance(scheme, str) else dict(scheme or {})
    if given.keys().isdisjoint(("preset", "weights", "input_activations")):
        given = default_scheme(target) | given
    found = QuantScheme.parse(given)
    if not preset.runs_integers:
        return found
    if found.input_activations is None:
        raise SchemeError(
            f"target {target} runs integers and {found.name} leaves activations in floating point: choose W8A8, or"
            " target simulate"
        )
    for name, change in preset.scheme.items():
        there = given.get(name)
        if isinstance(change, dict) and isinstance(there, Mapping):
            given[name] = change | dict(there)
        elif name not in given and (not isinstance(change, dict) or "preset" in given):
            given[name] = change
    return QuantScheme.parse(given)


def network_scheme(target: str, model: FloatModel, scheme: QuantScheme, *, fold: bool = True) -> QuantScheme:
    """Return the scheme with what a target needs of this network's layers by name: which ones are packed.

    Those are the linear layers whose weights have few enough bits, or, where none has, all but the ends, which then get
    them, in groups of 32 where that divides them. What they read stays in floating point. Overrides of the scheme win.
    """
    bits = _preset_of(target).packed_bits
    if bits is None:
        return scheme
    layers = QuantModel.build(model, scheme, fold=fold).layers
    ends = (next(iter(layers)), next(reversed(layers))) if scheme.ends == "w8a8" else ()
    linear = {
        name: (layer.in_features, layer.weight_quantizer.num_bits)
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and layer.weight_quantizer is not None
    }
    changes: dict[str, dict[str, Any]] = {
        name: {"input_activations": None} for name, (_, given) in linear.items() if given <= bits
    }
    for name, (width, _) in linear.items() if not changes else ():
        if name not in ends:
            group = {"strategy": "group", "group_size": _GROUP} if width % _GROUP == 0 else {}
            changes[name] = {"weights": {"num_bits": bits, **group}, "input_activations": None}
    return scheme.model_copy(update={"overrides": changes | scheme.overrides})


def require_exportable(quant_model: QuantModel, target: str, progress: Progress = QUIET) -> None:
    """Raise what the exporter of a target would raise once all is made, as far as the network is the reason.

    Weights of `quant_model`, which was just built, are rounded to nearest and its ranges are set to anything.

    Raises:
        SchemeError: the target cannot express the scheme, whatever ranges turn out to be.
        UnsupportedModelError: the exporter cannot follow the network, or has no form for an operation.
        MissingExtraError: a package is missing.
    """
    exporter = exporter_for(target)
    exporter.check(quant_model)
    if not isinstance(exporter, GraphExporter):
        return
    progress.say(f"rehearse the export to {target}")
    calibrate_weights(quant_model, "minmax")
    for quantizer in quant_model.quantizers.values():
        if not quantizer.calibrated:
            quantizer.cover(0.0 if quantizer.non_negative else -1.0, 1.0)
            quantizer.calibrated = True
    exporter.rehearse(quant_model)
    weights = [layer.weight_quantizer for layer in quant_model.layers.values()]
    widest = max((one.num_bits for one in weights if one is not None), default=0)
    if widest == 8 and _preset_of(target).runs_integers and not has_vnni():
        progress.warn(
            "this CPU has no VNNI: sums of 8-bit products may overflow where the file is compared with the network;"
            " W7A8 with scheme.ends=same cannot"
        )


def _preset_of(target: str) -> Preset:
    """What a target takes; exporters without presets keep every grid as it is."""
    exporter_for(target)
    return PRESETS.get(target, PRESETS["simulate"])
