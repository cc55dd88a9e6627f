"""The figures of whole units: the network as a picture, widths before and after, which units live.

The picture has a bar for each group of units from the input, top, to the output: as wide as the
dense network in grey, as wide as what is left on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from gbp_ray.report.curves import WorkloadCurves
from gbp_ray.report.details import CloseUp
from gbp_ray.report.drawing import (
    GRID,
    INK,
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

__all__ = [
    "Width",
    "draw_networks",
    "draw_units",
    "draw_widths",
    "find_living",
    "pick_networks",
]

_MOST_NAMES, _ROW_IN, _MOST_NETWORKS = 40, 0.2, 4


@dataclass(frozen=True)
class Width:
    """Units of a group, before and after.

    Attributes:
        name: First weight that makes them.
        kind: "channel" or "head"; bars of one kind are on one scale.
        kept: A mean where there are several seeds.
    """

    name: str
    kind: str
    num_units: int
    kept: float


def pick_networks(
    curves: WorkloadCurves, close_ups: Sequence[CloseUp]
) -> list[tuple[str, list[Width]]]:
    """Picks for each target the curve with the best score, and gives its widths with a title."""
    networks = []
    for close_up in close_ups[-_MOST_NETWORKS:]:
        labels = {label for spreads in close_up.widths.values() for label in spreads}
        points = [(c.label, p) for c in curves.curves if (p := c.at(close_up.target))]
        points = [pair for pair in points if pair[0] in labels]
        if not points:
            continue
        best = max(points, key=lambda pair: curves.rank(pair[1]))[0]
        widths = [
            Width(name, *close_up.dense[name], spreads[best].mean)
            for name, spreads in close_up.widths.items()
            if best in spreads
        ]
        title = curves.name_target(close_up.target)
        several = len(curves.curves) > 1
        networks.append((f"{title}, {shorten_name(best, 24)}" if several else title, widths))
    return networks


def draw_networks(networks: Sequence[tuple[str, Sequence[Width]]]) -> list[Axes]:
    """Draw the network before and after, a panel for each title with its widths."""
    panels: list[Axes] = []
    legend = [(Patch(facecolor=GRID), "dense"), (Patch(facecolor=SERIES[0]), "left")]
    for title, widths in networks:
        texts = list_names([width.name for width in widths], 17)
        ax = add_panel(
            0.15 + _ROW_IN * max(3, min(len(widths), _MOST_NAMES + 10)),
            title=title,
            legend=() if panels else legend,
            left_in=measure_names(texts),
            foot_in=0.12,
        )
        widest = {w.kind: max(o.num_units for o in widths if o.kind == w.kind) for w in widths}
        rows = range(len(widths))
        dense = [width.num_units / widest[width.kind] for width in widths]
        kept = [width.kept / widest[width.kind] for width in widths]
        for lengths, colour in ((dense, GRID), (kept, SERIES[0])):
            starts = [-length / 2 for length in lengths]
            ax.barh(rows, lengths, left=starts, height=0.78, color=colour, linewidth=0)
        stride = math.ceil(len(widths) / _MOST_NAMES)
        for row in rows[::stride]:
            ax.text(0.54, row, _write_width(widths[row]), va="center", fontsize=7.5, color=INK)
        ax.grid(visible=False)
        set_names(ax, texts, stride)
        ax.set_xlim(-0.52, 0.98)
        ax.set_xticks([])
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        panels.append(ax)
    return panels


def _write_width(width: Width) -> str:
    kept = f"{width.kept:,.0f}" if float(width.kept).is_integer() else f"{width.kept:,.1f}"
    kinds = "" if width.kind == "channel" else f" {width.kind}s"
    return f"{width.num_units:,} → {kept}{kinds}"


def draw_widths(close_ups: Sequence[CloseUp], styles: Mapping[str, Style]) -> list[Axes]:
    """Draw which part of each group's units is left, one panel for each target."""
    names = list(dict.fromkeys(name for close_up in close_ups for name in close_up.widths))
    found = (label for c in close_ups for spreads in c.widths.values() for label in spreads)
    labels = list(dict.fromkeys(found))
    legend = [(make_handle(styles[label]), label) for label in labels]
    is_lines = len(names) > _MOST_NAMES
    texts = list_names(names, 17)
    panels: list[Axes] = []
    for close_up in close_ups:
        ax = add_panel(
            0.25 + max(0.9, _ROW_IN * min(len(names), _MOST_NAMES + 10)),
            title=str(close_up.goal),
            legend=() if panels else legend,
            left_in=measure_names(texts),
        )
        for number, label in enumerate(labels):
            rows = [
                (100 * spreads[label].mean / max(1, close_up.dense[name][1]), place)
                for place, name in enumerate(names)
                if label in (spreads := close_up.widths.get(name, {}))
            ]
            place_of_curve = (number + 0.5) / len(labels)
            plot_percents(ax, rows, styles[label], place_of_curve, is_line=is_lines)
        set_names(ax, texts, math.ceil(len(names) / _MOST_NAMES))
        set_percents(ax, "units left, %")
        panels.append(ax)
    return panels


def find_living(mask: np.ndarray, num_units: int, num_kept: int) -> np.ndarray | None:
    """Finds which positions of a group's first weight live, along the axis that makes the units.

    Args:
        mask: Of that weight, True where it is kept.

    Returns:
        Bool, in the weight's order; None if no axis has as many living positions as the group.
    """
    for axis in range(min(2, mask.ndim)):
        living = np.any(np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1), axis=1)
        if int(living.sum()) * num_units == num_kept * living.size:
            return np.asarray(living)
    return None


def draw_units(living: Mapping[str, np.ndarray]) -> list[Axes]:
    """Draw a strip for each group, with a cell for each unit: coloured where it lives."""
    texts = list_names(list(living), 18)
    legend = [(Patch(facecolor=SERIES[0]), "lives"), (Patch(facecolor=GRID), "removed")]
    ax = add_panel(
        0.3 + _ROW_IN * max(3, min(len(texts), _MOST_NAMES + 10)),
        legend=legend,
        left_in=measure_names(texts),
    )
    for row, lives in enumerate(living.values()):
        ax.broken_barh([(0, 100)], (row - 0.36, 0.72), facecolor=GRID)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], lives.astype(np.int8), [0]))))
        runs = edges.reshape(-1, 2) * (100 / lives.size)
        ax.broken_barh(
            [(start, stop - start) for start, stop in runs.tolist()],
            (row - 0.36, 0.72),
            facecolor=SERIES[0],
        )
    ax.grid(visible=False)
    set_names(ax, texts, math.ceil(len(texts) / _MOST_NAMES))
    ax.set_xlim(0, 100)
    ax.set_xticks([0, 25, 50, 75, 100])
    ax.set_xlabel("units in the weight's order, %")
    return [ax]
