"""The figures of a trial's page: living weights by layer, saliency, filters, classes, examples.

Colours are those of `drawing`; shades are cividis and PuOr, which colour-blind readers can follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from gbp_ray.report.curves import spread_out
from gbp_ray.report.drawing import (
    GRID,
    INK,
    QUIET,
    SERIES,
    Style,
    add_panel,
    list_names,
    make_handle,
    measure_names,
    set_names,
    shorten_name,
)
from gbp_ray.results.findings import Findings

__all__ = [
    "draw_classes",
    "draw_examples",
    "draw_first_filters",
    "draw_kept_links",
    "draw_living",
    "draw_saliency",
    "look_at_links",
]

_MOST_LAYERS, _MOST_PANELS, _MOST_CELLS, _MOST_FILTERS = 40, 12, 96, 64
_MOST_CLASSES, _FILTERS_PER_ROW = 40, 8
_DOT, _OTHER_DOT = Style(SERIES[0], "o", ""), Style(SERIES[1], "^", "")


def draw_living(masks: Mapping[str, np.ndarray]) -> list[Axes]:
    """Draw by layer which share of weights, filters and input channels live."""
    shown = spread_out(list(masks), _MOST_LAYERS)
    links = [look_at_links(masks[name]) for name in shown]
    rows = [
        (np.any(link, axis=1).mean(), np.any(link, axis=0).mean(), link.mean()) for link in links
    ]
    styles = {
        "filters that live": _DOT,
        "input channels that live": _OTHER_DOT,
        "weights kept": Style(INK, "D", ""),
    }
    ax = _draw_rows(list_names(shown, 18), [[100 * v for v in row] for row in rows], styles)
    ax.set_xlim(-3, 103)
    ax.set_xlabel("% of the layer")
    return [ax]


def draw_kept_links(masks: Mapping[str, np.ndarray]) -> list[Axes]:
    """Draw for some layers which filter still reads which input channel."""
    panels = []
    for name in spread_out(list(masks), _MOST_PANELS):
        links = look_at_links(masks[name])
        filters, inputs = np.any(links, axis=1).sum(), np.any(links, axis=0).sum()
        title = shorten_name(name.removesuffix(".weight"), 22)
        counts = f"{filters}/{links.shape[0]} f, {inputs}/{links.shape[1]} in"
        ax = add_panel(
            1.2,
            title=f"{title}\n{counts}",
            title_size=7.5,
            width_in=1.72,
            left_in=0.5,
            foot_in=0.4,
        )
        ax.grid(visible=False)
        ax.imshow(
            _shrink(links),
            cmap="cividis",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="none",
            extent=(0, links.shape[1], links.shape[0], 0),
        )
        ax.set_xlabel("input channel", fontsize=7)
        ax.set_ylabel("filter", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.locator_params(nbins=4, integer=True)
        panels.append(ax)
    return panels


def draw_saliency(found: Findings) -> list[Axes]:
    """Draw the mean saliency of a layer's weights: dense, and those kept after the pruning."""
    shown = spread_out(found.layers, _MOST_LAYERS)
    rows = [
        [
            layer.dense_all / layer.num_weights,
            layer.dense_kept / max(1, layer.num_kept),
            layer.pruned / max(1, layer.num_kept),
        ]
        for layer in shown
    ]
    styles = {
        "dense, all weights": Style(QUIET, "s", ""),
        "dense, those kept": _DOT,
        "pruned, those kept": _OTHER_DOT,
    }
    # None of zero can be seen on this axis.
    rows = [[value if value > 0 else math.nan for value in row] for row in rows]
    ax = _draw_rows(list_names([layer.name for layer in shown], 18), rows, styles, is_joined=True)
    ax.set_xscale("log")
    ax.minorticks_off()
    # matplotlib would write powers as mathematics, which the page does not render.
    ax.xaxis.set_major_formatter(lambda value, place: f"{value:.0e}")
    ax.set_xlabel(f"mean saliency of a weight, {found.criterion}")
    return [ax]


def draw_first_filters(dense: np.ndarray, pruned: np.ndarray, mask: np.ndarray) -> list[Axes]:
    """Draw the first layer's filters, dense and pruned; nothing where they are not 2-D."""
    if dense.ndim != 4 or max(dense.shape[2:]) < 2:
        return []
    shown = spread_out(list(range(len(dense))), _MOST_FILTERS)
    scale = max(float(np.abs(dense).max()), float(np.abs(pruned).max()), 1e-12)
    per_row = min(len(shown), _FILTERS_PER_ROW)
    height = 0.16 + math.ceil(len(shown) / per_row) * (3.0 / per_row)
    panels = []
    for values, title in ((dense, "Dense"), (pruned, "Pruned; removed weights are grey")):
        # Three channels are shown as colour, in which grey is a weight of zero.
        is_marked = values is pruned and dense.shape[1] != 3
        tiles = [_paint_filter(values[i], scale, mask[i] if is_marked else None) for i in shown]
        panels.append(_show_mosaic(tiles, per_row, height, title))
    return panels


def draw_classes(found: Findings) -> list[Axes]:
    """Draw the accuracy of each class, dense and pruned, the most hurt first."""
    rows = [
        (item, [100 * n / item.num_examples for n in (item.num_right_dense, item.num_right_pruned)])
        for item in found.classes
    ]
    rows.sort(key=lambda row: row[1][1] - row[1][0])
    if len(rows) > _MOST_CLASSES:
        rows = rows[: _MOST_CLASSES // 2] + rows[-_MOST_CLASSES // 2 :]
    texts = [shorten_name(found.name_class(item.label), 18) for item, _ in rows]
    styles = {"dense": _DOT, "pruned": _OTHER_DOT}
    ax = _draw_rows(texts, [values for _, values in rows], styles, is_joined=True)
    ax.set_xlabel("accuracy of the class, %")
    return [ax]


def draw_examples(found: Findings) -> list[Axes]:
    """Draw examples with the saliency of their true class: input, dense map, pruned map."""
    has_maps = len(found.maps_dense) == len(found.maps_pruned) == len(found.images)
    panels = []
    for place, (image, item) in enumerate(zip(found.images, found.examples, strict=False)):
        tiles = [_paint_image(image)]
        if has_maps:
            tiles += [_paint_map(found.maps_dense[place]), _paint_map(found.maps_pruned[place])]
        name, dense, pruned = (
            shorten_name(found.class_names[label], 9)
            if label < len(found.class_names)
            else str(label)
            for label in (item.label, item.answer_dense, item.answer_pruned)
        )
        title = (
            f"is {name}: dense {dense} ({item.confidence_dense:.0%}), "
            f"pruned {pruned} ({item.confidence_pruned:.0%})"
        )
        height = 3.0 * image.shape[0] / image.shape[1] / len(tiles)
        panels.append(_show_mosaic(tiles, len(tiles), height, title))
    return panels


# -- pieces ----------------------------------------------------------------------------------------


def _draw_rows(
    texts: Sequence[str],
    rows: Sequence[Sequence[float]],
    styles: Mapping[str, Style],
    *,
    is_joined: bool = False,
) -> Axes:
    """Draw for each name a row of marks, one a style; a line from the least to the greatest."""
    legend = [(make_handle(style), name) for name, style in styles.items()]
    height = 0.3 + 0.19 * max(4, len(texts))
    ax = add_panel(height, legend=legend, left_in=measure_names(texts))
    for place, values in enumerate(rows):
        known = [value for value in values if math.isfinite(value)]
        if is_joined and known:
            ax.plot([min(known), max(known)], [place] * 2, color=GRID, linewidth=2.2, zorder=1)
    for column, style in zip(zip(*rows, strict=True), styles.values(), strict=True):
        ax.plot(
            column,
            range(len(texts)),
            linestyle="",
            marker=style.marker,
            color=style.colour,
            markersize=4.6,
        )
    set_names(ax, texts)
    return ax


def look_at_links(mask: np.ndarray) -> np.ndarray:
    """Compute the share of weights kept between each input channel and filter: (O, I)."""
    flat = mask.reshape(mask.shape[0], mask.shape[1] if mask.ndim > 1 else 1, -1)
    return np.asarray(flat.mean(axis=2))


def _shrink(values: np.ndarray) -> np.ndarray:
    """Averages neighbours until a side has no more cells than can be told apart."""
    for axis in (0, 1):
        size = values.shape[axis]
        if size > _MOST_CELLS:
            starts = np.linspace(0, size, _MOST_CELLS + 1).astype(int)[:-1]
            counts = np.diff([*starts, size])
            sums = np.add.reduceat(values, starts, axis=axis)
            values = sums / (counts[:, None] if axis == 0 else counts)
    return values


def _paint_filter(values: np.ndarray, scale: float, mask: np.ndarray | None) -> np.ndarray:
    """Colours a filter (C, h, w): three channels as colour around grey, else one in PuOr."""
    if values.shape[0] == 3:
        return _as_rgba(np.moveaxis(0.5 + values / (2 * scale), 0, -1))
    painted = mpl.colormaps["PuOr"](0.5 + values.mean(axis=0) / (2 * scale))
    if mask is not None:
        painted[~mask.any(axis=0)] = (0.55, 0.55, 0.55, 1.0)
    return np.asarray(painted)


def _paint_image(image: np.ndarray) -> np.ndarray:
    rgb = image / 255.0
    return _as_rgba(np.repeat(rgb, 3, axis=2) if image.shape[2] == 1 else rgb)


def _paint_map(values: np.ndarray) -> np.ndarray:
    largest = float(values.max())
    return np.asarray(mpl.colormaps["cividis"](values / largest if largest > 0 else values))


def _as_rgba(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate([np.clip(rgb, 0, 1), np.ones((*rgb.shape[:2], 1))], axis=2)


def _show_mosaic(tiles: Sequence[np.ndarray], per_row: int, height_in: float, title: str) -> Axes:
    """Show tiles of one size side by side, with a gap that shows the page."""
    ax = add_panel(height_in, title=title, title_size=7.5, left_in=0.15, foot_in=0.1)
    height, width = tiles[0].shape[:2]
    # Each pixel becomes several, so that a gap can be narrower than a pixel of a small tile.
    zoom = max(1, 24 // max(height, width))
    gap = max(1, zoom * max(height, width) // 16)
    height, width = zoom * height, zoom * width
    rows = math.ceil(len(tiles) / per_row)
    mosaic = np.zeros((rows * (height + gap) - gap, per_row * (width + gap) - gap, 4))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, per_row)
        y, x = row * (height + gap), column * (width + gap)
        mosaic[y : y + height, x : x + width] = np.kron(tile, np.ones((zoom, zoom, 1)))
    ax.grid(visible=False)
    ax.imshow(mosaic, interpolation="none", aspect="equal")
    ax.set_anchor("NW")
    ax.set_axis_off()
    return ax
