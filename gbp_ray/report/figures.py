"""The report's figures: accuracy, rounds, layers, overlaps and cost of one workload's curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gbp_ray.report.curves import Curve, Point, WorkloadCurves
from gbp_ray.report.details import CloseUp
from gbp_ray.report.drawing import (
    GRID,
    INK,
    NUM_STYLED,
    PAPER,
    QUIET,
    SERIES,
    Drawing,
    Style,
    add_panels,
    make_handle,
    shorten_name,
)

__all__ = [
    "plot_accuracy",
    "plot_cost",
    "plot_layers",
    "plot_overlaps",
    "plot_rounds",
    "plot_tradeoffs",
]

_TICKS = (0.9, 0.5, 0.99, 0.8, 0.95, 0, 0.999, 0.98, 0.7, 0.995, 0.9999, 0.3, 0.998, 0.6, 0.1)
"""Sparsities worth a tick, the most wanted first."""

_HATCHES = ("", "///", "\\\\\\", "xx", "---", "|||", "++", "//")
_MOST_CURVES, _MOST_LAYER_NAMES, _MOST_BARS = 60, 40, 40


# -- accuracy --------------------------------------------------------------------------------------


def plot_accuracy(curves: WorkloadCurves, styles: dict[str, Style], salt: str) -> Drawing:
    """Plots accuracy against sparsity: all of it, and what is close to the dense network."""
    shown = _most_telling(curves)
    lowest = min(p.accuracy.mean for c in shown for p in c.points)
    top = max([curves.dense.mean, *(p.accuracy.mean for c in shown for p in c.points)])
    floor = curves.dense.mean - 0.05
    is_zoomed = lowest < floor - 0.05 and top > floor
    front = {id(point) for _, point in curves.front}
    legend = [*_curve_handles(shown, styles), *_accuracy_handles(curves, shown)]

    def draw(is_narrow: bool) -> Figure:
        figure, axes = add_panels(
            2 if is_zoomed else 1,
            is_narrow,
            legend,
            height_in=2.9,
            num_columns=2,
            has_titles=is_zoomed,
        )
        for number, ax in enumerate(axes):
            _draw_dense(ax, curves)
            if len(curves.front) > 1:
                front_x = [_sparsity_depth(point) for _, point in curves.front]
                front_y = [100 * point.accuracy.mean for _, point in curves.front]
                ax.plot(front_x, front_y, color=GRID, linewidth=6, zorder=1, solid_capstyle="round")
            for curve in shown:
                style = styles[curve.label]
                _draw_spread(ax, curve.points, style, _sparsity_depth)
                ax.plot(
                    [_sparsity_depth(p) for p in curve.on_the_way],
                    [100 * p.accuracy.mean for p in curve.on_the_way],
                    linestyle="",
                    marker=style.marker,
                    markersize=3.2,
                    markerfacecolor=PAPER,
                    markeredgecolor=style.colour,
                    markeredgewidth=0.8,
                    zorder=2,
                )
                on_front = [p for p in curve.points if id(p) in front and len(curves.front) > 1]
                ax.plot(
                    [_sparsity_depth(p) for p in on_front],
                    [100 * p.accuracy.mean for p in on_front],
                    linestyle="",
                    marker="o",
                    markersize=9,
                    markerfacecolor="none",
                    markeredgecolor=INK,
                    markeredgewidth=0.8,
                    zorder=5,
                )
            _set_sparsity_axis(ax, shown)
            ax.set_ylabel(f"{curves.judged_on} accuracy, %")
            if number == 1:
                ax.set_ylim(100 * floor, 100 * (top + 0.004))
                ax.set_title("Within 5 points of dense")
            elif is_zoomed:
                ax.set_title("All")
        return figure

    return Drawing(draw, f"{salt}-accuracy")


def plot_tradeoffs(curves: WorkloadCurves, styles: dict[str, Style], salt: str) -> Drawing:
    """Plots accuracy against compression and against the theoretical speed-up."""
    shown = _most_telling(curves)
    measures = {"compression, parameters before / left": _compression_depth}
    if all(trial.dense.macs > 0 for trial in curves.trials):
        measures["speed-up in theory, multiply-adds before / left"] = _speedup_depth
    legend = [*_curve_handles(shown, styles), _dense_handle()]

    def draw(is_narrow: bool) -> Figure:
        figure, axes = add_panels(
            len(measures), is_narrow, legend, height_in=2.6, num_columns=2, has_titles=False
        )
        for ax, (name, measure) in zip(axes, measures.items(), strict=True):
            _draw_dense(ax, curves)
            for curve in shown:
                _draw_spread(ax, curve.points, styles[curve.label], measure)
            high = max(measure(point) for curve in shown for point in curve.points)
            high = max(1, math.ceil(high - 0.05))
            ticks = list(range(0, high + 1, max(1, math.ceil(high / 7))))
            ax.set_xticks(ticks, [f"{2**tick:,}x" for tick in ticks])
            ax.set_xlim(-0.05 * high, high * 1.05)
            ax.set_xlabel(name)
            ax.set_ylabel(f"{curves.judged_on} accuracy, %")
        return figure

    return Drawing(draw, f"{salt}-tradeoffs")


def plot_rounds(
    curves: WorkloadCurves, targets: Sequence[float], styles: dict[str, Style], salt: str
) -> Drawing | None:
    """Plots accuracy and loss over the rounds, for some sparsities; None where none has two."""
    panels = [
        (target, [(c, point) for c in _most_telling(curves) if (point := c.at(target))])
        for target in targets
    ]
    shown = list({id(c): c for _, pairs in panels for c, _ in pairs}.values())
    if max(len(t.rounds) for _, ps in panels for _, p in ps for t in p.trials) < 3:
        return None
    legend = _curve_handles(shown, styles)

    def draw(is_narrow: bool) -> Figure:
        figure, axes = add_panels(2 * len(panels), is_narrow, legend, height_in=2.0, num_columns=2)
        for number, (target, pairs) in enumerate(panels):
            for ax, measure, dotted, scale in (
                (axes[2 * number], "accuracy", "accuracy_pruned", 100),
                (axes[2 * number + 1], "loss", "train_loss", 1),
            ):
                for curve, point in pairs:
                    _draw_rounds(ax, point, styles[curve.label], measure, scale, is_dotted=False)
                    _draw_rounds(ax, point, styles[curve.label], dotted, scale, is_dotted=True)
                last = max(len(t.rounds) for _, point in pairs for t in point.trials) - 1
                ticks = range(0, last + 1, max(1, math.ceil(last / 8)))
                ax.set_xticks(list(ticks), ["dense" if tick == 0 else str(tick) for tick in ticks])
                ax.set_title(f"To sparsity {_percent(target)}")
                ax.set_xlabel("round")
                what = "accuracy, %" if scale == 100 else "loss"
                ax.set_ylabel(f"{curves.judged_on} {what}")
        return figure

    return Drawing(draw, f"{salt}-rounds")


# -- close-ups -------------------------------------------------------------------------------------


def plot_layers(close_ups: Sequence[CloseUp], styles: dict[str, Style], salt: str) -> Drawing:
    """Plots the sparsity of each layer, one panel per sparsity of the whole."""
    names = list(close_ups[0].layers)
    labels = list(
        dict.fromkeys(
            label for c in close_ups for spreads in c.layers.values() for label in spreads
        )
    )
    legend = [(make_handle(styles[label]), label) for label in labels]
    stride = math.ceil(len(names) / _MOST_LAYER_NAMES)
    is_lines = len(names) > _MOST_LAYER_NAMES
    height = 0.25 + max(0.9, 0.2 * min(len(names), _MOST_LAYER_NAMES + 10))
    ends_alike = all(name.endswith(".weight") for name in names)

    def draw(is_narrow: bool) -> Figure:
        width = 17 if is_narrow else 24
        texts = [
            shorten_name(name.removesuffix(".weight") if ends_alike else name, width)
            for name in names
        ]
        left = 0.25 + 0.068 * max(len(text) for text in texts)
        figure, axes = add_panels(
            len(close_ups),
            is_narrow,
            legend,
            height_in=height,
            num_columns=len(close_ups),
            left_in=left,
            is_shared_left=True,
        )
        for ax, close_up in zip(axes, close_ups, strict=True):
            for number, label in enumerate(labels):
                style = styles[label]
                rows = [(y, s[label]) for y, s in enumerate(close_up.layers.values()) if label in s]
                nudge = 0 if is_lines else 0.5 * ((number + 0.5) / len(labels) - 0.5)
                ax.plot(
                    [100 * spread.mean for _, spread in rows],
                    [y + nudge for y, _ in rows],
                    color=style.colour,
                    marker=style.marker,
                    markersize=2.5 if is_lines else 4.2,
                    linestyle=style.dash if is_lines else "",
                    linewidth=0.9,
                )
            ax.set_ylim(len(names) - 0.4, -0.6)
            ax.set_xlim(-3, 103)
            ax.set_xticks([0, 25, 50, 75, 100])
            is_first = ax is axes[0] or is_narrow
            ax.set_yticks(range(0, len(names), stride), texts[::stride] if is_first else [])
            ax.set_title(f"Sparsity {_percent(close_up.target)}")
            ax.set_xlabel("layer's sparsity, %")
        return figure

    return Drawing(draw, f"{salt}-layers")


def plot_overlaps(close_ups: Sequence[CloseUp], salt: str) -> Drawing:
    """Plots the overlap of masks between curves, and between seeds on the diagonal."""
    found = (name for c in close_ups for item in c.overlaps for name in (item.one, item.other))
    labels = list(dict.fromkeys(found))

    def draw(is_narrow: bool) -> Figure:
        width = 15 if is_narrow else 22
        texts = [f"{shorten_name(label, width)}  {i + 1}" for i, label in enumerate(labels)]
        left = 0.25 + 0.068 * max(len(text) for text in texts)
        columns = len(close_ups) if len(labels) <= 5 else 1
        cell = 0.42 if columns > 1 or is_narrow else 0.5
        figure, axes = add_panels(
            len(close_ups),
            is_narrow,
            [],
            height_in=0.3 + max(2, len(labels)) * (0.46 if is_narrow else cell),
            num_columns=columns,
            left_in=left,
            is_shared_left=columns > 1,
        )
        for ax, close_up in zip(axes, close_ups, strict=True):
            values = np.full((len(labels), len(labels)), np.nan)
            for item in close_up.overlaps:
                pair = labels.index(item.one), labels.index(item.other)
                values[pair] = values[pair[::-1]] = item.overlap.mean
            ax.grid(visible=False)
            ax.pcolormesh(values, cmap="cividis", vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
            for (y, x), value in np.ndenumerate(values):
                if math.isfinite(value):
                    colour = "#0a0a0a" if value > 0.55 else "#fafafa"
                    text = f"{100 * value:.0f}"
                    ax.text(
                        x + 0.5, y + 0.5, text, ha="center", va="center", color=colour, fontsize=8
                    )
            for side in ("left", "bottom"):
                ax.spines[side].set_visible(False)
            ax.tick_params(length=0)
            ax.invert_yaxis()
            numbers = np.arange(len(labels)) + 0.5
            is_first = ax is axes[0] or is_narrow or columns == 1
            ax.set_yticks(numbers, texts if is_first else [f"{i + 1}" for i in range(len(labels))])
            ax.set_xticks(numbers, [f"{i + 1}" for i in range(len(labels))])
            ax.set_title(f"Sparsity {_percent(close_up.target)}, overlap in %")
        return figure

    return Drawing(draw, f"{salt}-overlaps")


def plot_cost(curves: WorkloadCurves, targets: Sequence[float], salt: str) -> Drawing | None:
    """Plots worker-seconds by phase for each point; None where none are on record."""
    pairs = [(curve, point) for curve in curves.curves for point in curve.points]
    if len(pairs) > _MOST_BARS:
        pairs = [(curve, point) for curve, point in pairs if point.target in targets]
    pairs = [(curve, point) for curve, point in pairs if point.phases][:_MOST_BARS]
    if not pairs:
        return None
    totals: dict[str, float] = {}
    for _, point in pairs:
        for phase, seconds in point.phases.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    phases = sorted(totals, key=lambda phase: -totals[phase])
    fills = [
        (SERIES[i % len(SERIES)] if i < len(SERIES) else QUIET, _HATCHES[i % len(_HATCHES)])
        for i in range(len(phases))
    ]
    legend = [
        (Patch(facecolor=colour, hatch=hatch, edgecolor=PAPER), phase)
        for phase, (colour, hatch) in zip(phases, fills, strict=True)
    ]
    longest = max(sum(point.phases.values()) for _, point in pairs)

    def draw(is_narrow: bool) -> Figure:
        width = 14 if is_narrow else 30
        texts = [f"{shorten_name(c.label, width)} {_percent(p.target)}" for c, p in pairs]
        left = 0.2 + 0.068 * max(len(text) for text in texts)
        figure, (ax,) = add_panels(
            1,
            is_narrow,
            legend,
            height_in=0.2 + max(3, len(pairs)) * 0.19,
            num_columns=1,
            left_in=left,
            has_titles=False,
        )
        starts = np.zeros(len(pairs))
        for phase, (colour, hatch) in zip(phases, fills, strict=True):
            seconds = np.array([point.phases.get(phase, 0.0) for _, point in pairs])
            ax.barh(
                range(len(pairs)),
                seconds,
                left=starts,
                height=0.72,
                color=colour,
                hatch=hatch,
                edgecolor=PAPER,
                linewidth=0.4,
            )
            starts += seconds
        for y, total in enumerate(starts):
            ax.text(total + 0.01 * longest, y, f"{total:,.3g}", va="center", fontsize=7)
        ax.grid(visible=False, axis="y")
        ax.set_yticks(range(len(pairs)), texts)
        ax.set_ylim(len(pairs) - 0.4, -0.6)
        ax.set_xlim(0, longest * (1.16 if is_narrow else 1.08))
        ax.xaxis.set_major_locator(MaxNLocator(4 if is_narrow else 8))
        ax.set_xlabel("worker-seconds")
        return figure

    return Drawing(draw, f"{salt}-cost")


# -- pieces ----------------------------------------------------------------------------------------


def _draw_spread(
    ax: Axes, points: Sequence[Point], style: Style, measure: Callable[[Point], float]
) -> None:
    ax.errorbar(
        [measure(point) for point in points],
        [100 * point.accuracy.mean for point in points],
        # Without caps, so that there is nothing to see where one seed has no deviation.
        yerr=[100 * (point.accuracy.deviation or 0.0) for point in points],
        color=style.colour,
        marker=style.marker,
        linestyle=style.dash,
        elinewidth=0.9,
        zorder=3,
    )


def _draw_rounds(
    ax: Axes, point: Point, style: Style, measure: str, scale: int, *, is_dotted: bool
) -> None:
    x, means, low, high = [], [], [], []
    for number in range(max(len(trial.rounds) for trial in point.trials)):
        # The dense network's are those that the others are compared with.
        rounds = [t.rounds[number] for t in point.trials if number < len(t.rounds)]
        sources = [r.reference if r.round == 0 and not is_dotted else r for r in rounds]
        values = [
            scale * value
            for source in sources
            if (value := getattr(source, measure)) is not None and math.isfinite(value)
        ]
        if values:
            mean = float(np.mean(values))
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            x.append(number)
            means.append(mean)
            low.append(mean - deviation)
            high.append(mean + deviation)
    if is_dotted:
        ax.plot(x, means, color=style.colour, linestyle=":", linewidth=0.9)
        return
    ax.plot(x, means, color=style.colour, marker=style.marker, linestyle=style.dash, markersize=3.8)
    ax.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)


def _draw_dense(ax: Axes, curves: WorkloadCurves) -> None:
    mean, deviation = 100 * curves.dense.mean, 100 * (curves.dense.deviation or 0.0)
    ax.axhline(mean, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if deviation:
        ax.axhspan(mean - deviation, mean + deviation, color=QUIET, alpha=0.18, linewidth=0)


def _set_sparsity_axis(ax: Axes, shown: Sequence[Curve]) -> None:
    values = [
        point.sparsity.mean for curve in shown for point in (*curve.points, *curve.on_the_way)
    ]
    low, high = _depth(min(values)), _depth(max(values))
    room = max(high - low, 0.4)
    low, high = max(0.0, low - 0.08 * room), high + 0.08 * room
    ticks: list[float] = []
    for tick in _TICKS:
        place = _depth(tick)
        room = (high - low) / 7
        if low <= place <= high and all(abs(place - _depth(other)) > room for other in ticks):
            ticks.append(tick)
    if not ticks:
        ticks = [round(float(np.mean(values)), 4)]
    ax.set_xlim(low, high)
    ax.set_xticks([_depth(tick) for tick in ticks], [_percent(tick) for tick in ticks])
    ax.set_xlabel("sparsity (axis: halvings of the weights left)")


def _curve_handles(curves: Sequence[Curve], styles: dict[str, Style]) -> list[tuple[Any, str]]:
    if len(curves) <= NUM_STYLED:
        return [(make_handle(styles[curve.label]), curve.label) for curve in curves]
    counts: dict[str, int] = {}
    for curve in curves:
        counts[curve.criterion] = counts.get(curve.criterion, 0) + 1
    handles = {curve.criterion: make_handle(styles[curve.label]) for curve in curves}
    return [
        (handles[name], name if number == 1 else f"{name} ({number} curves)")
        for name, number in counts.items()
    ]


def _accuracy_handles(curves: WorkloadCurves, shown: Sequence[Curve]) -> list[tuple[Any, str]]:
    handles = [_dense_handle()]
    if len(curves.front) > 1:
        ring = Line2D(
            [], [], color=GRID, linewidth=5, marker="o", markersize=8,
            markerfacecolor="none", markeredgecolor=INK,
        )  # fmt: skip
        handles.append((ring, "Pareto front"))
    if any(curve.on_the_way for curve in shown):
        hollow = Line2D(
            [], [], linestyle="", marker="o", markersize=3.2,
            markerfacecolor=PAPER, markeredgecolor=INK,
        )  # fmt: skip
        handles.append((hollow, "round on the way"))
    return handles


def _dense_handle() -> tuple[Any, str]:
    return Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (1, 2))), "dense"


def _most_telling(curves: WorkloadCurves) -> list[Curve]:
    """Keeps the curves on the front and those with most points, in their order."""
    if len(curves.curves) <= _MOST_CURVES:
        return curves.curves
    on_front = {id(curve) for curve, _ in curves.front}
    ranked = sorted(curves.curves, key=lambda c: (id(c) not in on_front, -len(c.points)))
    kept = {id(curve) for curve in ranked[:_MOST_CURVES]}
    return [curve for curve in curves.curves if id(curve) in kept]


def _sparsity_depth(point: Point) -> float:
    return _depth(point.sparsity.mean)


def _compression_depth(point: Point) -> float:
    return math.log2(point.compression.mean)


def _speedup_depth(point: Point) -> float:
    return math.log2(point.speedup.mean)


def _depth(sparsity: float) -> float:
    """Counts how often the weights were halved."""
    return -math.log2(max(1.0 - sparsity, 1e-9))


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
