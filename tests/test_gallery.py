"""Figures drawn in one process and in several, and a process that is lost."""

from __future__ import annotations

import os
import signal

import pytest
from matplotlib.figure import Figure

from gbp_ray.drawing import Drawing, add_panels
from gbp_ray.gallery import Sketch, count_spare_processes, draw_figures

needs_fork = pytest.mark.skipif(count_spare_processes() < 2, reason="processes are not forked here")


def sketch(number: int) -> Sketch:
    def draw(is_narrow: bool) -> Figure:
        figure, (ax,) = add_panels(1, is_narrow, [], height_in=1.0, num_columns=1)
        ax.plot([0, number], [number, 0])
        return figure

    return Sketch(f"f{number}", f"Title {number}", Drawing(draw, f"s{number}"), "alt", "caption")


NOTHING = Sketch("nothing", "Nothing", None, "alt", "caption")
SKETCHES = [sketch(1), NOTHING, sketch(2), sketch(3)]


def name_file(name: str) -> str:
    return f"at/{name}.png"


@needs_fork
def test_several_processes_draw_the_same_in_order() -> None:
    alone = draw_figures(SKETCHES, name_file, 1)
    assert [figure.name for figure in alone] == ["at/f1.png", "at/f2.png", "at/f3.png"]
    assert len({figure.png for figure in alone} | {figure.wide for figure in alone}) == 6
    assert draw_figures(SKETCHES, name_file, 2) == alone


@needs_fork
def test_what_a_lost_process_was_to_draw_is_drawn_here() -> None:
    here = os.getpid()
    whole = sketch(4)

    def draw(is_narrow: bool) -> Figure:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        assert whole.drawing is not None
        return whole.drawing.draw(is_narrow)

    fatal = Sketch("f4", "Title 4", Drawing(draw, "s4"), "alt", "caption")
    found = draw_figures([*SKETCHES, fatal], name_file, 2)
    assert found == draw_figures([*SKETCHES, whole], name_file, 1)


@needs_fork
def test_a_figure_that_cannot_be_drawn_says_why() -> None:
    def draw(is_narrow: bool) -> Figure:
        raise ZeroDivisionError("no such number")

    broken = Sketch("broken", "Broken", Drawing(draw, "b"), "alt", "caption")
    with pytest.raises(ZeroDivisionError, match="no such number"):
        draw_figures([*SKETCHES, broken], name_file, 2)
