"""Reports of whole units: what is left, fronts over each cost, widths; against records by hand."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from sample_units import units_cost, write_units_trial

from gbp_ray.report.checklist import answer_checklist
from gbp_ray.report.curves import WorkloadCurves, gather_curves
from gbp_ray.report.page import write_report
from gbp_ray.report.unit_figures import Width, draw_networks, find_living
from gbp_ray.results.goals import Goal
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store

ENDS = {0.7: (6, 3, 0.88), 0.5: (4, 3, 0.85), 0.3: (2, 2, 0.7)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("units"), "units")
    for macs, (channels, heads, score) in ENDS.items():
        for criterion, less in (("taylor", 0.0), ("magnitude", 0.1)):
            write_units_trial(
                store, channels, heads, score - less, target={"macs": macs}, criterion=criterion
            )
    return store


@pytest.fixture(scope="module")
def curves(store: Store) -> WorkloadCurves:
    (found,) = gather_curves(open_results(store.uri))
    return found


def test_points_go_over_what_is_left_of_the_cost_that_was_limited(curves: WorkloadCurves) -> None:
    assert (curves.kind, curves.measure, curves.is_compact) == ("macs", "macs", True)
    assert curves.targets == [0.7, 0.5, 0.3], "what leaves most comes first"
    for curve in curves.curves:
        for point in curve.points:
            cost = units_cost(*ENDS[point.target][:2])
            assert 1 - point.removed("macs") == pytest.approx(cost.macs_nonzero / cost.macs)
            assert 1 - point.removed("parameters") == pytest.approx(
                cost.num_nonzero / cost.num_parameters
            )
            assert 1 - point.removed("bytes") == pytest.approx(
                cost.num_bytes_sparse / cost.num_bytes
            )
    for measure in ("macs", "parameters", "bytes"):
        front = curves.find_front(measure)
        assert [(c.label, p.target) for c, p in front] == [("taylor", t) for t in (0.7, 0.5, 0.3)]


def test_goals_of_several_kinds_are_looked_at_apart(tmp_path: Path) -> None:
    store = Store(tmp_path, "units")
    write_units_trial(store, 4, 3, 0.8, target={"macs": 0.5})
    write_units_trial(store, 4, 2, 0.8, target={"parameters": 0.5})
    write_units_trial(store, 4, 2, 0.8, sparsity=0.5)
    found = {curves.kind: curves for curves in gather_curves(open_results(store.uri))}
    assert set(found) == {"macs", "parameters", "units"}
    assert found["macs"].title.endswith("whole units to MACs")
    assert found["units"].measure == "macs"
    assert str(Goal("macs", 2e6)) == "2M MACs"


def test_the_page_says_what_is_left_and_no_word_of_theory(store: Store, tmp_path: Path) -> None:
    report = write_report(store.uri, tmp_path / "report")
    text = html.unescape(re.sub(r"<svg.*?</svg>", "", report.page.read_text(), flags=re.DOTALL))
    assert "smallest within a point of dense" in text
    assert "MACs left, %" in text
    assert "in theory" not in text
    assert (
        "sparsit"
        not in re.sub(r"<pre>.*?</pre>|<a .*?</a>", "", text, flags=re.DOTALL)
        .split("<h3>Points")[0]
        .split("Overlap")[0]
        .split("</style>")[1]
    )
    assert {"network.png", "widths.png", "accuracy.png", "tradeoffs.png"} <= set(report.files)
    # The numbers of 50 %: channels 8 to 4, heads 4 to 3.
    (table,) = re.findall(r"<caption>Units of each group[^<]*50 % of MACs</caption>.*?</table>", text, re.DOTALL)  # fmt: skip  # noqa: E501
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", table)
    assert cells[5:] == ["a.weight", "channels", "8", "4", "4", "b.weight", "heads", "4", "3", "3"]
    commands = re.findall(r"gbp-ray prune jobs/\S+ --set (\S+)", text)
    assert sorted(set(commands)) == [f"prune.target.macs={macs}" for macs in (0.3, 0.5, 0.7)]


def test_zeros_that_stay_are_called_zeros(tmp_path: Path) -> None:
    store = Store(tmp_path, "units")
    write_units_trial(store, 4, 3, 0.8, target={"macs": 0.5}, compact=False)
    (found,) = gather_curves(open_results(store.uri))
    assert not found.is_compact
    answers = answer_checklist(found, num_workloads=1, versions=[], num_unfinished=0)
    (cost,) = [check for check in answers if check.question.startswith("Parameters")]
    assert "zeros are taken out" in cost.answer


def test_the_trial_page_shows_the_network_before_and_after(tmp_path: Path) -> None:
    store = Store(tmp_path, "units")
    trial = write_units_trial(store, 4, 3, 0.8, target={"macs": 0.5})
    report = write_report(store.trial_uri(trial.trial_id), tmp_path / "report")
    (page,) = [name for name in report.files if name.startswith("trials/") and "html" in name]
    text = (tmp_path / "report" / page).read_text()
    assert "left of the network" in text
    assert "7 of 12 units" in text
    assert "The network before and after" in text


def test_bars_are_as_wide_as_the_network() -> None:
    widths = [Width("a.weight", "channel", 64, 16), Width("b.weight", "channel", 32, 32)]
    (ax,) = draw_networks([("", [*widths, Width("c.weight", "head", 4, 3)])])
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    assert [round(bar.get_width(), 6) for bar in bars] == [1, 0.5, 1, 0.25, 0.5, 0.75]
    assert all(bar.get_x() == pytest.approx(-bar.get_width() / 2) for bar in bars)
    assert [text.get_text() for text in ax.texts] == ["64 → 16", "32 → 32", "4 → 3 heads"]


def test_living_units_are_found_along_the_axis_that_makes_them() -> None:
    mask = np.zeros((6, 4), bool)
    mask[:, [0, 2, 3]] = True
    lives = find_living(mask, 4, 3)
    assert lives is not None
    assert lives.tolist() == [True, False, True, True]
    # Two heads of three rows each, one of which is gone.
    rows = np.repeat([[True], [False]], 3, axis=0) & np.ones((6, 4), bool)
    lives = find_living(rows, 2, 1)
    assert lives is not None
    assert lives.tolist() == [True] * 3 + [False] * 3
    assert find_living(mask, 5, 2) is None
