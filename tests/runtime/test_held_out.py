"""A trial judged by a validation split: the test split is used once, and everybody says which."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from small_digits import FIELDS, prune_digits

from gbp_ray import open_results
from gbp_ray.cli.tables import round_table, summary_line
from gbp_ray.config.job import load_job, trial_id
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.report.curves import gather_curves
from gbp_ray.results.maintenance import find_faults
from gbp_ray.results.records import choose_round
from gbp_ray.results.store import Store, locate_round
from gbp_ray.runtime import trial
from gbp_ray.runtime.api import PruneResult
from gbp_ray.runtime.progress import Screen
from gbp_ray.runtime.trial import finish_trial, work_trial
from gbp_ray.training.evaluation import evaluate
from gbp_ray.workloads.loading import load_workload


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    return prune_digits(tmp_path_factory.mktemp("held-out"))


def test_the_test_split_is_measured_for_the_chosen_and_the_dense_round(
    result: PruneResult,
) -> None:
    record = result.record
    assert record.test is not None
    assert {item.judged_on for item in record.rounds} == {"validation"}
    workload = load_workload(record.job.workload, record.job.seed)
    for number, accuracy, loss in (
        (record.test.round, record.test.accuracy, record.test.loss),
        (0, record.test.dense_accuracy, record.test.dense_loss),
    ):
        found = evaluate(result.load_model(number), workload, Ranks(), 256, split="test")
        assert found[:2] == (accuracy, pytest.approx(loss))
    assert result.accuracy == record.test.accuracy
    assert result.round_uri().endswith(f"round_{record.test.round:03d}")
    assert locate_round(result.uri)[2].round == record.test.round


def test_the_choice_is_the_most_accurate_round_at_the_last_sparsity(result: PruneResult) -> None:
    rounds = result.record.rounds
    assert rounds[2].cost.num_kept == rounds[3].cost.num_kept < rounds[1].cost.num_kept

    def with_accuracies(*accuracies: float) -> int:
        pairs = zip(rounds, accuracies, strict=True)
        changed = [r.model_copy(update={"score": a, "loss": 1.0}) for r, a in pairs]
        return choose_round(changed).round

    assert with_accuracies(1.0, 0.99, 0.8, 0.7) == 2, "sparser rounds alone are candidates"
    assert with_accuracies(1.0, 0.99, 0.7, 0.8) == 3
    assert with_accuracies(1.0, 0.99, 0.8, 0.8) == 3, "of equals the later"
    tested = [
        r.model_copy(update={"judged_on": "test", "score": a})
        for r, a in zip(rounds, (1.0, 1.0, 0.9, 0.1), strict=True)
    ]
    assert choose_round(tested).round == 3, "what is reported on must not choose"


def test_the_index_tells_test_from_validation(result: PruneResult) -> None:
    results = open_results(result.uri)
    rows = {row["round"]: row for row in results.to_rows()}
    test = result.record.test
    assert test is not None
    chosen = rows[test.round]
    assert (chosen["accuracy"], chosen["test_accuracy"]) == (
        result.record.chosen.accuracy,
        test.accuracy,
    )
    assert rows[0]["test_accuracy"] == test.dense_accuracy
    others = set(rows) - {0, test.round}
    assert {rows[number]["test_accuracy"] for number in others} == {None}
    assert results.best("test_accuracy@round>=1")["round"] == test.round
    assert [row["round"] for row in results.chosen().to_rows()] == [test.round]
    (curves,) = gather_curves(results)
    assert curves.judged_on == "validation"
    (point,) = curves.curves[0].points
    assert point.test_score is not None
    assert point.test_score.mean == test.accuracy
    final = result.record.final
    assert point.gap is not None
    assert final.train_accuracy is not None
    assert point.gap.mean == pytest.approx(final.train_accuracy - final.accuracy)


def test_tables_say_which_split_it_was(result: PruneResult) -> None:
    console = Screen(width=140, file=io.StringIO())
    console.print(round_table(result.record))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "validation" in text
    assert text.count("chosen") == 1
    test = result.record.test
    assert test is not None
    line = summary_line(result.record)
    assert f"test accuracy of round {test.round} {test.accuracy:.2%}" in line
    # BatchNorm has seen a few batches only: what it stored is stale, and no measure of pruning.
    dense = max(test.dense_accuracy, test.dense_accuracy_recalibrated or 0.0)
    assert dense > test.dense_accuracy + 0.1
    assert f"({100 * (test.accuracy - dense):+.2f} points against dense at {dense:.2%} with" in line
    assert f"; as stored {test.dense_accuracy:.2%})" in line


def test_results_judged_so_are_as_claimed(result: PruneResult) -> None:
    assert find_faults(result.uri).faults == []


def test_a_trial_broken_off_before_its_test_does_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(None, FIELDS | {"storage": str(tmp_path), "prune.rounds": 2})
    store, name = Store(job.storage, job.name), trial_id(job)

    def broken(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trial, "measure_final_test", broken)
        with pytest.raises(KeyboardInterrupt):
            work_trial(job, Ranks())
    assert len(store.read_rounds(name)) == 3
    assert store.read_test(name) is None
    work_trial(job, Ranks())
    found = store.read_test(name)
    assert found is not None
    with monkeypatch.context() as patch:
        patch.setattr(trial, "measure_final_test", broken)
        work_trial(job, Ranks())
    assert finish_trial(job, store, 1.0).test == found


def test_trials_that_differ_in_what_they_hold_out_are_others() -> None:
    names = {trial_id(load_job(None, {"workload.validation": share})) for share in (0.0, 0.1, 0.2)}
    assert len(names) == 3
