"""The figures of a trial's own page: what lives in each layer, what it is worth, what changed.

Colours are those of `drawing`; shades are cividis and PuOr, which colour-blind readers can follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gbp_ray.report.drawing import (
    GRID,
    INK,
    QUIET,
    SERIES,
    Drawing,
    Style,
    add_panels,
    make_handle,
    shorten_name,
)
from gbp_ray.results.findings import Findings

__all__ = [
    "plot_classes",
    "plot_examples",
    "plot_first_filters",
    "plot_kept_links",
    "plot_living",
    "plot_saliency",
]

_MOST_LAYERS, _MOST_PANELS, _MOST_CELLS, _MOST_FILTERS = 40, 12, 96, 64
_MOST_CLASSES = 40
Item = TypeVar("Item")


def plot_living(masks: Mapping[str, np.ndarray], salt: str) -> Drawing:
    """Plots by layer which share of weights, filters and input channels live."""
    shown = _spread_out(list(masks), _MOST_LAYERS)
    measures = {
        "filters that live": [np.any(_links(masks[name]), axis=1).mean() for name in shown],
        "input channels that live": [np.any(_links(masks[name]), axis=0).mean() for name in shown],
        "weights kept": [masks[name].mean() for name in shown],
    }
    styles = [
        Style(SERIES[0], "o", ""),
        Style(SERIES[1], "^", ""),
        Style(INK, "D", ""),
    ]
    legend = [(make_handle(style), name) for name, style in zip(measures, styles, strict=True)]

    def draw(is_narrow: bool) -> Figure:
        texts = _names(shown, 18 if is_narrow else 30)
        figure, (ax,) = add_panels(
            1,
            is_narrow,
            legend,
            height_in=0.3 + 0.19 * max(4, len(shown)),
            num_columns=1,
            left_in=0.25 + 0.068 * max(map(len, texts)),
            has_titles=False,
        )
        for (_, values), style in zip(measures.items(), styles, strict=True):
            ax.plot(
                [100 * value for value in values],
                range(len(shown)),
                linestyle="",
                marker=style.marker,
                color=style.colour,
                markersize=4.6,
            )
        _set_layers(ax, texts)
        ax.set_xlim(-3, 103)
        ax.set_xlabel("% of the layer")
        return figure

    return Drawing(draw, f"{salt}-living")


def plot_kept_links(masks: Mapping[str, np.ndarray], salt: str) -> Drawing:
    """Plots for some layers which filter still reads which input channel."""
    shown = _spread_out(list(masks), _MOST_PANELS)

    def draw(is_narrow: bool) -> Figure:
        figure, axes = add_panels(
            len(shown), is_narrow, [], height_in=1.7, num_columns=3, left_in=0.5
        )
        for ax, name in zip(axes, shown, strict=True):
            links = _links(masks[name])
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
            filters, inputs = np.any(links, axis=1).sum(), np.any(links, axis=0).sum()
            title = shorten_name(name.removesuffix(".weight"), 16)
            ax.set_title(
                f"{title}: {filters}/{links.shape[0]} f, {inputs}/{links.shape[1]} in", fontsize=7.5
            )
            ax.set_xlabel("input channel", fontsize=7)
            ax.set_ylabel("filter", fontsize=7)
            ax.tick_params(labelsize=6.5)
            ax.locator_params(nbins=5, integer=True)
        return figure

    return Drawing(draw, f"{salt}-links")


def plot_saliency(found: Findings, salt: str) -> Drawing:
    """Plots the mean saliency of a layer's weights: dense, and those kept after the pruning."""
    by_name = {layer.name: layer for layer in found.layers}
    shown = [by_name[name] for name in _spread_out(list(by_name), _MOST_LAYERS)]
    rows = [
        (
            layer.dense_all / layer.num_weights,
            layer.dense_kept / max(1, layer.num_kept),
            layer.pruned / max(1, layer.num_kept),
        )
        for layer in shown
    ]
    styles = [Style(QUIET, "s", ""), Style(SERIES[0], "o", ""), Style(SERIES[1], "^", "")]
    names = ["dense, all weights", "dense, those kept", "pruned, those kept"]
    legend = [(make_handle(style), name) for name, style in zip(names, styles, strict=True)]

    def draw(is_narrow: bool) -> Figure:
        texts = _names([layer.name for layer in shown], 18 if is_narrow else 30)
        figure, (ax,) = add_panels(
            1,
            is_narrow,
            legend,
            height_in=0.3 + 0.19 * max(4, len(shown)),
            num_columns=1,
            left_in=0.25 + 0.068 * max(map(len, texts)),
            has_titles=False,
        )
        for place, values in enumerate(rows):
            known = [value for value in values if value > 0]
            if known:
                ax.plot([min(known), max(known)], [place, place], color=GRID, linewidth=2, zorder=1)
        for number, style in enumerate(styles):
            points = [(row[number], y) for y, row in enumerate(rows) if row[number] > 0]
            ax.plot(
                [x for x, _ in points],
                [y for _, y in points],
                linestyle="",
                marker=style.marker,
                color=style.colour,
                markersize=4.6,
            )
        ax.set_xscale("log")
        ax.minorticks_off()
        # The page's text is no mathematics, and matplotlib would write powers as such.
        ax.xaxis.set_major_formatter(lambda value, place: f"{value:.0e}")
        _set_layers(ax, texts)
        ax.set_xlabel(f"mean saliency of a weight, {found.criterion}")
        return figure

    return Drawing(draw, f"{salt}-saliency")


def plot_first_filters(
    dense: np.ndarray, pruned: np.ndarray, mask: np.ndarray, salt: str
) -> Drawing | None:
    """Plots the first layer's filters, dense above and pruned below; None where they are none."""
    if dense.ndim != 4 or max(dense.shape[2:]) < 2:
        return None
    shown = _spread_out(list(range(len(dense))), _MOST_FILTERS)
    is_colour = dense.shape[1] == 3
    scale = max(float(np.abs(dense).max()), float(np.abs(pruned).max()), 1e-12)

    def draw(is_narrow: bool) -> Figure:
        per_row = min(len(shown), 8 if is_narrow else 16)
        rows = math.ceil(len(shown) / per_row)
        height = 0.16 + rows * ((3.0 if is_narrow else 6.5) / per_row)
        figure, axes = add_panels(2, is_narrow, [], height_in=height, num_columns=1, left_in=0.15)
        keep = None if is_colour else mask
        for ax, values, title, kept in (
            (axes[0], dense, "Dense", None),
            (axes[1], pruned, "Pruned; removed weights are grey", keep),
        ):
            tiles = [_paint_filter(values[i], scale, None if kept is None else kept[i])
                     for i in shown]  # fmt: skip
            _show_mosaic(ax, tiles, per_row)
            ax.set_title(title)
        return figure

    return Drawing(draw, f"{salt}-filters")


def plot_classes(found: Findings, salt: str) -> Drawing:
    """Plots the accuracy of each class, dense and pruned, the most hurt first."""
    shares = [
        (
            item.label,
            item.num_right_dense / item.num_examples,
            item.num_right_pruned / item.num_examples,
        )
        for item in found.classes
    ]
    shares.sort(key=lambda share: share[2] - share[1])
    if len(shares) > _MOST_CLASSES:
        shares = shares[: _MOST_CLASSES // 2] + shares[-_MOST_CLASSES // 2 :]
    styles = [Style(SERIES[0], "o", ""), Style(SERIES[1], "^", "")]
    legend = [(make_handle(styles[0]), "dense"), (make_handle(styles[1]), "pruned")]

    def draw(is_narrow: bool) -> Figure:
        names = [found.name_class(label) for label, _, _ in shares]
        texts = [shorten_name(name, 18 if is_narrow else 30) for name in names]
        figure, (ax,) = add_panels(
            1,
            is_narrow,
            legend,
            height_in=0.3 + 0.2 * max(4, len(shares)),
            num_columns=1,
            left_in=0.25 + 0.068 * max(map(len, texts)),
            has_titles=False,
        )
        for place, (_, dense, pruned) in enumerate(shares):
            ax.plot([100 * dense, 100 * pruned], [place] * 2, color=GRID, linewidth=2.4, zorder=1)
        for number, style in enumerate(styles, start=1):
            ax.plot(
                [100 * share[number] for share in shares],
                range(len(shares)),
                linestyle="",
                marker=style.marker,
                color=style.colour,
                markersize=5,
            )
        _set_layers(ax, texts)
        ax.set_xlabel("accuracy of the class, %")
        return figure

    return Drawing(draw, f"{salt}-classes")


def plot_examples(found: Findings, salt: str) -> Drawing | None:
    """Plots examples with what their true class hangs on: input, dense map, pruned map."""
    number = min(len(found.images), len(found.examples))
    if number == 0:
        return None
    has_maps = len(found.maps_dense) == len(found.maps_pruned) == len(found.images)

    def draw(is_narrow: bool) -> Figure:
        aspect = found.images.shape[1] / found.images.shape[2]
        columns = 1 if is_narrow else 3
        width = 3.0 if is_narrow else 2.05
        figure, axes = add_panels(
            number,
            is_narrow,
            [],
            height_in=width * aspect / (3 if has_maps else 1),
            num_columns=columns,
            left_in=0.15,
        )
        for place, ax in enumerate(axes):
            item = found.examples[place]
            tiles = [_paint_image(found.images[place])]
            if has_maps:
                tiles += [_paint_map(found.maps_dense[place]), _paint_map(found.maps_pruned[place])]
            _show_mosaic(ax, tiles, len(tiles))
            name, dense, pruned = (
                shorten_name(found.class_names[label], 9)
                if label < len(found.class_names)
                else str(label)
                for label in (item.label, item.answer_dense, item.answer_pruned)
            )
            ax.set_title(
                f"is {name}: dense {dense} ({item.confidence_dense:.0%}), "
                f"pruned {pruned} ({item.confidence_pruned:.0%})",
                fontsize=7 if max(map(len, (name, dense, pruned))) < 5 else 6,
            )
        return figure

    return Drawing(draw, f"{salt}-examples")


# -- pieces ----------------------------------------------------------------------------------------


def _links(mask: np.ndarray) -> np.ndarray:
    """Computes the share of weights kept between each input channel and filter: (O, I)."""
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


def _spread_out(items: Sequence[Item], most: int) -> list[Item]:
    if len(items) <= most:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / (most - 1))] for i in range(most)]


def _names(names: Sequence[str], width: int) -> list[str]:
    ends_alike = all(name.endswith(".weight") for name in names)
    return [
        shorten_name(name.removesuffix(".weight") if ends_alike else name, width) for name in names
    ]


def _set_layers(ax: Axes, texts: Sequence[str]) -> None:
    ax.set_ylim(len(texts) - 0.4, -0.6)
    ax.set_yticks(range(len(texts)), texts)


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


def _show_mosaic(ax: Axes, tiles: Sequence[np.ndarray], per_row: int) -> None:
    """Shows tiles of one size side by side, with a gap that shows the page."""
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
