"""How the report draws: styles that colour-blind readers can tell apart, panels in inches, SVG.

In the page a figure is inline SVG whose ink, grid and line colours are the page's own variables, so
that it follows light, dark and print. Curves are told apart by colour, marker and dash at once; the
colours are those of Okabe and Ito, and the baselines are black and grey. Text is never read as
mathematics: names are users' own.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
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

from gbp_ray.report.curves import Curve

__all__ = [
    "GRID",
    "INK",
    "NUM_STYLED",
    "PAPER",
    "QUIET",
    "SERIES",
    "Drawing",
    "PageFigure",
    "Sketch",
    "Style",
    "add_panels",
    "count_spare_processes",
    "draw_figures",
    "draw_fitted",
    "make_handle",
    "render_narrow",
    "render_png",
    "render_wide",
    "shorten_name",
    "style_curves",
]

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

_DOTS_PER_INCH = 200
_LEFT_IN = 0.55
NUM_STYLED = 8
"""Curves that get a style of their own each."""

_WIDTHS_IN = {False: 7.2, True: 3.5}

_SETTINGS: Any = {
    "font.size": 8.5,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 8.5,
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
    """How a curve is told from the others."""

    colour: str
    marker: str
    dash: Any


@dataclass(frozen=True)
class Drawing:
    """A figure that is yet to be drawn.

    Attributes:
        draw: Draws it, narrow where it is told so.
        salt: Keeps its ids apart from those of the other figures of a page.
    """

    draw: Callable[[bool], Figure]
    salt: str


def style_curves(curves: Sequence[Curve]) -> dict[str, Style]:
    """Gives each curve a style by its label; of many curves those of a criterion share one."""
    is_own = len(curves) <= NUM_STYLED
    names = dict.fromkeys(curve.label if is_own else curve.criterion for curve in curves)
    is_alone = len({curve.criterion for curve in curves}) == len(names)
    grey = {
        "random": Style(QUIET, "X", (0, (3, 1, 1, 1, 1, 1))),
        "magnitude": Style(INK, "s", (0, (4, 2))),
    }
    criterion = {curve.label if is_own else curve.criterion: curve.criterion for curve in curves}
    styles: dict[str, Style] = {}
    number = 0
    for name in names:
        if is_alone and criterion[name] in grey and len(names) > 1:
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


def add_panels(
    number: int,
    is_narrow: bool,
    legend: Sequence[tuple[Any, str]],
    *,
    height_in: float,
    num_columns: int,
    left_in: float = _LEFT_IN,
    is_shared_left: bool = False,
    has_titles: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Lays panels of one size out, in inches, with the legend above them."""
    width = _WIDTHS_IN[is_narrow]
    columns = 1 if is_narrow else min(num_columns, number)
    rows = math.ceil(number / columns)
    gap, foot, right = 0.28 if is_shared_left else left_in, 0.48, 0.12
    title = 0.24 if has_titles else 0.08
    texts = [shorten_name(text, 46 if is_narrow else 60) for _, text in legend]
    legend_columns = 1
    if texts:
        longest = max(map(len, texts))
        room = (width - 0.2) / (0.55 + 0.066 * longest)
        legend_columns = max(1, min(len(texts), int(room)))
    legend_height = 0.2 * math.ceil(len(texts) / legend_columns) + 0.08 if texts else 0.0
    height = legend_height + rows * (title + height_in + foot)
    figure = Figure(figsize=(width, height))
    panel = (width - left_in - right - (columns - 1) * (gap + right)) / columns
    axes = []
    for place in range(number):
        row, column = divmod(place, columns)
        x = left_in + column * (panel + gap + right)
        y = height - legend_height - (row + 1) * (title + height_in + foot) + foot
        ax = figure.add_axes((x / width, y / height, panel / width, height_in / height))
        # Where it is told to be: to find a place below the numbers takes a second layout.
        ax.xaxis.set_label_coords(0.5, -0.23 / height_in)
        # As many as can be told apart; each costs its text, its line and their layout.
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(_ShortNumbers())
        axes.append(ax)
    if texts:
        figure.legend(
            [handle for handle, _ in legend],
            # matplotlib takes a label with an underscore in front for none.
            [f"\u200b{text}" if text.startswith("_") else text for text in texts],
            loc="upper left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=legend_columns,
            fontsize=8,
            handlelength=2.4,
            borderaxespad=0.1,
            columnspacing=1.2,
            labelspacing=0.35,
        )
    return figure, axes


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


def _make_room(figure: Figure) -> None:
    """Puts each vertical label beside its numbers, and narrows panels whose numbers need room."""
    width = figure.get_figwidth()
    shifts: dict[float, float] = {}
    labelled = [ax for ax in figure.axes if ax.get_ylabel()]
    for ax in labelled:
        low, high = sorted(ax.get_ylim())
        ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
        longest = max(map(len, ax.yaxis.get_major_formatter().format_ticks(ticks)), default=1)
        x = ax.get_position().x0
        # The mark, the numbers, the label and the edge; panels above each other stay aligned.
        shifts[x] = max(shifts.get(x, 0.0), 0.26 + 0.068 * longest - _LEFT_IN)
    for ax in labelled:
        box = ax.get_position()
        shift = shifts[box.x0]
        panel = box.width - shift / width
        ax.set_position((box.x0 + shift / width, box.y0, panel, box.height))
        ax.yaxis.set_label_coords(-(_LEFT_IN + shift - 0.15) / (width * panel), 0.5)


def make_handle(style: Style) -> Line2D:
    """Draws a curve's entry in a legend."""
    return Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.dash)


def shorten_name(text: str, width: int) -> str:
    """Cuts the middle out: names that begin alike end differently."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[head + 1 - width :]}"


# -- from a figure to the page ---------------------------------------------------------------------


def render_wide(drawing: Drawing) -> tuple[str, bytes]:
    """Draws a figure for screens and paper: inline SVG, and a PNG of 200 dots per inch."""
    with _styled():
        figure = draw_fitted(drawing, is_narrow=False)
        return _as_svg(figure, drawing.salt), _as_png(figure)


def render_narrow(drawing: Drawing) -> str:
    """Draws a figure for phones: inline SVG."""
    with _styled():
        return _as_svg(draw_fitted(drawing, is_narrow=True), f"{drawing.salt}-narrow")


def render_png(drawing: Drawing) -> bytes:
    """Draws a figure for a file alone."""
    with _styled():
        return _as_png(draw_fitted(drawing, is_narrow=False))


def draw_fitted(drawing: Drawing, *, is_narrow: bool) -> Figure:
    """Draws a figure with room for the numbers of its axes."""
    figure = drawing.draw(is_narrow)
    _make_room(figure)
    return figure


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes in the PNG, not in the page.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _as_png(figure: Figure) -> bytes:
    figure.set(dpi=_DOTS_PER_INCH, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Without transparency, and less well packed, it is as small and takes half the time.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])
    buffer = io.BytesIO()
    picture.save(buffer, "png", dpi=(_DOTS_PER_INCH,) * 2, compress_level=3)
    return buffer.getvalue()


def _as_svg(figure: Figure, salt: str) -> str:
    # The salt keeps the ids of one figure apart from those of the others in the page.
    with mpl.rc_context({"svg.hashsalt": salt}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"^<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg)
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
        name: What it is called among the figures of its page.
        title: Its heading.
        drawing: Draws it; None where there is nothing to draw.
        alt: What it shows, for those who cannot see it.
        caption: How to read it.
    """

    name: str
    title: str
    drawing: Drawing | None
    alt: str
    caption: str


@dataclass(frozen=True)
class PageFigure:
    """A figure of a page with what it says in words.

    Attributes:
        name: The file of its PNG, relative to the report.
    """

    name: str
    title: str
    alt: str
    caption: str
    wide: Markup
    narrow: Markup
    png: bytes


def count_spare_processes() -> int:
    """Counts the processes that a command, which nothing else runs in, may draw with."""
    # Elsewhere a process with threads must not be forked, and starting one anew takes longer.
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES) if sys.platform == "linux" else 1


def draw_figures(
    sketches: Sequence[Sketch], file_of: Callable[[str], str], num_processes: int
) -> list[PageFigure]:
    """Draws the sketches that have something to draw, in their order.

    Args:
        sketches: The figures.
        file_of: From a sketch's name to the file of its PNG.
        num_processes: As many are forked, if more than one: only for a program without threads
            that hold locks.
    """
    shown = [(sketch, sketch.drawing) for sketch in sketches if sketch.drawing is not None]
    drawings = [drawing for _, drawing in shown]
    # Wide ones first: they take longest, and a process that is done early finds others to draw.
    tasks = [partial(render_wide, d) for d in drawings] + [
        partial(render_narrow, d) for d in drawings
    ]
    rendered = _call_all(tasks, num_processes)
    return [
        PageFigure(
            name=file_of(sketch.name),
            title=sketch.title,
            alt=sketch.alt,
            caption=sketch.caption,
            # Made by this package, with every name in it escaped.
            wide=Markup(wide),
            narrow=Markup(narrow),
            png=png,
        )
        for (sketch, _), (wide, png), narrow in zip(
            shown, rendered[: len(shown)], rendered[len(shown) :], strict=True
        )
    ]


_inherited: Sequence[Callable[[], Any]] = ()
"""What forked processes call: closures, which cannot be sent to them."""


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
