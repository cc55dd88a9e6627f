"""Scores of any metric on record: named by it, in its direction, never mixed with another one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_results import sample_job, sample_round, sample_trial
from shell import Shell

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.config.metrics import ACCURACY, MetricSpec, is_free
from gbp_ray.errors import ConfigError, GbpError, StoreError
from gbp_ray.report.page import write_report
from gbp_ray.results.compare import compare_trials
from gbp_ray.results.index import INDEX, _dump, is_current, is_sound, rebuild_index, tabulate
from gbp_ray.results.maintenance import find_faults
from gbp_ray.results.query import Results, open_results, summarize
from gbp_ray.results.records import (
    FinalTest,
    RoundRecord,
    TrialRecord,
    choose_round,
    parse_record,
    seal_record,
)
from gbp_ray.results.scores import DenseReference
from gbp_ray.results.store import Store

PERPLEXITY = MetricSpec(name="perplexity", higher_is_better=False)
RMSE = MetricSpec(name="rmse", higher_is_better=False, unit="m")
R2 = MetricSpec(name="r2", chance=0.0)


def record_of(
    number: int,
    specs: Sequence[MetricSpec],
    values: Sequence[float],
    sparsity: float = 0.25,
    **more: Any,
) -> RoundRecord:
    """Makes a round with these values; after the prune each was twice as large."""
    record, _ = sample_round(number, sparsity * number, seed=3)
    metrics = {spec.name: value for spec, value in zip(specs, values, strict=True)}
    pruned = {name: 2 * value for name, value in metrics.items()}
    changes: dict[str, Any] = {"score": values[0], "metric": specs[0], "metrics": metrics}
    changes["train_score"] = 0.75 * values[0]
    changes |= {"score_pruned": 2 * values[0], "loss_pruned": 9.0} if number else {}
    if len(specs) > 1:
        changes |= {"other_metrics": tuple(specs[1:]), "metrics_pruned": pruned if number else {}}
    return record.model_copy(update=changes | more)


def write_job(
    storage: Path,
    specs: Sequence[MetricSpec],
    by_seed: dict[int, list[Sequence[float]]],
    name: str = "job",
    **job: Any,
) -> Store:
    """Writes a job whose trials have these values after each round, dense first."""
    store = Store(storage, name)
    for seed, rounds in by_seed.items():
        config = sample_job(name, seed=seed, rounds=len(rounds) - 1, **job)
        store.claim(config)
        for number, values in enumerate(rounds):
            files = sample_round(number, 0.25 * number, seed=3)[1]
            store.write_round(trial_id(config), record_of(number, specs, values), files)
        records = tuple(store.read_rounds(trial_id(config)))
        store.write_trial(sample_trial(config, records))
    return store


# -- records ---------------------------------------------------------------------------------------


def test_keys_are_named_by_the_metric_and_come_back() -> None:
    record = record_of(1, [PERPLEXITY], [math.inf])
    tree = json.loads(record.model_dump_json())
    named = {key for key in tree if "perplexity" in key}
    assert named == {
        *("perplexity", "perplexity_pruned", "perplexity_recalibrated", "train_perplexity"),
    }
    assert not any("score" in key or "accuracy" in key for key in tree if key != "robust_accuracy")
    assert tree["metric"]["higher_is_better"] is False
    again = parse_record(seal_record(record), RoundRecord, "here")
    assert again == record
    assert (again.score, again.score_pruned) == (math.inf, math.inf)
    test = FinalTest(
        metric=RMSE, round=1, score=0.5, loss=0.25, dense_score=0.25, dense_loss=0.1,
        metrics={"rmse": 0.5, "r2": 0.9}, dense_metrics={"rmse": 0.25, "r2": 0.95},
    )  # fmt: skip
    assert parse_record(seal_record(test), FinalTest, "here") == test
    assert json.loads(test.model_dump_json())["dense_rmse"] == 0.25


def test_records_of_accuracies_read_as_they_were_written() -> None:
    # What version 0.1.0 wrote, key by key.
    stored = {
        "round": 1, "sparsity_target": 0.5, "accuracy": 0.875, "loss": 0.5,
        "accuracy_pruned": 0.25, "loss_pruned": 1.5, "accuracy_recalibrated": None,
        "loss_recalibrated": None, "robust_accuracy": None, "train_loss": 0.25,
        "train_accuracy": 0.9375, "judged_on": "validation", "kept_step": 4,
        "cost": {
            "num_parameters": 8, "num_nonzero": 4, "macs": 8, "macs_nonzero": 4, "macs_fault": "",
            "num_bytes": 32, "num_bytes_sparse": 24,
            "layers": [{
                "name": "a", "shape": [2, 4], "num_weights": 8, "num_nonzero": 4, "macs": 8,
                "macs_nonzero": 4, "sparsity": 0.5,
            }],
            "unpruned": {}, "sparsity": 0.5, "compression": 2.0,
        },
        "mask_digest": "abc", "held_back": [], "fingerprints": {}, "seconds": {"score": 0.5},
        "files": {}, "sparsity": 0.5,
    }  # fmt: skip
    record = RoundRecord.model_validate(stored)
    assert (record.metric, record.score, record.score_pruned) == (ACCURACY, 0.875, 0.25)
    assert record.values == {"accuracy": 0.875, "loss": 0.5}
    # The names that users know still read.
    known: Any = record
    assert (known.accuracy, known.accuracy_pruned, known.train_accuracy) == (0.875, 0.25, 0.9375)
    assert known.accuracy_recalibrated is None
    assert json.loads(record.model_dump_json()) == stored
    assert list(json.loads(record.model_dump_json())) == list(stored)
    tested = {
        "round": 1, "accuracy": 0.5, "loss": 1.0, "dense_accuracy": 0.75, "dense_loss": 0.5,
        "dense_accuracy_recalibrated": None, "dense_loss_recalibrated": None,
    }  # fmt: skip
    test: Any = FinalTest.model_validate(tested)
    assert (test.dense_score, test.dense_accuracy) == (0.75, 0.75)
    assert json.loads(test.model_dump_json()) == tested


def test_an_accuracy_that_was_not_measured_is_not_made_up() -> None:
    record: Any = record_of(1, [RMSE, R2], [0.5, 0.9])
    for name in ("accuracy", "accuracy_pruned", "train_accuracy"):
        with pytest.raises(GbpError, match="rounds were judged by rmse; read score"):
            getattr(record, name)
    with pytest.raises(AttributeError):
        _ = record.accurracy
    trial = sample_trial(sample_job(), (record_of(0, [RMSE], [0.5]),))
    with pytest.raises(GbpError, match="judged by rmse"):
        _ = trial.test_accuracy
    assert trial.test_score == 0.5


def test_the_dense_reference_is_the_better_one_in_the_metric_s_direction() -> None:
    lower = DenseReference.of(20.0, 1.0, 10.0, 2.0, PERPLEXITY)
    assert (lower.score, lower.is_recalibrated, lower.other_score) == (10.0, True, 20.0)
    assert lower.text == "10 with BatchNorm re-estimated; as stored 20"
    assert lower.to_dict() == {
        "perplexity": 10.0, "loss": 2.0, "is_recalibrated": True, "other_perplexity": 20.0,
    }  # fmt: skip
    higher = DenseReference.of(0.2, 1.0, 0.1, 2.0)
    assert (higher.score, higher.is_recalibrated) == (0.2, False)
    assert list(higher.to_dict()) == ["accuracy", "loss", "is_recalibrated", "other_accuracy"]


def test_the_chosen_round_has_the_lowest_error() -> None:
    def held_out(number: int, value: float) -> RoundRecord:
        # Equally sparse, so that there is a choice.
        cost = sample_round(1, 0.5, seed=3)[0].cost
        return record_of(number, [RMSE], [value], judged_on="validation", cost=cost)

    rounds = [held_out(n, value) for n, value in enumerate([0.5, 0.25, math.nan, 0.75])]
    assert choose_round(rounds).round == 1


def test_a_metric_cannot_have_the_name_of_another_field() -> None:
    job = JobConfig.model_validate(sample_job().model_dump())
    records = (record_of(0, [RMSE, R2], [1.0, 0.5]), record_of(1, [RMSE, R2], [2.0, 0.25]))
    trial = sample_trial(job, records)
    table = tabulate([trial])
    (line,) = summarize(Results("here", {}, table.slice(1)).to_rows(table.column_names), [])
    own = {"rmse", "r2", "score"}
    names = {
        *RoundRecord.model_fields, *FinalTest.model_fields, *TrialRecord.model_fields,
        *table.column_names, *line, *("uri", "job", "sha256"),
    }  # fmt: skip
    free = {name for name in names if "." not in name and is_free(name)}
    assert free <= own, "config.metrics knows of no such fields"
    assert all(map(is_free, ("accuracy", "top5", "perplexity", "mIoU", "rmse", "auroc", "bleu")))


# -- the index -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Store:
    values = {
        seed: [(1.0, 0.9), (1.5 + seed, 0.8 - 0.1 * seed), (3.0 - seed, 0.1 * seed)]
        for seed in range(3)
    }
    return write_job(tmp_path_factory.mktemp("regression"), [RMSE, R2], values)


def test_columns_are_named_by_the_metrics(regression: Store) -> None:
    rebuild_index(regression.objects)
    assert regression.folder is not None
    table = pq.read_table(regression.folder / "index.parquet")
    others = {name for name in table.column_names if "." not in name} - {"robust_accuracy"}
    assert not [name for name in others if "accuracy" in name or "score" in name]
    numbers = {name: table.schema.field(name).type for name in others if "r2" in name}
    numbers |= {name: table.schema.field(name).type for name in others if "rmse" in name}
    assert set(numbers) == {
        *("rmse", "rmse_pruned", "rmse_recalibrated", "train_rmse", "test_rmse"),
        *("r2", "r2_pruned", "r2_recalibrated", "test_r2"),
    }
    assert set(numbers.values()) == {pa.float64()}
    rows = table.to_pylist()
    assert {row["metric"] for row in rows} == {"rmse"}
    assert [spec["name"] for spec in json.loads(rows[0]["metric_specs"])] == ["rmse", "r2"]
    assert sorted(row["rmse"] for row in rows if row["round"] == 2) == [1.0, 2.0, 3.0]
    assert is_current(open_results(regression.uri).table)


def test_an_index_without_a_field_that_jobs_have_today_is_made_anew(tmp_path: Path) -> None:
    store = write_job(tmp_path, [ACCURACY], {0: [(0.75,), (0.5,)], 1: [(0.75,), (0.25,)]})
    rebuild_index(store.objects)
    whole = open_results(store.uri).table
    # As a version without the field has written it; then a trial of today's comes.
    old = whole.drop_columns(["job", "prune.include"])
    assert is_sound(old)
    store.objects.put(INDEX, _dump(old))
    assert find_faults(store.uri).faults == []
    write_job(tmp_path, [ACCURACY], {2: [(0.75,), (0.5,)]})
    found = open_results(store.uri)
    assert found.table["prune.include"].null_count == 0
    assert found.find_varying() == ["seed"]


def test_the_best_is_the_lowest_error_and_the_highest_r2(regression: Store) -> None:
    results = open_results(regression.uri)
    assert results.metrics == (RMSE,)
    assert results.best("rmse@round=2")["rmse"] == 1.0
    assert results.best("rmse_pruned@round>=1")["rmse_pruned"] == 2.0
    assert results.best("r2@round=2")["r2"] == pytest.approx(0.2)
    assert results.best("train_rmse@round=1")["rmse"] == 1.5
    assert [row["rmse"] for row in results.final().sort("rmse").to_rows()] == [1.0, 2.0, 3.0]
    order = [row["r2"] for row in results.final().sort("r2").to_rows()]
    assert order == sorted(order, reverse=True)
    assert len(results.where("rmse < 1.2")) == 4
    assert len(results.where("metric=rmse")) == 9
    with pytest.raises(ConfigError, match="column 'accuracy': there is no such one"):
        results.best("accuracy")


def test_infinite_and_missing_values_are_never_best(tmp_path: Path) -> None:
    values = {
        0: [(20.0,), (math.inf,)],
        1: [(20.0,), (math.nan,)],
        2: [(20.0,), (40.0,)],
    }
    store = write_job(tmp_path, [PERPLEXITY], values)
    results = open_results(store.uri).final()
    assert results.best("perplexity")["perplexity"] == 40.0
    assert [row["perplexity"] for row in results.sort("perplexity").to_rows()][:2] == [
        40.0,
        math.inf,
    ]
    with pytest.raises(StoreError, match="none is best: perplexity is inf throughout"):
        results.where("seed=0").best("perplexity")


def test_metrics_are_not_ranked_together(tmp_path: Path, regression: Store) -> None:
    write_job(tmp_path, [RMSE, R2], {0: [(1.0, 0.9), (2.0, 0.5)]}, "errors")
    write_job(tmp_path, [ACCURACY], {0: [(0.75,), (0.5,)]}, "shares")
    results = open_results(tmp_path)
    with pytest.raises(ConfigError, match=r"2 workloads have such rounds.*metric rmse.*job=errors"):
        results.best("rmse")
    assert results.best("accuracy@job=shares")["accuracy"] == 0.75
    parts = results.final().by_workload()
    assert [part.metrics for _, part in parts] == [(RMSE,), (ACCURACY,)]
    assert [len(part) for _, part in parts] == [1, 1]
    assert results.scores() == [1.0, 2.0, 0.75, 0.5]
    lines = summarize(results.final().to_rows(), ["prune.criterion"])
    assert [(line["rmse"], line["accuracy"]) for line in lines] == [(2.0, None), (None, 0.5)]


def test_a_column_with_two_directions_is_not_sorted(tmp_path: Path) -> None:
    other = RMSE.model_copy(update={"higher_is_better": True})
    write_job(tmp_path, [RMSE], {0: [(1.0,), (2.0,)]}, "one")
    write_job(tmp_path, [other], {0: [(1.0,), (2.0,)]}, "two")
    with pytest.raises(ConfigError, match="rmse is best where it is highest in some workloads"):
        open_results(tmp_path).sort("rmse")


def test_seeds_are_averaged_and_the_best_comes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, "job")
    for criterion, finals in {"taylor": (3.0, 5.0), "fisher": (1.0, 2.0)}.items():
        write_job(
            tmp_path,
            [RMSE],
            {seed: [(1.0,), (value,)] for seed, value in enumerate(finals)},
            criterion=criterion,
        )
    rows = open_results(store.uri).final().to_rows()
    first, second = summarize(rows, ["prune.criterion", "seed"])
    assert (first["prune.criterion"], first["rmse"]) == ("fisher", 1.5)
    assert (second["rmse"], second["rmse_deviation"]) == (4.0, pytest.approx(math.sqrt(2)))
    assert "accuracy" not in first


def test_two_trials_are_compared_by_all_that_they_measured(tmp_path: Path) -> None:
    one = write_job(tmp_path, [RMSE, R2], {0: [(1.0, 0.9), (2.0, 0.5)]}, "errors")
    other = write_job(tmp_path, [ACCURACY], {0: [(0.75,), (0.5,)]}, "shares")
    found = compare_trials(one.uri, other.uri)["metrics"]
    assert found["rmse"] == [2.0, None]
    assert found["r2"] == [0.5, None]
    assert found["accuracy_pruned"] == [None, 1.0]


# -- what people read ------------------------------------------------------------------------------


def test_verbs_speak_of_the_metric(regression: Store, shell: Shell, tmp_path: Path) -> None:
    _, text, _ = shell("results", regression.uri)
    assert "rmse" in text
    assert "accuracy" not in text
    found = shell.json("results", regression.uri)["results"]
    assert [row["rmse"] for row in found] == [1.0, 2.0, 3.0], "best first without being told"
    trial = next(regression.objects.list_folders("trials/").__iter__())
    _, text, _ = shell("show", regression.trial_uri(trial))
    assert "(+" in text
    assert " m against dense)" in text
    write_job(tmp_path, [ACCURACY], {0: [(0.75,), (0.5,)]}, "shares")
    write_job(tmp_path, [RMSE], {0: [(1.0,), (2.0,)]}, "errors")
    _, text, _ = shell("show", str(tmp_path))
    assert "accuracy or rmse" in text or "rmse or accuracy" in text


def test_a_metric_that_jobs_describe_differently_has_one_column(
    tmp_path: Path, shell: Shell
) -> None:
    for number in range(2):
        spec = RMSE.model_copy(update={"chance": float(number)})
        write_job(tmp_path, [spec], {0: [(1.0,), (2.0 + number,)]}, f"job{number}")
    _, text, _ = shell("results", str(tmp_path))
    assert text.count("rmse") == 1
    assert "2 m" in text
    assert "3 m" in text


def test_the_report_is_in_the_metric_s_name_and_direction(
    tmp_path: Path,
) -> None:
    values = {seed: [(1.0,), (3.0 - seed,)] for seed in range(3)}
    store = write_job(tmp_path, [RMSE], values, sparsity=0.5)
    write_job(tmp_path, [RMSE], values, sparsity=0.25)
    page = write_report(store.uri, tmp_path / "report").page.read_text()
    for words in (
        "rmse, m",
        "Rmse against sparsity",
        "some where rmse rises",
        "the lowest is best",
        "sparsest within 1 % of dense",
        # Seed by seed: 3, 2 and 1 after a dense 1.
        "+1 ± 1",
    ):
        assert words in page, words
    assert "ccuracy" not in page.split("</style>")[1]
    assert "points" not in page.split("Points</h3>")[1].split("</section>")[0].replace(
        'class="points"', ""
    )


def test_a_doubtful_metric_is_named_in_the_report(tmp_path: Path, shell: Shell) -> None:
    fault = "accuracy of the dense network is 50.00% on 9 items, no better than by chance (50.00%)"
    store = Store(tmp_path, "job")
    config = sample_job("job", rounds=1)
    store.claim(config)
    for number, value in enumerate((0.5, 0.4)):
        more = {"metric_fault": fault} if number == 0 else {}
        record = record_of(number, [ACCURACY], [value], **more)
        store.write_round(trial_id(config), record, sample_round(number, 0.25 * number, 3)[1])
    records = tuple(store.read_rounds(trial_id(config)))
    assert records[0].metric_fault == fault
    store.write_trial(sample_trial(config, records))
    assert fault in shell("show", store.uri)[1].replace("\n", " ")
    page = write_report(store.uri, tmp_path / "report").page.read_text()
    assert page.count("no better than by chance") >= 2, "the checklist and the answer that is none"
    assert "The metric tells networks apart" in page


def test_a_constant_metric_is_named_and_gives_no_answer(tmp_path: Path) -> None:
    store = write_job(tmp_path, [ACCURACY], {0: [(0.75,), (0.75,), (0.75,)]}, "job")
    (trial,) = open_results(store.uri)
    # 0.75 before fine-tuning would be another measurement; here it was 1.5.
    assert trial.metric_doubt == ""
    same = [r.model_copy(update={"score_pruned": 0.75}) for r in trial.rounds]
    constant = trial.model_copy(update={"rounds": tuple(same)})
    assert "accuracy is 75.00% in all rounds" in constant.metric_doubt
    page = write_report(store.uri, tmp_path / "report").page.read_text()
    assert "accuracy is 75.00% in all rounds" in page


def test_a_metric_that_is_always_zero_is_constant(tmp_path: Path) -> None:
    store = write_job(tmp_path, [R2], {0: [(0.0,), (0.0,), (0.0,)]}, "job")
    (trial,) = open_results(store.uri)
    assert {record.score_pruned for record in trial.rounds[1:]} == {0.0}
    assert "r2 is 0 in all rounds" in trial.metric_doubt


def test_a_list_of_trials_shows_small_errors(tmp_path: Path, shell: Shell) -> None:
    by_seed = {seed: [(0.5,), (0.0000123456789,)] for seed in range(2)}
    store = write_job(tmp_path, [RMSE], by_seed, "job")
    rows = json.loads(shell("show", store.uri, "--json")[1])["trials"]
    assert [row["rmse"] for row in rows] == [0.0000123457] * 2
