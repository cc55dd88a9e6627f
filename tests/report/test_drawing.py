"""Figures drawn in one process and in several, and a process that is lost."""

from __future__ import annotations

import os
import signal

import pytest
from matplotlib.axes import Axes

from gbp_ray.report.drawing import Sketch, add_panel, count_spare_processes, draw_figures, render

needs_fork = pytest.mark.skipif(count_spare_processes() < 2, reason="processes are not forked here")


def sketch(number: int) -> Sketch:
    def draw() -> list[Axes]:
        ax = add_panel(1.0)
        ax.plot([0, number], [number, 0])
        return [ax]

    return Sketch(f"f{number}", f"Title {number}", draw, "alt", "caption")


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ([0.0, 1e6], "1.0M"),
        ([0.0, 350_000.0], "300k"),
        ([98.985, 99.02], "99.02"),
        ([0.02, 0.04], "0.040"),
        ([1e-7, 3e-7], "3e-07"),
        ([-5e8, 2e9], "2.0G"),
        ([20.0, 100.0], "100"),
    ],
    ids=str,
)
def test_a_label_stands_beside_its_numbers(values: list[float], last: str) -> None:
    panels = []

    def draw() -> list[Axes]:
        panels.append(ax := add_panel(2.0))
        ax.plot([0, 1], values)
        ax.set_ylabel("test accuracy, %")
        return panels

    assert render(draw, "s")
    (ax,) = panels
    label = ax.yaxis.label.get_window_extent()
    shown = [t for t in ax.get_yticklabels() if ax.get_ylim()[0] <= t.get_position()[1]]
    shown = [t for t in shown if t.get_position()[1] <= ax.get_ylim()[1]]
    assert min(t.get_window_extent().x0 for t in shown) > label.x1, "beside, not over"
    assert label.x0 > 0, "nor cut"
    assert shown[-1].get_text() == last


NOTHING = Sketch("nothing", "Nothing", list, "alt", "caption")
SKETCHES = [sketch(1), NOTHING, sketch(2), sketch(3)]


def name_file(name: str) -> str:
    return f"at/{name}.png"


@needs_fork
def test_several_processes_draw_the_same_in_order() -> None:
    alone = draw_figures(SKETCHES, name_file, "s", 1)
    assert [figure.name for figure in alone] == ["at/f1.png", "at/f2.png", "at/f3.png"]
    assert len({figure.png for figure in alone} | {figure.svg for figure in alone}) == 6
    assert draw_figures(SKETCHES, name_file, "s", 2) == alone


@needs_fork
def test_what_a_lost_process_was_to_draw_is_drawn_here() -> None:
    here = os.getpid()
    whole = sketch(4)

    def draw() -> list[Axes]:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole.draw()

    fatal = Sketch("f4", "Title 4", draw, "alt", "caption")
    found = draw_figures([*SKETCHES, fatal], name_file, "s", 2)
    assert found == draw_figures([*SKETCHES, whole], name_file, "s", 1)


@needs_fork
def test_a_figure_that_cannot_be_drawn_says_why() -> None:
    def draw() -> list[Axes]:
        raise ZeroDivisionError("no such number")

    broken = Sketch("broken", "Broken", draw, "alt", "caption")
    with pytest.raises(ZeroDivisionError, match="no such number"):
        draw_figures([*SKETCHES, broken], name_file, "s", 2)
