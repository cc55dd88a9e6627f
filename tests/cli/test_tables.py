"""Tables and the closing line: every number comes from the records, and none is invented."""

from __future__ import annotations

import pytest
from rich.table import Table

from gbp_ray.cli.tables import (
    answers_table,
    ends_table,
    layer_table,
    round_table,
    summary_line,
    sweep_plan_lines,
)
from gbp_ray.config.job import JobConfig
from gbp_ray.results.records import CostRecord, LayerRecord, RoundRecord, TrialRecord
from gbp_ray.runtime.progress import Screen


def make_cost(kept: float, names: tuple[str, ...] = ("conv.weight", "head.weight")) -> CostRecord:
    layers = tuple(
        LayerRecord(
            name=name,
            shape=(20, 50),
            num_weights=1000,
            num_nonzero=round(1000 * kept),
            macs=2_000_000,
            macs_nonzero=round(2_000_000 * kept),
        )
        for name in names
    )
    return CostRecord(
        num_parameters=2500,
        num_nonzero=500 + round(2000 * kept),
        macs=4_000_000,
        macs_nonzero=round(4_000_000 * kept),
        num_bytes=10_000,
        num_bytes_sparse=5_000,
        layers=layers,
    )


@pytest.fixture
def trial() -> TrialRecord:
    rounds = (
        RoundRecord(
            round=0,
            sparsity_target=0.0,
            accuracy=0.9012,
            loss=0.25,
            cost=make_cost(1.0),
            mask_digest="0",
        ),
        RoundRecord(
            round=1,
            sparsity_target=0.5,
            accuracy=0.8765,
            loss=0.375,
            accuracy_pruned=0.1234,
            loss_pruned=2.0,
            cost=make_cost(0.5),
            mask_digest="1",
        ),
        RoundRecord(
            round=2,
            sparsity_target=0.75,
            accuracy=0.8512,
            loss=0.5,
            accuracy_pruned=0.8512,
            cost=make_cost(0.25),
            mask_digest="2",
            held_back=("head.weight",),
        ),
    )
    job = JobConfig.model_validate(
        {
            "name": "try",
            "workload": {"factory": "a:b"},
            "prune": {"criterion": "taylor", "sparsity": 0.75, "rounds": 2},
        }
    )
    return TrialRecord(trial_id="taylor-x", job=job, rounds=rounds, seconds=1, num_workers=0)


def lines_of(table: Table) -> list[str]:
    console = Screen(width=140, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line for line in captured.get().splitlines() if line.strip()]


def test_the_round_table_has_a_line_for_each_round_with_its_numbers(trial: TrialRecord) -> None:
    title, head, _, dense, first, second = lines_of(round_table(trial))
    assert title.strip() == "taylor-x"
    assert head.split()[:3] == ["round", "sparsity", "accuracy"]
    assert dense.split() == ["dense", "0.00%", "90.12%", "0.2500", "2,500", "4M"]
    assert first.split() == ["1", "50.00%", "87.65%", "12.34%", "0.3750", "1,500", "2M"]
    assert second.split() == ["2", "75.00%", "85.12%", "85.12%", "0.5000", "1,000", "1M"]


def test_without_any_fine_tuning_nothing_stands_before_it(trial: TrialRecord) -> None:
    rounds = [
        record.model_copy(update={"score_pruned": record.score}) for record in trial.rounds[1:]
    ]
    untuned = trial.model_copy(update={"rounds": (trial.dense, *rounds)})
    _, head, _, _, first, _ = lines_of(round_table(untuned))
    assert "before" not in head
    assert first.split() == ["1", "50.00%", "87.65%", "0.3750", "1,500", "2M"]


def test_the_layer_table_says_what_is_left_and_who_was_held_back(trial: TrialRecord) -> None:
    title, _, _, conv, head = lines_of(layer_table(trial.final))
    assert title.strip() == "layers after round 2"
    assert conv.split() == ["conv.weight", "20x50", "1,000", "250", "75.00%", "500k"]
    assert head.split()[:3] == ["head.weight", "(held", "back)"]
    assert "held" not in "".join(lines_of(layer_table(trial.dense)))
    assert lines_of(layer_table(trial.dense))[0].strip() == "layers, dense"


def test_layer_names_are_shown_as_they_are(trial: TrialRecord) -> None:
    cost = make_cost(1.0, ("blocks[bold].weight", "x[/red].weight"))
    record = trial.dense.model_copy(update={"cost": cost})
    text = "\n".join(lines_of(layer_table(record)))
    assert "blocks[bold].weight" in text
    assert "x[/red].weight" in text


def test_the_summary_compares_the_last_round_with_the_dense_network(trial: TrialRecord) -> None:
    text = summary_line(trial)
    assert "\n" not in text
    assert "sparsity 75.00% of 2,000 prunable weights" in text
    assert "accuracy 85.12% (-5.00 points against dense)" in text
    assert "2.5x fewer non-zero parameters" in text, "2500 parameters before, 1000 after"
    assert "4.0x fewer multiply-adds in theory" in text


@pytest.mark.parametrize(
    ("recalibrated", "loss", "words"),
    [
        (None, None, "(-5.00 points against dense)"),
        (0.9, 0.1, "(-5.00 points against dense)"),
        (0.9012, 0.1, "(-5.00 points against dense with BatchNorm re-estimated)"),
        (0.9012, 0.3, "(-5.00 points against dense)"),
        (0.9052, 0.3, "(-5.40 points against dense with BatchNorm re-estimated)"),
        (
            0.98,
            0.3,
            "(-12.88 points against dense at 98.00% with BatchNorm re-estimated; as stored 90.12%)",
        ),
        (
            0.5,
            0.1,
            "(-5.00 points against dense at 90.12% as stored; with BatchNorm re-estimated 50.00%)",
        ),
    ],
)
def test_the_dense_network_is_the_better_of_its_two_measurements(
    trial: TrialRecord, recalibrated: float | None, loss: float | None, words: str
) -> None:
    changed = {"score_recalibrated": recalibrated, "loss_recalibrated": loss}
    dense = trial.dense.model_copy(update={"loss": 0.2, **changed})
    whole = trial.model_copy(update={"rounds": (dense, *trial.rounds[1:])})
    assert words in summary_line(whole)
    table = "\n".join(lines_of(round_table(whole)))
    assert ("re-estimated" in table) == (";" in words), "both are shown where they differ"


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ((0.0, 0.0, 0.0), "loss 0.5 (dense 0.25; accuracy is 0 throughout, so it tells nothing"),
        ((79.0, 80.0, 221.5), "loss 0.5 (dense 0.25; accuracy 79 is no share of examples"),
        ((0.5, 0.1, 0.0), "accuracy 0.00% (-50.00 points against dense)"),
    ],
)
def test_an_accuracy_that_tells_nothing_is_not_told(
    trial: TrialRecord, accuracies: tuple[float, ...], words: str
) -> None:
    rounds = tuple(
        record.model_copy(update={"score": accuracy, "score_pruned": None})
        for record, accuracy in zip(trial.rounds, accuracies, strict=True)
    )
    odd = trial.model_copy(update={"rounds": rounds})
    assert words in summary_line(odd)
    shown = "\n".join(lines_of(round_table(odd)))
    assert ("no share" in shown) == (accuracies[0] > 1)
    assert "7900" not in shown


def test_the_summary_of_a_network_without_multiply_adds_does_not_divide_by_zero(
    trial: TrialRecord,
) -> None:
    cost = make_cost(0.25).model_copy(update={"macs": 0, "macs_nonzero": 0, "num_nonzero": 0})
    final = trial.final.model_copy(update={"cost": cost})
    whole = trial.model_copy(update={"rounds": (trial.dense, final)})
    assert summary_line(whole).endswith(
        "2500.0x fewer non-zero parameters, multiply-adds not counted"
    )
    for table in (round_table(whole), layer_table(whole.final)):
        assert lines_of(table)[-1].rstrip().endswith("not counted")
    final = final.model_copy(update={"cost": cost.model_copy(update={"macs_fault": "why"})})
    whole = trial.model_copy(update={"rounds": (trial.dense, final)})
    assert summary_line(whole).endswith("multiply-adds not counted (why)")


def test_layers_of_which_no_saving_is_known_are_not_shown_as_saving_all(trial: TrialRecord) -> None:
    cost = trial.final.cost
    (first, *others), fault = cost.layers, "none is counted as saved in 'x'"
    layers = (first.model_copy(update={"macs": 0, "macs_nonzero": 0}), *others)
    odd = cost.model_copy(update={"layers": layers, "macs_fault": fault})
    final = trial.final.model_copy(update={"cost": odd})
    shown = [line for line in lines_of(layer_table(final)) if first.name in line]
    assert shown[0].rstrip().endswith("not counted")
    whole = trial.model_copy(update={"rounds": (trial.dense, final)})
    assert summary_line(whole).endswith(f"fewer multiply-adds in theory ({fault})")
    # A table that is looked up multiplies nothing.
    plain = final.model_copy(update={"cost": odd.model_copy(update={"macs_fault": ""})})
    shown = [line for line in lines_of(layer_table(plain)) if first.name in line]
    assert shown[0].rstrip().endswith(" 0")


# -- sweeps ----------------------------------------------------------------------------------------

ANSWER = {
    "label": "taylor",
    "sparsity": 0.875,
    "accuracy": 0.9,
    "dense_accuracy": 0.91,
    "num_trials": 4,
    "seconds": 12.4,
    "cause": "",
    "is_highest": False,
    "dense_is_recalibrated": False,
}


@pytest.mark.parametrize(
    ("changed", "row"),
    [
        ({}, "taylor 87.50% 90.00% 91.00% 4 12"),
        ({"is_highest": True}, "taylor 87.50% 90.00% 91.00% 4 12 the highest that was asked for"),
        ({"dense_is_recalibrated": True}, "taylor 87.50% 90.00% 91.00%* 4 12"),
        (
            {"sparsity": None, "accuracy": None},
            "taylor none 91.00% 4 12 the lowest already loses more",
        ),
        ({"sparsity": None, "accuracy": None, "cause": "why"}, "taylor none 91.00% 4 12 why"),
    ],
)
def test_the_answers_of_a_search_are_listed(changed: dict[str, object], row: str) -> None:
    lines = [" ".join(line.split()) for line in lines_of(answers_table([ANSWER | changed]))]
    assert row in lines
    assert any("re-estimated" in line for line in lines) == ("dense_is_recalibrated" in changed)


def test_trials_that_did_not_finish_are_listed_with_the_reason() -> None:
    ends = [
        {"trial_id": "one", "state": "failed", "cause": "out of luck", "round": 1},
        {"trial_id": "two", "state": "stopped", "cause": "", "round": 3},
    ]
    *_, failed, stopped = (" ".join(line.split()) for line in lines_of(ends_table(ends)))
    assert failed == "one failed out of luck"
    assert stopped == "two stopped weaker than others after round 3"


PLANNED = {
    "is_estimate": False,
    "num_trials": 12,
    "num_finished": 3,
    "num_stopped": 0,
    "num_left": 9,
    "num_begun": 0,
    "num_at_once": 4,
    "num_workers": 1,
    "machines": [["here", {"CPU": 4.0}]],
    "num_steps": 1200,
    "num_dense": 2,
    "worker_bytes": 2_000_000,
    "host_bytes": 9_000_000,
    "stored_bytes": 5_000_000,
    "uri": "there",
    "num_unplanned": 0,
    "seconds_left": None,
    "misfits": [],
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "to run: 9; 4 at a time, 1 worker each, on 1 machine with 4 CPUs"),
        ({"num_left": 0}, "nothing would be run; results: there"),
        ({"num_stopped": 2}, "12, of which 3 are finished and 2 stopped and are skipped"),
        ({"is_estimate": True}, "training: about 1,200 steps; 2 dense networks"),
        ({"num_begun": 5, "num_workers": 2}, "9, 5 of them begun before; 4 at a time, 2 workers"),
        (
            {"machines": [["a", {"CPU": 4, "GPU": 1}], ["b", {}]]},
            "2 machines with 4 CPUs and 1 GPUs",
        ),
        ({"machines": []}, "on 0 machines with no CPUs"),
        ({"num_unplanned": 7}, "not looked into: 7 trials of further kinds"),
        ({"seconds_left": 75.0}, "time: 75 s at the pace of those finished"),
        ({"misfits": ["too large"]}, "would not fit: too large"),
    ],
)
def test_the_plan_of_a_sweep_says_what_is_left_and_where_it_goes(
    changed: dict[str, object], words: str
) -> None:
    text = "\n".join(sweep_plan_lines(PLANNED | changed))
    assert words in text
    conditional = ("nothing would", "not looked into", "time: ", "would not fit")
    assert [word for word in conditional if word in text] == [
        word for word in conditional if word in words
    ]
