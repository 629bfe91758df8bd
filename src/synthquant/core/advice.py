"""What to do about a result: from what a run measured to settings that can be pasted, for terminal and report alike."""

from __future__ import annotations

import glob
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from synthquant.core.formatting import number, percent, quantity, significant, size
from synthquant.core.run_metrics import CoverageRow, FineTunePoint, HeldOutMetrics, SqnrRow

MOST_UNDECIDED = 0.05
"""Share of roundings that may be undecided: as many choices are then left to the final rounding to nearest."""
FARTHER = 1.5
"""How much farther from the batch norms chosen images may be than all: fewer are a little farther by chance alone."""
TOO_FEW = 3.0
"""So many dB less on images held out, twice the error, is too much."""
_WORST = 3
_WIDTHS = (4, 8)
# With 300 iterations next to no rounding of the bundled networks is undecided; with 80 a third is.
_FEW_ITERATIONS, _MORE = 300, 4
_DEVIATIONS = 1.96  # of a normal distribution, which 95% of it lie within
_OVERRIDES = "quantize.scheme.overrides"


class RoundedUnit(Protocol):
    """What is known of the roundings of one unit."""

    @property
    def name(self) -> str:
        """Its module name."""

    @property
    def undecided(self) -> float | None:
        """Share (0..1) of its roundings that were neither 0 nor 1 at the end."""


@dataclass(frozen=True)
class Advice:
    """One thing to do."""

    found: str
    """What was measured, a sentence without its full stop."""
    do: str
    """What to do about it."""
    setting: str = ""
    """As `synthquant run` takes it behind `--set`; empty: it is no setting."""

    def __str__(self) -> str:
        """One line, for the terminal."""
        return f"{self.found}: {self.do}" + (f", for example {as_option(self.setting)}" if self.setting else "")


@dataclass(frozen=True)
class LayerAdvice:
    """What to change in one layer."""

    layer: SqnrRow
    weakest: str
    """The part of it that quantization hurts most, with its bits."""
    change: str
    """What to give it instead."""
    cost: str
    """What that costs beside the network as it is."""
    override: Mapping[str, Any]
    """The same as an entry of `scheme.overrides`."""


def as_option(setting: str) -> str:
    """Return a setting as it is typed into a shell."""
    return f"--set {shlex.quote(setting)}"


def about_rounding(units: Sequence[RoundedUnit], iterations: int | None) -> Advice | None:
    """Say which units have undecided roundings, more than `MOST_UNDECIDED` of them; none: no unit has.

    Args:
        units: what the method reported.
        iterations: for how long each learned, the setting of the method; none: it has no such setting.
    """
    left = [(unit.undecided, unit.name or "the network") for unit in units if (unit.undecided or 0.0) > MOST_UNDECIDED]
    if not left:
        return None
    most, where = max((share or 0.0, name) for share, name in left)
    return Advice(
        f"{len(left)} of {len(units)} units have more than {percent(MOST_UNDECIDED, 0)}% of their roundings undecided"
        f" (at most {percent(most)}%, in {where})",
        "more iterations decide them",
        f"quantize.iterations={max(_MORE * iterations, _FEW_ITERATIONS)}" if iterations else "",
    )


def about_selection(distances: Mapping[str, float] | None, factor: float = 1.0) -> Advice | None:
    """Say that the images chosen are farther from the batch norms than all were; none: they are not, or not known.

    Args:
        distances: of the sets `pool` and `kept`, summed over batch norms.
        factor: how much farther they may be.
    """
    if not distances or not distances["kept"] > factor * distances["pool"]:
        return None
    farther = f" ({significant(distances['kept'])} against {significant(distances['pool'])})"
    if distances["kept"] > FARTHER * distances["pool"]:
        return Advice(
            f"as a set, the kept images are farther from the batch norms than the pool{farther}",
            "more went than helps; keep more",
        )
    return Advice(
        f"as a set, the kept images are a little farther from the batch norms than the pool{farther}",
        f"fewer images are by chance alone, up to about {FARTHER:g} times; keep more if that costs accuracy",
    )


def about_training(points: Sequence[FineTunePoint], best_step: int | None, held_out: int | None) -> Advice | None:
    """Say that fine-tuning agrees better on the images it trains on than on those held out; none: not beyond chance.

    Both shares come from `held_out` images each, so that their difference has a standard error of
    `sqrt((p (1 - p) + q (1 - q)) / held_out)`; beyond 1.96 of them chance alone leads in one case of twenty.
    """
    best = next((point for point in points if point.step == best_step), None)
    if best is None or not held_out:
        return None
    gap = best.training - best.held_out
    variance = best.training * (1 - best.training) + best.held_out * (1 - best.held_out)
    if gap <= _DEVIATIONS * math.sqrt(variance / held_out) or gap <= 0:
        return None
    return Advice(
        f"fine-tuning reaches {percent(best.training)}% agreement on images that it trains on and"
        f" {percent(best.held_out)}% on images held out",
        "the network learned its images by heart; train on more of them",
    )


def about_held_out(found: HeldOutMetrics) -> Advice | None:
    """Say that outputs of images held out have `TOO_FEW` dB less than of those learned from; none: they have not.

    The difference counts as far as it is beyond 1.96 of its standard errors.
    """
    if found.sqnr is None or found.held_out_sqnr is None or found.error is None:
        return None
    if found.sqnr - found.held_out_sqnr - _DEVIATIONS * found.error <= TOO_FEW:
        return None
    return Advice(held_out_in_words(found), "the network learned its images by heart; quantize with more of them")


def held_out_in_words(found: HeldOutMetrics) -> str:
    """Return what was measured of images held out, beside those that the network was quantized with."""
    seen, unseen = (
        "" if share is None else f" and {percent(share)}% agreement"
        for share in (found.agreement, found.held_out_agreement)
    )
    return (
        f"outputs have {number(found.sqnr, 1)} dB{seen} on {found.count} images that it was quantized with,"
        f" {number(found.held_out_sqnr, 1)} dB{unseen} on {found.held_out_count} held out"
    )


def about_layers(
    sqnr: Sequence[SqnrRow], coverage: Sequence[CoverageRow], recipe: Mapping[str, Any]
) -> list[LayerAdvice]:
    """Say what to change in the layers whose own quantization hurts them most, the worst first.

    The part of a layer (weights or what it reads) with the lower ratio gets the next of 4 and 8 bits; at 8 bits the
    layer is better left in floating point. A network that a recipe takes from another run is not changed.
    """
    section = recipe.get("quantize")
    if not isinstance(section, Mapping) or section.get("run") is not None:
        return []
    rows = {row.name: row for row in coverage}
    ranked = sorted((row for row in sqnr if row.alone is not None), key=lambda row: row.alone or 0.0)
    advised = [_about_layer(row, rows[row.name]) for row in ranked if row.name in rows]
    return [one for one in advised if one is not None][:_WORST]


def layers_setting(advised: Sequence[LayerAdvice], recipe: Mapping[str, Any]) -> str:
    """Return the setting that makes these changes beside the exceptions that the recipe has, as `Advice.setting`."""
    overrides = dict(_overrides(recipe["quantize"]))
    for one in advised:
        for pattern, change in one.override.items():
            former = overrides.pop(pattern, {})  # the last entry that fits a layer wins
            overrides[pattern] = {**former, **{role: _beside(former.get(role), new) for role, new in change.items()}}
    return f"{_OVERRIDES}={json.dumps(overrides)}"


def _about_layer(row: SqnrRow, layer: CoverageRow) -> LayerAdvice | None:
    weights, inputs = (row.weights, layer.weight_bits), (row.activations, layer.input_bits)
    parts = {"weights": weights, "input_activations": inputs}
    known = {role: (ratio, bits) for role, (ratio, bits) in parts.items() if ratio is not None and bits is not None}
    if not known:
        return None
    role, (ratio, bits) = min(known.items(), key=lambda item: item[1][0])
    word = "weights" if role == "weights" else "inputs"
    wider = next((width for width in _WIDTHS if width > bits), None)
    if wider is None:
        change: dict[str, Any] = dict.fromkeys(parts)
        told, cost = "leave the layer in floating point", _more_bytes(layer, 32 - (layer.weight_bits or 32))
    else:
        change = {role: {"num_bits": wider}}
        told = f"give its {word} {wider} bits"
        more = (layer.macs or 0) * (layer.weight_bits or 32) * (wider - bits)
        cost = _more_bytes(layer, wider - bits) if role == "weights" else f"{quantity(more)} bit operations"
    weakest = f"{word}, {bits} bits: {number(ratio, 1)} dB"
    return LayerAdvice(row, weakest, told, cost, {glob.escape(row.name): change})


def _beside(former: Any, new: Any) -> Any:
    """What a role is changed to, with what was said of it before."""
    return {**former, **new} if isinstance(former, Mapping) and isinstance(new, Mapping) else new


def _more_bytes(layer: CoverageRow, bits: int) -> str:
    return size((layer.parameters or 0) * bits / 8)


def _overrides(section: Mapping[str, Any]) -> Mapping[str, Any]:
    scheme = section.get("scheme")
    found = scheme.get("overrides") if isinstance(scheme, Mapping) else None
    return found if isinstance(found, Mapping) else {}
