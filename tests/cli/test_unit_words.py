"""Words on whole units in the terminal: what is left, widths, budgets; records made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from sample_units import units_cost, write_units_trial
from shell import Shell

from gbp_ray.cli.tables import layer_table, round_table, summary_line, summary_table
from gbp_ray.results.compare import compare_trials
from gbp_ray.results.query import open_results, summarize
from gbp_ray.results.store import Store


def lines_of(table: Table) -> list[str]:
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line for line in captured.get().splitlines() if line.strip()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, "units")


def test_rounds_and_layers_say_what_is_left(store: Store) -> None:
    trial = write_units_trial(store, 4, 3, 0.85, target={"macs": 0.5})
    # 16 + 96 weights become 8 + 36; 160 + 96 multiply-adds become 80 + 36.
    assert trial.final.reached == "MACs 45.3%, parameters 39.3% left"
    _, head, _, dense, last = lines_of(round_table(trial))
    assert head.split()[:5] == ["round", "MACs", "left", "weights", "left"]
    assert dense.split()[:3] == ["dense", "100.0%", "100.0%"]
    assert last.split()[:3] == ["1", "45.3%", "39.3%"]
    assert last.split()[-3:] == ["7", "44", "116"]
    title, _, _, a, b, *_ = lines_of(layer_table(trial.final))
    assert title.strip() == "layers after round 1"
    assert a.split() == ["a.weight", "8x2", "8", "->", "4", "16", "8", "50.0%", "80"]
    assert b.split()[:6] == ["b.weight", "12x8", "4", "->", "3", "heads"]


def test_groups_that_one_weight_makes_are_added_up_in_its_row(store: Store) -> None:
    last = write_units_trial(store, 4, 3, 0.85, target={"macs": 0.5}).final
    units = last.cost.units
    assert units is not None
    a, _ = units.widths
    other = a.model_copy(update={"name": "a.weight (2)", "num_units": 2, "num_kept": 1})
    cost = last.cost.model_copy(
        update={"units": units.model_copy(update={"widths": (*units.widths, other)})}
    )
    lines = lines_of(layer_table(last.model_copy(update={"cost": cost})))
    assert lines[3].split()[:5] == ["a.weight", "8x2", "10", "->", "5"]
    assert not any("(2)" in line for line in lines)


def test_notes_below_a_table_hold_no_line_breaks(store: Store) -> None:
    last = write_units_trial(store, 4, 3, 0.85, target={"macs": 0.5}).final
    named = last.model_copy(
        update={"cost": last.cost.model_copy(update={"unpruned": {"c.weight": (8, "topk")}})}
    )
    caption = str(layer_table(named).caption)
    assert "keeps them. 8 of " in caption
    assert "\n" not in caption


def test_the_last_line_knows_what_left_from_what_is_zero(store: Store) -> None:
    trial = write_units_trial(store, 4, 3, 0.85, target={"macs": 0.5})
    line = summary_line(trial)
    assert line.startswith("5 of 12 units left the network: 2.2x fewer multiply-adds (45.3%: ")
    assert "in theory" not in line
    assert "2.5x fewer parameters (39.3%)" in line
    assert "accuracy 85.00% (-5.00 points against dense)" in line
    kept = write_units_trial(store, 4, 3, 0.85, target={"macs": 0.5}, compact=False)
    assert "are zeros in the network" in summary_line(kept)
    assert "once they are out of it" in summary_line(kept)


def test_sweeps_are_listed_by_what_was_asked_for(store: Store) -> None:
    for macs, channels, score in ((0.7, 6, 0.88), (0.5, 4, 0.85)):
        for criterion, less in (("taylor", 0), ("magnitude", 1)):
            write_units_trial(
                store, channels - less, 3, score, target={"macs": macs}, criterion=criterion
            )
    results = open_results(store.uri).final()
    fields = results.find_varying()
    assert fields[:2] == ["prune.criterion", "prune.target.macs"]
    lines = summarize(results.to_rows(), fields)
    assert [line["goal"]["value"] for line in lines] == [0.7, 0.7, 0.5, 0.5]
    head, _, *rows = lines_of(summary_table(lines, fields))
    assert head.split()[:3] == ["MACs", "left", "criterion"]
    # One cell for each goal, though criteria end with different numbers of channels.
    assert [row.split()[0].endswith("%") for row in rows] == [True, False, True, False]


def test_results_are_chosen_by_what_is_left(shell: Shell, store: Store) -> None:
    for macs, channels, score in ((0.7, 6, 0.88), (0.5, 4, 0.85)):
        write_units_trial(store, channels, 3, score, target={"macs": macs})
    code, shown, _ = shell("results", store.uri, "--sort", "macs_left")
    assert code == 0
    assert "sparsity" not in shown
    assert shown.index("45.3%") < shown.index(f"{units_cost(6, 3).left['macs_left']:.1%}")
    row = open_results(store.uri).best("accuracy@macs_left<=0.5")
    assert row["accuracy"] == 0.85


def test_widths_of_two_trials_stand_side_by_side(store: Store) -> None:
    pair = [
        write_units_trial(store, channels, 3, 0.8, target={"macs": macs})
        for macs, channels in ((0.7, 6), (0.5, 4))
    ]
    found = compare_trials(*(store.trial_uri(trial.trial_id) for trial in pair))
    assert found["widths"] == [
        {"name": "a.weight", "num_units": [8, 8], "num_kept": [6, 4]},
        {"name": "b.weight", "num_units": [4, 4], "num_kept": [3, 3]},
    ]
