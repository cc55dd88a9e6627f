"""Figures drawn in one process and in several, and a process that is lost."""

from __future__ import annotations

import os
import signal

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gbp_ray.report import drawing
from gbp_ray.report.drawing import Drawing, Sketch, add_panels, count_spare_processes, draw_figures

needs_fork = pytest.mark.skipif(count_spare_processes() < 2, reason="processes are not forked here")


def sketch(number: int) -> Sketch:
    def draw(is_narrow: bool) -> Figure:
        figure, (ax,) = add_panels(1, is_narrow, [], height_in=1.0, num_columns=1)
        ax.plot([0, number], [number, 0])
        return figure

    return Sketch(f"f{number}", f"Title {number}", Drawing(draw, f"s{number}"), "alt", "caption")


@pytest.mark.parametrize("is_narrow", [False, True])
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
def test_a_label_stands_beside_its_numbers(values: list[float], last: str, is_narrow: bool) -> None:
    def draw(is_narrow: bool) -> Figure:
        figure, axes = add_panels(2, is_narrow, [], height_in=2.0, num_columns=2)
        for ax in axes:
            ax.plot([0, 1], values)
            ax.set_ylabel("test accuracy, %")
        return figure

    with drawing._styled():
        figure = drawing.draw_fitted(Drawing(draw, "s"), is_narrow=is_narrow)
        FigureCanvasAgg(figure).draw()
    for place, ax in enumerate(figure.axes):
        label = ax.yaxis.label.get_window_extent()
        shown = [t for t in ax.get_yticklabels() if ax.get_ylim()[0] <= t.get_position()[1]]
        shown = [t for t in shown if t.get_position()[1] <= ax.get_ylim()[1]]
        assert min(t.get_window_extent().x0 for t in shown) > label.x1, "beside, not over"
        before = figure.axes[place - 1].bbox.x1 if place and not is_narrow else 0
        assert label.x0 > before, "nor over the panel before it, nor cut"
        assert shown[-1].get_text() == last


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
