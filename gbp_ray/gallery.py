"""The figures of a page: sketched with what they say in words, then drawn all together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from gbp_ray.drawing import Drawing, render_narrow, render_wide

__all__ = ["PageFigure", "Sketch", "count_spare_processes", "draw_figures"]

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
