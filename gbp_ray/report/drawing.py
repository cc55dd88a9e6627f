"""Drawing for the report: styles that colour-blind readers can tell apart, panels, SVG and PNG.

A figure is a list of panels of one size, small enough for a phone; the page puts as many side by
side as fit. There each is inline SVG whose ink, grid and line colours are the page's own variables,
so that it follows light, dark and print. Curves are told apart by colour, marker and dash at once;
the colours are those of Okabe and Ito, and the baselines are black and grey. Text is never read as
mathematics: names are users' own.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, MaxNLocator
from PIL import Image

from gbp_ray.config.criteria import BASELINES
from gbp_ray.report.curves import Curve

__all__ = [
    "GRID",
    "INK",
    "NUM_STYLED",
    "PAPER",
    "QUIET",
    "SERIES",
    "Draw",
    "PageFigure",
    "Sketch",
    "Style",
    "add_panel",
    "count_spare_processes",
    "draw_figures",
    "list_names",
    "make_handle",
    "measure_names",
    "plot_percents",
    "render",
    "set_names",
    "set_percents",
    "shorten_name",
    "style_curves",
]

Draw = Callable[[], list[Axes]]
"""Draws the panels of a figure; none where there is nothing to draw."""

INK = "#1b1f24"
PAPER = "#fefefe"
GRID = "#dadee3"
QUIET = "#6b7280"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "^", "D", "v", "P", "*", "<", ">")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (2.5, 1.2)), (0, (9, 3)))

_VARIABLES = {
    INK: "currentColor",
    PAPER: "var(--paper)",
    GRID: "var(--grid)",
    QUIET: "var(--quiet)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}

_PANEL_IN, _PAGE_IN = 3.5, 7.0
_PIXELS_PER_INCH = 104
"""In the page, where two panels side by side fill its width, and one the width of a phone."""
_PNG_PIXELS = 1440
_LEFT_IN, _FOOT_IN, _RIGHT_IN, _TITLE_IN = 0.55, 0.48, 0.12, 0.24
NUM_STYLED = 8
"""Curves that get a style of their own each."""

_SETTINGS: Any = {
    "font.size": 8.5,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    # Without a place of its own each title is moved off the ticks of a top axis, which none has.
    "axes.titley": 1.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "hatch.color": PAPER,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


class Style(NamedTuple):
    """The colour, marker and dash of a curve."""

    colour: str
    marker: str
    dash: Any


def style_curves(curves: Sequence[Curve]) -> dict[str, Style]:
    """Give each curve a style by its label; many curves share one style per criterion."""
    is_own = len(curves) <= NUM_STYLED
    names = dict.fromkeys(curve.label if is_own else curve.criterion for curve in curves)
    is_one_each = len({curve.criterion for curve in curves}) == len(names)
    greys = Style(QUIET, "X", (0, (3, 1, 1, 1, 1, 1))), Style(INK, "s", (0, (4, 2)))
    grey = dict(zip(BASELINES, greys, strict=True))
    criterion = {curve.label if is_own else curve.criterion: curve.criterion for curve in curves}
    styles: dict[str, Style] = {}
    number = 0
    for name in names:
        if is_one_each and criterion[name] in grey and len(names) > 1:
            styles[name] = grey[criterion[name]]
            continue
        # Colours, markers and dashes come round at different times: 24 styles before any repeats.
        styles[name] = Style(
            SERIES[number % len(SERIES)],
            _MARKERS[number % len(_MARKERS)],
            _DASHES[number % len(_DASHES)],
        )
        number += 1
    return {c.label: styles[c.label if is_own else c.criterion] for c in curves}


def add_panel(
    height_in: float,
    *,
    title: str = "",
    title_size: float = 8.5,
    legend: Sequence[tuple[Any, str]] = (),
    width_in: float = _PANEL_IN,
    left_in: float = _LEFT_IN,
    foot_in: float = _FOOT_IN,
) -> Axes:
    """Add a panel, measured in inches, with its title and the figure's legend above it."""
    texts = [shorten_name(text, 46) for _, text in legend]
    columns = 1
    if texts:
        room = (width_in - 0.2) / (0.55 + 0.066 * max(map(len, texts)))
        columns = max(1, min(len(texts), int(room)))
    top = 0.2 * math.ceil(len(texts) / columns) + 0.08 if texts else 0.0
    top += _TITLE_IN * (1 + title.count("\n")) if title else 0.08
    height = top + height_in + foot_in
    figure = Figure(figsize=(width_in, height))
    panel = width_in - left_in - _RIGHT_IN
    ax = figure.add_axes(
        (left_in / width_in, foot_in / height, panel / width_in, height_in / height)
    )
    ax.set_title(title, fontsize=title_size)
    # Where it is told to be: to find a place below the numbers takes a second layout.
    ax.xaxis.set_label_coords(0.5, -0.23 / height_in)
    # As many as can be told apart; each costs its text, its line and their layout.
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(_ShortNumbers())
    if texts:
        figure.legend(
            [handle for handle, _ in legend],
            # matplotlib takes a label with an underscore in front for none.
            [f"\u200b{text}" if text.startswith("_") else text for text in texts],
            loc="upper left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=columns,
            fontsize=8,
            handlelength=2.4,
            borderaxespad=0.1,
            columnspacing=1.2,
            labelspacing=0.35,
        )
    return ax


class _ShortNumbers(Formatter):
    """Writes the numbers of an axis with as many digits as tell them apart, thousands as k or M."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        largest = max((abs(value) for value in values), default=0.0)
        if largest >= 1e15 or 0 < largest < 1e-3:
            return [f"{value:.3g}" for value in values]
        unit, name = next(((u, n) for u, n in _UNITS if largest >= max(u, 1e4)), (1.0, ""))
        for digits in range(7):
            texts = [f"{value / unit:.{digits}f}" for value in values]
            if all(
                abs(float(text) * unit - value) < 1e-6 * largest
                for text, value in zip(texts, values, strict=True)
            ):
                break
        return [text + name if float(text) else "0" for text in texts] if name else texts


_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _make_room(ax: Axes) -> None:
    """Put the vertical label beside its numbers, and narrow a panel whose numbers need room."""
    if not ax.get_ylabel():
        return
    low, high = sorted(ax.get_ylim())
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    longest = max(map(len, ax.yaxis.get_major_formatter().format_ticks(ticks)), default=1)
    width, box = _figure_of(ax).get_figwidth(), ax.get_position()
    # The mark, the numbers, the label and the edge.
    shift = 0.26 + 0.068 * longest - _LEFT_IN
    panel = box.width - shift / width
    ax.set_position((box.x0 + shift / width, box.y0, panel, box.height))
    ax.yaxis.set_label_coords(-(_LEFT_IN + shift - 0.15) / (width * panel), 0.5)


def _figure_of(ax: Axes) -> Figure:
    assert isinstance(ax.figure, Figure)
    return ax.figure


def make_handle(style: Style) -> Line2D:
    """Draws a curve's entry in a legend."""
    return Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.dash)


def shorten_name(text: str, width: int) -> str:
    """Cuts the middle out: names that begin alike end differently."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[head + 1 - width :]}"


def list_names(names: Sequence[str], width: int) -> list[str]:
    """Shorten the names of parameters, without the ".weight" that all end with."""
    ends_alike = all(name.endswith(".weight") for name in names)
    return [
        shorten_name(name.removesuffix(".weight") if ends_alike else name, width) for name in names
    ]


def measure_names(texts: Sequence[str]) -> float:
    """Return the inches that names take to the left of a panel."""
    return 0.25 + 0.068 * max(map(len, texts))


def plot_percents(
    ax: Axes, points: Sequence[tuple[float, int]], style: Style, place: float, *, is_line: bool
) -> None:
    """Plot what one curve has of each row, in percent: a line, or a mark apart from the others'.

    Args:
        points: (percent, row) pairs.
        place: Of the curve among all of a row, from 0 to 1.
    """
    nudge = 0 if is_line else 0.5 * (place - 0.5)
    ax.plot(
        [percent for percent, _ in points],
        [row + nudge for _, row in points],
        color=style.colour,
        marker=style.marker,
        markersize=2.5 if is_line else 4.2,
        linestyle=style.dash if is_line else "",
        linewidth=0.9,
    )


def set_percents(ax: Axes, label: str) -> None:
    """Set an axis of percent below a panel."""
    ax.set_xlim(-3, 103)
    ax.set_xticks([0, 25, 50, 75, 100])
    ax.set_xlabel(label)


def set_names(ax: Axes, texts: Sequence[str], stride: int = 1) -> None:
    """Write a name for each row of a panel, the first on top, or every so many rows."""
    ax.set_ylim(len(texts) - 0.4, -0.6)
    ax.set_yticks(range(0, len(texts), stride), texts[::stride])


# -- from a figure to the page ---------------------------------------------------------------------


def render(draw: Draw, salt: str) -> tuple[str, bytes] | None:
    """Render a figure as inline SVG, one a panel, and as one PNG; None where nothing is drawn."""
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes in the PNG, not in the page.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        panels = draw()
        for ax in panels:
            _make_room(ax)
        figures = [_figure_of(ax) for ax in panels]
        if not figures:
            return None
        svgs = [_as_svg(figure, f"{salt}-{number}") for number, figure in enumerate(figures)]
        return "".join(svgs), _as_png(figures)


def _as_png(figures: Sequence[Figure]) -> bytes:
    width = max(figure.get_figwidth() for figure in figures)
    columns = min(len(figures), int(_PAGE_IN / width))
    dots = _PNG_PIXELS / (columns * width)
    pictures = []
    for figure in figures:
        figure.set(dpi=dots, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # Without transparency, and less well packed, it is as small and takes half the time.
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3]))
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    bottoms = np.cumsum([max(picture.height for picture in row) for row in rows]).tolist()
    sheet = Image.new("RGB", (_PNG_PIXELS, bottoms[-1]), "white")
    for row, bottom in zip(rows, bottoms, strict=True):
        for column, picture in enumerate(row):
            place = column * _PNG_PIXELS // columns, bottom - picture.height
            sheet.paste(picture, place)
    buffer = io.BytesIO()
    sheet.save(buffer, "png", dpi=(dots, dots), compress_level=3)
    return buffer.getvalue()


def _as_svg(figure: Figure, salt: str) -> str:
    # The salt keeps the ids of one figure apart from those of the others in the page.
    with mpl.rc_context({"svg.hashsalt": salt}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    width = round(_PIXELS_PER_INCH * figure.get_figwidth())
    opening = rf'<svg \1 width="{width}" aria-hidden="true">'
    svg = re.sub(r"^<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", opening, svg)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    ids = {name for pair in used for name in pair}
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in ids else "", svg)
    svg = re.sub(r"(?<=font-family: )[^;\"]+", "system-ui, sans-serif", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=>)\s+(?=<)', "", svg)
    colours = "|".join(map(re.escape, _VARIABLES))

    def tidy(tag: re.Match[str]) -> str:
        text = re.sub(colours, lambda m: _VARIABLES[m[0]], tag[0])
        # A hundredth of a point is less than a pixel anywhere.
        return re.sub(r"(\d\.\d\d)\d+", r"\1", text)

    # Users' names stand between tags; colours and places inside them.
    return re.sub(r"<[^>]+>", tidy, svg)


_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Sketch:
    """A figure before it is drawn.

    Attributes:
        name: Its name among the figures of its page.
        title: Its heading.
        draw: Draws its panels.
        alt: Alternative text.
        caption: How to read it.
    """

    name: str
    title: str
    draw: Draw
    alt: str
    caption: str


@dataclass(frozen=True)
class PageFigure:
    """A figure of a page, with its texts.

    Attributes:
        name: The file of its PNG, relative to the report.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: Markup
    png: bytes


def count_spare_processes() -> int:
    """Count the processes that a command, which nothing else runs in, may draw with."""
    # Elsewhere a process with threads must not be forked, and starting one anew takes longer.
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES) if sys.platform == "linux" else 1


def draw_figures(
    sketches: Sequence[Sketch], file_of: Callable[[str], str], salt: str, num_processes: int
) -> list[PageFigure]:
    """Draw the sketches that have something to draw, in their order.

    Args:
        sketches: The figures.
        file_of: From a sketch's name to the file of its PNG.
        salt: Keeps the ids of these figures apart from those of others in the page.
        num_processes: As many are forked, if more than one: only for a program without threads
            that hold locks.
    """
    tasks = [partial(render, sketch.draw, f"{salt}-{sketch.name}") for sketch in sketches]
    return [
        # The SVG is made by this package, with every name in it escaped.
        PageFigure(
            file_of(sketch.name),
            sketch.title,
            sketch.alt,
            sketch.caption,
            Markup(drawn[0]),
            drawn[1],
        )
        for sketch, drawn in zip(sketches, _call_all(tasks, num_processes), strict=True)
        if drawn is not None
    ]


_inherited: Sequence[Callable[[], Any]] = ()
"""Tasks of forked processes: closures, which cannot be sent to them."""


def _call_all(tasks: Sequence[Callable[[], Any]], num_processes: int) -> list[Any]:
    """Calls each task in one of so many processes; returns what they return, in order."""
    if num_processes > 1 and len(tasks) > 1:
        context = multiprocessing.get_context("fork")
        try:
            with ProcessPoolExecutor(num_processes, context, _inherit, (tasks,)) as pool:
                return list(pool.map(_call_inherited, range(len(tasks))))
        except BrokenProcessPool:
            # Killed for want of memory, most likely: one process needs less of it.
            pass
    return [task() for task in tasks]


def _inherit(tasks: Sequence[Callable[[], Any]]) -> None:
    global _inherited
    _inherited = tasks
    # Ctrl-C is the parent's to answer, which waits for the figures that are being drawn.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call_inherited(place: int) -> Any:
    return _inherited[place]()
