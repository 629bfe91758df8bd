"""Figures of the report as SVG text. The only door to matplotlib.

Colours are written as CSS variables of the page, so that figures follow its light or dark theme; text stays text, in
the font of the page. The same data gives the same bytes: fixed hash salt, no date, no version.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from markupsafe import Markup

from synthquant.core.formatting import printable
from synthquant.report.svg import page_element

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from synthquant.core.quality_file import StepErrorRow
    from synthquant.core.run_metrics import CoverageRow, FineTunePoint, SqnrRow, UnitRow

P = ParamSpec("P")

# Colours that appear nowhere else stand for the page's variables until the SVG is written.
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_RAMP = tuple(f"#0103{step:02x}" for step in range(65))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    **{colour: f"var(--series-{index + 1})" for index, colour in enumerate(_SERIES)},
    **{
        colour: f"color-mix(in oklab, var(--ramp-end) {100 * step / 64:.0f}%, var(--ramp-start))"
        for step, colour in enumerate(_RAMP)
    },
}
_WIDTH = 11.2  # inches; at 100 units per inch this is the width of the page's text column
_MAX_LABELS = 64
NO_PLOTS = "matplotlib is not installed; install it with: pip install 'synthquant[report]'"
"""What is said where figures would stand."""


def available() -> bool:
    """Return whether figures can be drawn; without matplotlib each of the functions below returns nothing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _drawn(draw: Callable[P, Markup]) -> Callable[P, Markup]:
    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Markup:
        return draw(*args, **kwargs) if available() else Markup()

    return drawn


@_drawn
def loss_curves(units: Sequence[UnitRow], figure_id: str) -> Markup:
    """Draw the loss of every unit relative to its first value, over the iterations; early units dark, late ones bright.

    Units without a curve are left out. Returns an SVG element; nothing if there is nothing to draw.
    """
    drawn = [(unit.name, curve) for unit in units if (curve := _relative_curve(unit)) is not None]
    if not drawn:
        return Markup()
    with _style():
        figure, (axes,) = _figure(3.6, 1)
        for index, (name, (steps, values)) in enumerate(drawn):
            step = round(64 * index / max(1, len(drawn) - 1))
            label = printable(name or "network") if index in (0, len(drawn) - 1) else None
            axes.plot(steps, values, color=_RAMP[step], linewidth=1.3, label=label, gid=f"{figure_id}-unit-{index}")
        axes.axhline(1.0, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_ticks())
        axes.yaxis.set_minor_formatter(_plain_ticks())
        axes.set_xlabel("iteration")
        axes.set_ylabel("loss / loss at the start")
        axes.margins(x=0.01)
        _legend(axes, "first to last unit" if len(drawn) > 1 else None)
        return _svg(figure, figure_id, f"Reconstruction loss of {len(drawn)} units over the iterations")


@_drawn
def fine_tuning(points: Sequence[FineTunePoint], figure_id: str) -> Markup:
    """Draw agreement with the float network on images held out and trained on, and below the loss, over the steps."""
    if len(points) < 2:
        return Markup()
    steps = [point.step for point in points]
    losses = [(point.step, point.loss) for point in points if point.loss is not None]
    with _style():
        figure, (above, below) = _figure(4.6, 2)
        above.plot(steps, [100 * point.held_out for point in points], color=_SERIES[0], label="held out")
        above.plot(steps, [100 * point.training for point in points], color=_SERIES[1], label="trained on")
        above.set_ylabel("agreement, %")
        _legend(above)
        below.plot([step for step, _ in losses], [loss for _, loss in losses], color=_SERIES[2], label="training loss")
        below.plot(steps, [point.kl for point in points], color=_SERIES[0], label="KL, held out")
        below.set_xlabel("step")
        below.set_ylabel("loss; nats")
        _legend(below)
        return _svg(figure, figure_id, "Agreement and loss over the steps of fine-tuning")


@_drawn
def error_growth(rows: Sequence[StepErrorRow], figure_id: str) -> Markup:
    """Draw how far two samplers from the same noise are apart before each step, with the 95% interval of the mean."""
    if len(rows) < 2:
        return Markup()
    steps = [row.step for row in rows]
    with _style():
        figure, (axes,) = _figure(3.2, 1)
        axes.fill_between(
            steps, [row.error.low for row in rows], [row.error.high for row in rows], color=_SERIES[0], alpha=0.25
        )
        axes.plot(steps, [row.error.value for row in rows], color=_SERIES[0], marker="o", markersize=2.5)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step of the sampler")
        axes.set_ylabel("relative error")
        axes.margins(x=0.01)
        return _svg(figure, figure_id, "Distance of both samplers before each step, relative to the float one's values")


@_drawn
def layer_sqnr(rows: Sequence[SqnrRow], figure_id: str) -> Markup:
    """Draw the four ratios [dB] of every layer in execution order; higher is better."""
    series = {
        "weights": [row.weights for row in rows],
        "input activations": [row.activations for row in rows],
        "output, this layer alone": [row.alone for row in rows],
        "output, cumulative": [row.cumulative for row in rows],
    }
    return _layer_lines([row.name for row in rows], series, figure_id, "SQNR per layer")


@_drawn
def compare_cumulative(runs: Mapping[str, Sequence[SqnrRow]], figure_id: str) -> Markup:
    """Draw the cumulative ratio [dB] of several runs over the layers, by layer name."""
    names: list[str] = []
    for rows in runs.values():
        names.extend(row.name for row in rows if row.name not in names)
    series = {}
    for label, rows in runs.items():
        by_name = {row.name: row.cumulative for row in rows}
        series[label] = [by_name.get(name) for name in names]
    return _layer_lines(names, series, figure_id, "Cumulative SQNR of each run per layer")


@_drawn
def layer_bits(rows: Sequence[CoverageRow], figure_id: str) -> Markup:
    """Draw weight and input bits of every layer; a layer left in float stands at the top as 32 bits, hollow."""
    if not rows:
        return Markup()
    with _style():
        figure, (axes,) = _figure(1.7 + _label_inches([row.name for row in rows]), 1)
        for offset, colour, label, values in (
            (-0.2, _SERIES[0], "weights", [row.weight_bits for row in rows]),
            (0.2, _SERIES[1], "input activations", [row.input_bits for row in rows]),
        ):
            bits = [(index, value) for index, value in enumerate(values) if value is not None]
            float_at = [index for index, value in enumerate(values) if value is None]
            axes.bar([i + offset for i, _ in bits], [_height(b) for _, b in bits], 0.36, color=colour, label=label)
            axes.bar(
                [i + offset for i in float_at],
                _height(32),
                0.36,
                facecolor="none",
                edgecolor=colour,
                linewidth=0.8,
                hatch="///",
            )
        used = {bit for row in rows for bit in (row.weight_bits or 32, row.input_bits or 32)}
        ticks = sorted({2, 4, 8} | used)
        axes.set_yticks([_height(bit) for bit in ticks], ["float" if bit == 32 else str(bit) for bit in ticks])
        axes.set_ylim(0, _height(max(ticks)) * 1.08)
        axes.set_ylabel("bits")
        _name_layers(axes, [row.name for row in rows])
        _legend(axes)
        return _svg(figure, figure_id, "Bits of weights and input activations per layer")


@_drawn
def batch_norm_gaps(names: Sequence[str], series: Mapping[str, Sequence[float]], figure_id: str) -> Markup:
    """Draw how far sets of images are from the statistics of each batch norm, on a logarithmic axis; low is close."""
    positive = {label: [value if value > 0 else None for value in values] for label, values in series.items()}
    return _layer_lines(names, positive, figure_id, "Distance to each batch norm", "distance", log=True)


@_drawn
def score_histogram(
    edges: Sequence[float], kept: Sequence[int], rejected: Sequence[int], score: str, figure_id: str
) -> Markup:
    """Draw how many images have which score, those that stay below those that go.

    Args:
        edges: of the bins, one more than there are bins.
        kept: images of each bin that stay.
        rejected: images of each bin that go.
        score: name of the score, for the axis.
        figure_id: what the ids of the figure begin with.
    """
    with _style():
        figure, (axes,) = _figure(2.4, 1)
        widths = [right - left for left, right in itertools.pairwise(edges)]
        axes.bar(edges[:-1], kept, widths, align="edge", color=_SERIES[0], label="kept")
        axes.bar(edges[:-1], rejected, widths, bottom=kept, align="edge", color=_SERIES[1], label="rejected")
        axes.set_xlabel(printable(score))
        axes.set_ylabel("images")
        axes.margins(x=0.01)
        _legend(axes)
        return _svg(figure, figure_id, f"Histogram of {score}")


@_drawn
def class_balance(names: Sequence[str], pool: Sequence[int], kept: Sequence[int], figure_id: str) -> Markup:
    """Draw how many images of each class the pool had, and how many of these stayed."""
    with _style():
        figure, (axes,) = _figure(1.9 + _label_inches(names), 1)
        axes.bar(range(len(names)), pool, 0.72, facecolor="none", edgecolor=_MUTED, linewidth=0.9, label="pool")
        axes.bar(range(len(names)), kept, 0.72, color=_SERIES[0], label="kept")
        axes.set_ylabel("images")
        _name_layers(axes, names)
        _legend(axes)
        return _svg(figure, figure_id, "Images of each class in the pool and among those that stayed")


def _layer_lines(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    figure_id: str,
    title: str,
    unit: str = "SQNR [dB]",
    *,
    log: bool = False,
) -> Markup:
    if not any(value is not None for values in series.values() for value in values):
        return Markup()
    with _style():
        figure, (axes,) = _figure(3.2 + _label_inches(names), 1)
        for index, (label, values) in enumerate(series.items()):
            points = [math.nan if value is None else value for value in values]
            if all(math.isnan(point) for point in points):
                continue
            label = printable(label)
            label = f"\u200b{label}" if label.startswith("_") else label  # matplotlib hides names that start with _
            colour = _SERIES[index % len(_SERIES)]
            style = "-" if index < len(_SERIES) else "--"
            axes.plot(
                range(len(names)), points, style, color=colour, marker="o", markersize=3.2, linewidth=1.3, label=label
            )
        axes.set_ylabel(unit)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain_ticks())
            axes.yaxis.set_minor_formatter(_plain_ticks())
        _name_layers(axes, names)
        _legend(axes)
        return _svg(figure, figure_id, title)


def _relative_curve(unit: UnitRow) -> tuple[list[int], list[float]] | None:
    """The points of a unit's curve that a logarithmic axis can show, divided by the first of them."""
    points = [
        (s, v) for s, v in zip(unit.steps, unit.losses, strict=False) if v is not None and math.isfinite(v) and v > 0
    ]
    start = unit.loss_start if unit.loss_start is not None and unit.loss_start > 0 else points[0][1] if points else None
    if start is None or len(points) < 2:
        return None
    return [step for step, _ in points], [value / start for _, value in points]


def _height(bits: int) -> float:
    """Bits on a scale where 2, 4, 8, 16 and 32 are equally far apart."""
    return math.log2(bits) if bits > 1 else 0.5


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // _MAX_LABELS)
    shown = list(range(0, len(names), every))
    axes.set_xticks(
        shown, [printable(names[index]) for index in shown], rotation=90, fontsize=8 if len(names) <= 40 else 7
    )
    axes.set_xlim(-0.8, len(names) - 0.2)


def _label_inches(names: Sequence[str]) -> float:
    """Room that the rotated layer names take below the axis."""
    return min(3.0, 0.075 * max((len(name) for name in names), default=0))


def _plain_ticks() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")


def _legend(axes: Axes, title: str | None = None) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            title=title,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=6,
            borderaxespad=0.2,
            frameon=False,
            handlelength=1.4,
        )


def _figure(height: float, rows: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = [figure.add_subplot(rows, 1, index + 1) for index in range(rows)]
    for part in axes:
        part.grid(axis="y", color=_GRID, linewidth=0.7)
        part.set_axisbelow(True)
        for side in ("top", "right", "left"):
            part.spines[side].set_visible(False)
        part.tick_params(length=0)
    return figure, axes


@contextmanager
def _style() -> Iterator[None]:
    """Settings of matplotlib for the time of one figure; the user's own are back afterwards."""
    import matplotlib

    settings: dict[str, Any] = {
        "svg.hashsalt": "synthquant",
        "svg.fonttype": "none",
        "text.parse_math": False,  # a $ in a name is a dollar sign
        "font.family": ["DejaVu Sans"],  # comes with matplotlib, so the layout is the same everywhere
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _MUTED,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the bytes
        matplotlib.rcParams.update(settings)
        yield


def _svg(figure: Figure, figure_id: str, title: str) -> Markup:
    """Write a figure as an element of the page, in its colours and its font."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Names in another script, whose letters the page has, and very long ones: remarks on the layout help nobody.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return page_element(printable(buffer.getvalue()), figure_id, printable(title), _restyle)


def _restyle(value: str) -> str:
    value = re.sub(r"'DejaVu Sans'[^;]*", "var(--font)", value)
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
    return value
