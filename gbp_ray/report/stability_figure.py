"""The figure of `gbp-ray stability`: overlap against examples, scores, layers, seeds.

Drawn from plain values, as `Stability.to_dict` gives them and `stability.json` holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.report.drawing import (
    INK,
    QUIET,
    SERIES,
    Style,
    add_panel,
    list_names,
    make_handle,
)

__all__ = [
    "draw_stability",
]

_MARKERS = ("o", "^", "D", "v", "P", "*")
_MOST_NAMES = 14


def draw_stability(found: Mapping[str, Any]) -> list[Axes]:
    """Draw how the masks agree over samples of each size, and by layer; then over seeds."""
    samples: Mapping[str, Any] = found["samples"]
    styles = {
        name: Style(SERIES[i % len(SERIES)], _MARKERS[i % len(_MARKERS)], "-")
        for i, name in enumerate(samples)
    }
    legend: list[tuple[Any, str]] = [(make_handle(styles[name]), name) for name in samples]
    if samples:
        chance = Line2D([], [], color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)))
        legend.append((chance, "at random"))
    if found["seeds"]:
        cross = Line2D([], [], color=INK, linestyle="", marker="x", markersize=4)
        legend.append((cross, "trained, over seeds"))
    panels = []
    if samples:
        panels.append(add_panel(2.4, title="Masks of two samples", legend=legend))
        _draw_overlaps(panels[0], samples, styles, found["stable"])
        metric = MetricSpec.model_validate(found.get("metric", ACCURACY))
        if any(size[metric.name]["num"] for one in samples.values() for size in one["sizes"]):
            title = f"{metric.title} under the mask, not fine-tuned"
            panels.append(add_panel(2.4, title=title))
            _draw_scores(panels[1], samples, styles, metric)
    title, legend = "By layer, with most examples", [] if panels else legend
    panels.append(add_panel(2.4, title=title, legend=legend, foot_in=1.3))
    _draw_layers(panels[-1], found, styles)
    return panels


def _draw_overlaps(
    ax: Axes, samples: Mapping[str, Any], styles: Mapping[str, Style], stable: float
) -> None:
    for name, one in samples.items():
        # All the data are the same in each sample, which says nothing about sampling.
        sizes = [size for size in one["sizes"] if not size["is_whole"]]
        x = [size["examples"] for size in sizes]
        overlaps = [size["overlap"] for size in sizes]
        style = styles[name]
        ax.fill_between(
            x,
            [100 * o["least"] for o in overlaps],
            [100 * o["greatest"] for o in overlaps],
            color=style.colour,
            alpha=0.18,
            linewidth=0,
        )
        ax.plot(x, [100 * o["mean"] for o in overlaps], color=style.colour, marker=style.marker)
        ax.plot(
            x,
            [100 * o["chance"] for o in overlaps],
            color=style.colour,
            linewidth=0.9,
            linestyle=(0, (1, 2)),
        )
    ax.axhline(100 * stable, color=INK, linewidth=0.7, linestyle=(0, (6, 2)))
    ax.set_ylim(0, 102)
    _set_examples(ax, samples)
    ax.set_ylabel("overlap of two samples, %")


def _draw_scores(
    ax: Axes, samples: Mapping[str, Any], styles: Mapping[str, Style], metric: MetricSpec
) -> None:
    for name, one in samples.items():
        sizes = [size for size in one["sizes"] if size[metric.name]["num"]]
        mean = [metric.scale * size[metric.name]["mean"] for size in sizes]
        ax.errorbar(
            [size["examples"] for size in sizes],
            mean,
            yerr=[metric.scale * (size[metric.name]["deviation"] or 0.0) for size in sizes],
            color=styles[name].colour,
            marker=styles[name].marker,
            capsize=2,
            linewidth=1.2,
        )
    _set_examples(ax, samples)
    ax.set_ylabel(metric.label)


def _set_examples(ax: Axes, samples: Mapping[str, Any]) -> None:
    ticks = sorted({size["examples"] for one in samples.values() for size in one["sizes"]})
    ax.set_xscale("log", base=2)
    ax.minorticks_off()
    ticks = ticks[:: max(1, len(ticks) // 6)]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set_xlabel("calibration examples")


def _draw_layers(ax: Axes, found: Mapping[str, Any], styles: Mapping[str, Style]) -> None:
    series = {
        styles[name]: one["sizes"][-1]["overlap"]["by_layer"]
        for name, one in found["samples"].items()
    }
    if found["seeds"]:
        series[Style(INK, "x", "")] = found["seeds"]["overlap"]["by_layer"]
    names = list(next(iter(series.values())))
    for (colour, marker, _), by_layer in series.items():
        values = [100 * by_layer[name] for name in names]
        ax.plot(range(len(names)), values, linestyle="", color=colour, marker=marker, markersize=4)
    stride = -(-len(names) // _MOST_NAMES) or 1
    ax.set_xticks(range(0, len(names), stride), list_names(names, 16)[::stride])
    ax.tick_params("x", rotation=90, labelsize=7)
    ax.set_ylim(0, 102)
    ax.set_ylabel("overlap, %")
