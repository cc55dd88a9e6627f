"""Whole jobs that are judged by errors: what is on record, which is best, what a search answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gbp_ray.config.job import JobConfig, expand, load_job, trial_id
from gbp_ray.errors import ConfigError, GbpError, WorkloadError
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store
from gbp_ray.runtime import api
from gbp_ray.runtime.outcomes import Outcome
from gbp_ray.runtime.search import Answer, Bisection, Sparsities, TrialHistory, TrialQueue
from gbp_ray.runtime.trial import run_solo
from gbp_ray.workloads.code import add_import_paths
from gbp_ray.workloads.loading import load_workload

MODULE = """
import torch
from torch import nn
from torch.nn import functional
from gbp_ray import Workload

def make(kind="regression", metrics=()):
    draws = torch.Generator().manual_seed(4)
    inputs = torch.randn(600, 12, generator=draws)
    targets = inputs @ torch.randn(12, 5, generator=draws)
    if kind == "regression":
        targets, width, loss = targets[:, :1], 1, functional.mse_loss
    else:
        targets, width, loss = targets.argmax(dim=1), 5, functional.cross_entropy
    return Workload(
        build_model=lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, width)),
        train=(inputs[:450], targets[:450]), test=(inputs[450:], targets[450:]),
        loss=loss, metrics=list(metrics),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    (folder / "error_workloads.py").write_text(MODULE)
    add_import_paths([str(folder)])
    return folder


def job_in(folder: Path, name: str, metrics: list[str], **changed: Any) -> JobConfig:
    recipe = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 64}
    tree = {
        "name": name,
        "storage": str(folder / "results"),
        "workload": {"factory": "error_workloads:make", "options": {"metrics": metrics}},
        "pretrain": {"epochs": 15, **recipe},
        "prune": {"criterion": "taylor", "sparsity": 0.8, "rounds": 2},
        "finetune": {"epochs": 2, **recipe},
        "cluster": {"num_workers": 0},
    }
    return load_job(JobConfig.model_validate(tree), changed)


def test_a_regression_is_judged_by_its_error(folder: Path) -> None:
    job = job_in(folder, "regression", ["rmse", "r2"])
    results = [
        api.prune(load_job(job, {"prune.sparsity": sparsity}), is_quiet=True)
        for sparsity in (0.5, 0.95)
    ]
    for result in results:
        for record in result.record.rounds:
            # The error on record is that of the weights that were kept, by the textbook.
            model = result.load_model(record.round)
            workload = load_workload(job.workload, job.seed)
            inputs, targets = workload.test
            with torch.no_grad():
                outputs = model.eval()(inputs).double().numpy()
            y = targets.double().numpy()
            rmse = np.sqrt(np.mean((outputs - y) ** 2))
            r2 = 1 - np.sum((outputs - y) ** 2) / np.sum((y - y.mean()) ** 2)
            assert record.score == pytest.approx(rmse, rel=1e-6)
            assert record.metrics == pytest.approx({"rmse": rmse, "r2": r2}, rel=1e-6)
        assert result.score == result.record.final.score
        with pytest.raises(GbpError, match="judged by rmse"):
            _ = result.accuracy
    assert results[0].score < results[1].score
    stored = Store(job.storage, job.name)
    tree = json.loads((Path(results[0].uri) / "round_001" / "round.json").read_text())
    assert {"rmse", "rmse_pruned", "train_rmse", "metrics", "metric"} <= tree.keys()
    assert not any("accuracy" in key for key in tree if key != "robust_accuracy")
    found = open_results(stored.uri)
    assert found.best("rmse@sparsity>=0.4")["rmse"] == results[0].score
    assert found.best("r2@sparsity>=0.4")["trial_id"] == results[0].record.trial_id
    assert [row["rmse"] for row in found.final().sort("rmse").to_rows()] == [
        result.score for result in results
    ]


def test_early_stopping_keeps_the_lowest_perplexity(folder: Path) -> None:
    changed = {
        "workload.options": {"metrics": ["perplexity", "accuracy"], "kind": "classes"},
        "workload.validation": 0.2,
        "finetune.epochs": 6,
        "finetune.patience": 2,
        # So large a step spoils what it begins with.
        "finetune.learning_rate": 0.2,
    }
    record = api.prune(job_in(folder, "words", [], **changed), is_quiet=True).record
    assert record.metric.name == "perplexity"
    for after in record.rounds[1:]:
        assert after.score_pruned is not None
        assert after.score <= after.score_pruned, "what was no better was taken back"
        assert after.score == pytest.approx(np.exp(after.loss), rel=1e-6)
    assert record.test is not None
    assert record.test.score == pytest.approx(np.exp(record.test.loss), rel=1e-6)
    assert set(record.test.metrics) == {"perplexity", "accuracy"}
    row = open_results(Store(folder / "results", "words").uri).chosen().to_rows()[0]
    assert (row["test_perplexity"], row["test_accuracy"]) == (
        record.test.score,
        record.test.metrics["accuracy"],
    )


def test_rounds_of_another_metric_are_not_gone_on_with(folder: Path) -> None:
    job = job_in(folder, "changed", ["rmse"])
    steps = run_solo(job)
    assert next(steps).record.metric.name == "rmse"
    steps.close()  # type: ignore[attr-defined]
    # The same factory and options, but the user's code has changed.
    module = __import__("error_workloads")
    make = module.make
    try:
        module.make = lambda metrics=(): make(metrics=["mae"])
        with pytest.raises(WorkloadError, match=r"judged by rmse \(lowest is best\), but now"):
            list(run_solo(job))
    finally:
        module.make = make
    assert [step.record.round for step in run_solo(job)] == [0, 1, 2]


# -- searches --------------------------------------------------------------------------------------


def answer_of(job: JobConfig) -> Answer:
    """Searches as a sweep does, one trial after another in this process."""
    plan = Bisection(expand(job), Sparsities(job))
    store = Store(job.storage, job.name)
    queue = TrialQueue(plan, TrialHistory(store, job.sweep))
    while (trial := queue.next()) is not None:
        one = trial.model_copy(update={"sweep": load_job().sweep})
        try:
            store.claim(one)
            list(run_solo(one))
            outcome = TrialHistory(store, job.sweep)(one)
        except GbpError as error:
            outcome = Outcome(trial_id(one), one, "failed", cause=str(error))
        assert outcome is not None
        queue.tell(outcome)
    (answer,) = plan.answers()
    return answer


@pytest.mark.parametrize("target", [{"max_relative_drop": 0.25}, {"max_drop": 0.2}])
@pytest.mark.parametrize("metric", ["rmse", "loss", "r2"])
def test_the_answer_is_the_largest_sparsity_that_is_no_worse(
    folder: Path, metric: str, target: dict[str, float]
) -> None:
    # Without fine-tuning, so that more sparsity is worse.
    changed = {"finetune.epochs": 0, "prune.rounds": 1, "sweep.metric": metric}
    job = job_in(folder, "target", ["rmse", "r2"], **changed)
    job = load_job(job, {"sweep.target": {"tolerance": 0.05, **target}})
    answer = answer_of(job)
    assert answer.sparsity is not None, answer.cause
    assert 0 < answer.sparsity < 0.99
    rows = open_results(Store(job.storage, job.name).uri).to_rows()
    dense = next(row for row in rows if row["round"] == 0)[metric]
    allowed = target.get("max_drop", target.get("max_relative_drop", 0) * dense)
    sign = 1 if metric == "r2" else -1

    def is_within(sparsity: float) -> bool:
        (row,) = [row for row in rows if row["round"] == 1 and row["prune.sparsity"] == sparsity]
        return bool(sign * row[metric] >= sign * dense - allowed)

    assert is_within(answer.sparsity)
    assert not is_within(round(answer.sparsity + 0.05, 6))


def test_a_metric_that_the_workload_has_not_is_refused_before_ray_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: Any, **options: Any) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr("gbp_ray.runtime.on_ray.tune.run_sweep", start)
    monkeypatch.setattr("gbp_ray.runtime.estimate.see_machines", lambda job: [])
    changed = {"sweep.space": {"seed": [0, 1]}, "sweep.metric": "rsme"}
    job = job_in(folder, "mistyped", ["rmse"], **changed)
    for run in (api.sweep, api.plan_sweep):
        with pytest.raises(ConfigError, match=r"sweep\.metric = rsme: is no metric.*'rmse'"):
            run(job)


def test_what_no_accuracy_can_judge_gives_no_answer(folder: Path) -> None:
    # No metric is named, so accuracy judges, which outputs of a regression have none of.
    job = load_job(job_in(folder, "blind", []), {"sweep.target.max_drop": 0.01})
    answer = answer_of(job)
    assert answer.sparsity is None
    assert "which are no class numbers of them" in answer.cause


def test_a_network_that_learned_nothing_gives_no_answer(folder: Path) -> None:
    changed = {
        "workload.options": {"kind": "classes"},
        "pretrain.epochs": 0,
        "sweep.target": {"max_drop": 0.05, "tolerance": 0.1},
    }
    job = job_in(folder, "untrained", [], **changed)
    answer = answer_of(job)
    assert answer.sparsity is None
    assert "accuracy of the dense network is" in answer.cause
    assert "no better than by chance (20.00%)" in answer.cause
    (record,) = open_results(Store(job.storage, job.name).uri)
    assert record.metric_doubt in answer.cause
