"""The report's figures: scores, rounds, layers, overlaps and cost of one workload's curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gbp_ray.config.metrics import MetricSpec
from gbp_ray.report.curves import Curve, Point, WorkloadCurves
from gbp_ray.report.details import CloseUp
from gbp_ray.report.drawing import (
    GRID,
    INK,
    NUM_STYLED,
    PAPER,
    QUIET,
    SERIES,
    Style,
    add_panel,
    list_names,
    make_handle,
    measure_names,
    plot_percents,
    set_names,
    set_percents,
    shorten_name,
)
from gbp_ray.results.goals import COSTS, Goal

__all__ = [
    "draw_cost",
    "draw_layers",
    "draw_overlaps",
    "draw_rounds",
    "draw_scores",
    "draw_tradeoffs",
]

_TICKS = (0.9, 0.5, 0.99, 0.8, 0.95, 0, 0.999, 0.98, 0.7, 0.995, 0.9999, 0.3, 0.998, 0.6, 0.1)
"""Sparsities worth a tick, the most wanted first."""

_HATCHES = ("", "///", "\\\\\\", "xx", "---", "|||", "++", "//")
_MANY_TIMES = 20
_MOST_CURVES, _MOST_LAYER_NAMES, _MOST_BARS = 60, 40, 40


# -- scores ----------------------------------------------------------------------------------------


def draw_scores(curves: WorkloadCurves, styles: dict[str, Style]) -> list[Axes]:
    """Draw the metric against sparsity, or what is left: all, and what is close to dense."""
    shown, metric, measure = _most_telling(curves), curves.metric, curves.measure
    sign = 1 if metric.higher_is_better else -1
    ranks = [rank for c in shown for p in c.points if math.isfinite(rank := curves.rank(p))]
    dense = metric.rank(curves.dense.mean)
    ranks += [dense] * math.isfinite(dense)
    # Five points of a share, or five percent of another value.
    whole = 1.0 if metric.unit == "%" else abs(dense)
    top, floor = max(ranks, default=0.0), dense - 0.05 * whole
    legend = [*_curve_handles(shown, styles), *_score_handles(curves, shown)]
    if not (min(ranks, default=0.0) < floor - 0.05 * whole and top > floor):
        panels = [add_panel(2.6, legend=legend)]
    else:
        close = "5 points" if metric.unit == "%" else "5 %"
        panels = [
            add_panel(2.6, title="All", legend=legend),
            add_panel(2.6, title=f"Within {close} of dense"),
        ]
        ends = sorted(sign * metric.scale * end for end in (floor, top + 0.004 * whole))
        panels[1].set_ylim(*ends)
    _set_scale(panels[0], curves, ranks)
    front = [point for _, point in curves.front] if len(curves.front) > 1 else []
    for ax in panels:
        _draw_dense(ax, curves)
        _draw_front(ax, front, metric, measure)
        for curve in shown:
            style = styles[curve.label]
            _draw_spread(ax, curve.points, style, metric, _depth_by(measure))
            ax.plot(
                *_place_all(curve.on_the_way, metric, measure),
                linestyle="",
                marker=style.marker,
                markersize=3.2,
                markerfacecolor=PAPER,
                markeredgecolor=style.colour,
                markeredgewidth=0.8,
                zorder=2,
            )
        _set_depth_axis(ax, shown, measure)
        ax.set_ylabel(f"{curves.judged_on} {metric.label}")
    return panels


def draw_tradeoffs(curves: WorkloadCurves, styles: dict[str, Style]) -> list[Axes]:
    """Draw the metric against compression and the theoretical speed-up, or the other costs."""
    shown = _most_telling(curves)
    if curves.has_units:
        return _draw_costs_left(curves, shown, styles)
    measures = {"compression, parameters before / left": _compression_depth}
    if all(trial.dense.macs > 0 for trial in curves.trials):
        measures["speed-up in theory, multiply-adds before / left"] = _speedup_depth
    legend = [*_curve_handles(shown, styles), _dense_handle()]
    panels: list[Axes] = []
    for name, measure in measures.items():
        ax = add_panel(2.4, legend=() if panels else legend)
        _draw_dense(ax, curves)
        for curve in shown:
            _draw_spread(ax, curve.points, styles[curve.label], curves.metric, measure)
        _set_scale(ax, curves, [curves.rank(p) for c in shown for p in c.points])
        high = max(measure(point) for curve in shown for point in curve.points)
        high = max(1, math.ceil(high - 0.05))
        ticks = list(range(0, high + 1, max(1, math.ceil(high / 7))))
        ax.set_xticks(ticks, [f"{2**tick:,}x" for tick in ticks])
        ax.set_xlim(-0.05 * high, high * 1.05)
        ax.set_xlabel(name)
        ax.set_ylabel(f"{curves.judged_on} {curves.metric.label}")
        panels.append(ax)
    return panels


def _draw_costs_left(
    curves: WorkloadCurves, shown: Sequence[Curve], styles: dict[str, Style]
) -> list[Axes]:
    """Draw the metric against what is left of each cost that the first figure is not of."""
    panels: list[Axes] = []
    for cost in curves.costs:
        if cost == curves.measure:
            continue
        legend = [*_curve_handles(shown, styles), *_score_handles(curves, ())]
        ax = add_panel(2.4, legend=() if panels else legend)
        _draw_dense(ax, curves)
        front = [point for _, point in curves.find_front(cost)]
        # The legend promises rings, and a front may be one point.
        _draw_front(ax, front if len(curves.front) > 1 else [], curves.metric, cost)
        for curve in shown:
            style = styles[curve.label]
            _draw_spread(ax, curve.points, style, curves.metric, _depth_by(cost))
        _set_scale(ax, curves, [curves.rank(p) for c in shown for p in c.points])
        _set_depth_axis(ax, shown, cost, is_whole=False)
        ax.set_ylabel(f"{curves.judged_on} {curves.metric.label}")
        panels.append(ax)
    return panels


def draw_rounds(
    curves: WorkloadCurves, targets: Sequence[float], styles: dict[str, Style]
) -> list[Axes]:
    """Draw metric and loss over the rounds, for some sparsities; nothing where none has two."""
    by_target = {
        target: [(c, point) for c in _most_telling(curves) if (point := c.at(target))]
        for target in targets
    }
    shown = list({id(c): c for pairs in by_target.values() for c, _ in pairs}.values())
    if max(len(t.rounds) for pairs in by_target.values() for _, p in pairs for t in p.trials) < 3:
        return []
    panels: list[Axes] = []
    for target, pairs in by_target.items():
        for measure, dotted, scale, what in (
            ("score", "score_pruned", curves.metric.scale, curves.metric.label),
            ("loss", "train_loss", 1.0, "loss"),
        ):
            title = f"To {curves.name_target(target)}"
            legend = () if panels else _curve_handles(shown, styles)
            ax = add_panel(1.8, title=title, legend=legend)
            for curve, point in pairs:
                style = styles[curve.label]
                _draw_rounds(ax, point, style, measure, scale, is_dotted=False)
                _draw_rounds(ax, point, style, dotted, scale, is_dotted=True)
            last = max(len(t.rounds) for _, point in pairs for t in point.trials) - 1
            ticks = range(0, last + 1, max(1, math.ceil(last / 8)))
            ax.set_xticks(list(ticks), ["dense" if tick == 0 else str(tick) for tick in ticks])
            ax.set_xlabel("round")
            ax.set_ylabel(f"{curves.judged_on} {what}")
            panels.append(ax)
    return panels


# -- close-ups -------------------------------------------------------------------------------------


def draw_layers(close_ups: Sequence[CloseUp], styles: dict[str, Style]) -> list[Axes]:
    """Draw the sparsity of each layer, one panel per sparsity of the whole."""
    names = list(close_ups[0].layers)
    labels = list(
        dict.fromkeys(
            label for c in close_ups for spreads in c.layers.values() for label in spreads
        )
    )
    legend = [(make_handle(styles[label]), label) for label in labels]
    is_lines = len(names) > _MOST_LAYER_NAMES
    height = 0.25 + max(0.9, 0.2 * min(len(names), _MOST_LAYER_NAMES + 10))
    texts = list_names(names, 17)
    panels: list[Axes] = []
    for close_up in close_ups:
        ax = add_panel(
            height,
            title=_capitalize(str(close_up.goal)),
            legend=() if panels else legend,
            left_in=measure_names(texts),
        )
        for number, label in enumerate(labels):
            rows = [
                (100 * s[label].mean, y)
                for y, s in enumerate(close_up.layers.values())
                if label in s
            ]
            place_of_curve = (number + 0.5) / len(labels)
            plot_percents(ax, rows, styles[label], place_of_curve, is_line=is_lines)
        set_names(ax, texts, math.ceil(len(names) / _MOST_LAYER_NAMES))
        set_percents(ax, "layer's sparsity, %")
        panels.append(ax)
    return panels


def draw_overlaps(close_ups: Sequence[CloseUp]) -> list[Axes]:
    """Draw the overlap of masks between curves, and between seeds on the diagonal."""
    found = (name for c in close_ups for item in c.overlaps for name in (item.one, item.other))
    labels = list(dict.fromkeys(found))
    texts = [f"{shorten_name(label, 15)}  {i + 1}" for i, label in enumerate(labels)]
    panels: list[Axes] = []
    for close_up in close_ups:
        ax = add_panel(
            0.3 + max(2, len(labels)) * 0.4,
            title=f"{_capitalize(str(close_up.goal))}, overlap in %",
            left_in=measure_names(texts),
        )
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
                ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour, fontsize=8)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.tick_params(length=0)
        ax.invert_yaxis()
        numbers = np.arange(len(labels)) + 0.5
        ax.set_yticks(numbers, texts)
        ax.set_xticks(numbers, [f"{i + 1}" for i in range(len(labels))])
        panels.append(ax)
    return panels


def draw_cost(curves: WorkloadCurves, targets: Sequence[float]) -> list[Axes]:
    """Draw worker-seconds by phase for each point; nothing where none are on record."""
    pairs = [(curve, point) for curve in curves.curves for point in curve.points]
    if len(pairs) > _MOST_BARS:
        pairs = [(curve, point) for curve, point in pairs if point.target in targets]
    pairs = [(curve, point) for curve, point in pairs if point.phases][:_MOST_BARS]
    if not pairs:
        return []
    totals: dict[str, float] = {}
    for _, point in pairs:
        for phase, seconds in point.phases.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    phases = sorted(totals, key=lambda phase: -totals[phase])
    bars = [
        Patch(
            facecolor=SERIES[i] if i < len(SERIES) else QUIET,
            hatch=_HATCHES[i % len(_HATCHES)],
            edgecolor=PAPER,
        )
        for i in range(len(phases))
    ]
    longest = max(sum(point.phases.values()) for _, point in pairs)
    texts = [f"{shorten_name(c.label, 14)} {Goal(curves.kind, p.target).amount}" for c, p in pairs]
    ax = add_panel(
        0.2 + max(3, len(pairs)) * 0.19,
        legend=list(zip(bars, phases, strict=True)),
        left_in=measure_names(texts),
    )
    starts = np.zeros(len(pairs))
    for phase, bar in zip(phases, bars, strict=True):
        lengths = np.array([point.phases.get(phase, 0.0) for _, point in pairs])
        ax.barh(
            range(len(pairs)),
            lengths,
            left=starts,
            height=0.72,
            color=bar.get_facecolor(),
            hatch=bar.get_hatch(),
            edgecolor=PAPER,
            linewidth=0.4,
        )
        starts += lengths
    for y, total in enumerate(starts):
        ax.text(total + 0.01 * longest, y, f"{total:,.3g}", va="center", fontsize=7)
    ax.grid(visible=False, axis="y")
    set_names(ax, texts)
    ax.set_xlim(0, longest * 1.16)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("worker-seconds")
    return [ax]


# -- pieces ----------------------------------------------------------------------------------------


def _draw_spread(
    ax: Axes,
    points: Sequence[Point],
    style: Style,
    metric: MetricSpec,
    measure: Callable[[Point], float],
) -> None:
    points = [point for point in points if math.isfinite(point.score.mean)]
    ax.errorbar(
        [measure(point) for point in points],
        [metric.scale * point.score.mean for point in points],
        # Without caps, so that there is nothing to see where one seed has no deviation.
        yerr=[metric.scale * (point.score.deviation or 0.0) for point in points],
        color=style.colour,
        marker=style.marker,
        linestyle=style.dash,
        elinewidth=0.9,
        zorder=3,
    )


def _draw_rounds(
    ax: Axes, point: Point, style: Style, measure: str, scale: float, *, is_dotted: bool
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
    scale = curves.metric.scale
    mean, deviation = scale * curves.dense.mean, scale * (curves.dense.deviation or 0.0)
    if not math.isfinite(mean):
        return
    ax.axhline(mean, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if deviation:
        ax.axhspan(mean - deviation, mean + deviation, color=QUIET, alpha=0.18, linewidth=0)


def _draw_front(ax: Axes, front: Sequence[Point], metric: MetricSpec, measure: str) -> None:
    x, y = _place_all(front, metric, measure)
    ax.plot(x, y, color=GRID, linewidth=6, zorder=1, solid_capstyle="round")
    ax.plot(
        x,
        y,
        linestyle="",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=0.8,
        zorder=5,
    )


def _place_all(
    points: Sequence[Point], metric: MetricSpec, measure: str
) -> tuple[list[float], list[float]]:
    points = [point for point in points if math.isfinite(point.score.mean)]
    depth = _depth_by(measure)
    return [depth(p) for p in points], [metric.scale * p.score.mean for p in points]


def _set_scale(ax: Axes, curves: WorkloadCurves, ranks: Sequence[float]) -> None:
    """Takes a logarithmic axis for errors that grow to many times the dense network's."""
    if not curves.metric.higher_is_better:
        values = [-rank for rank in ranks if math.isfinite(rank)]
        if values and 0 < min(values) < max(values) / _MANY_TIMES:
            ax.set_yscale("log")


def _set_depth_axis(
    ax: Axes, shown: Sequence[Curve], measure: str, *, is_whole: bool = True
) -> None:
    """Sets an axis of halvings; unless it is whole, without the rounds on the way."""
    values = [
        point.removed(measure)
        for curve in shown
        for point in (*curve.points, *(curve.on_the_way if is_whole else ()))
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
    shares = ticks if measure == "sparsity" else [1 - tick for tick in ticks]
    ax.set_xticks([_depth(tick) for tick in ticks], [_percent(share) for share in shares])
    ax.set_xlabel(
        "sparsity (axis: halvings of the weights left)"
        if measure == "sparsity"
        else f"{COSTS[measure]} left (axis: halvings)"
    )


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


def _score_handles(curves: WorkloadCurves, shown: Sequence[Curve]) -> list[tuple[Any, str]]:
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


def _depth_by(measure: str) -> Callable[[Point], float]:
    return lambda point: _depth(point.removed(measure))


def _compression_depth(point: Point) -> float:
    return math.log2(point.compression.mean)


def _speedup_depth(point: Point) -> float:
    return math.log2(point.speedup.mean)


def _depth(sparsity: float) -> float:
    """Counts how often the weights were halved."""
    return -math.log2(max(1.0 - sparsity, 1e-9))


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
