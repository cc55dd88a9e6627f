"""Which trial comes next: lists, bisections against a known truth, and what is known beforehand."""

from __future__ import annotations

import math
import random
import re
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbp_ray.config.job import JobConfig, expand, load_job, trial_id
from gbp_ray.config.metrics import ACCURACY, LOSS, MetricSpec
from gbp_ray.config.sweep import SweepConfig
from gbp_ray.errors import ConfigError, GbpError
from gbp_ray.runtime.outcomes import Outcome, find_judge, warn_of_idle_metric
from gbp_ray.runtime.search import (
    Bisection,
    Sparsities,
    TrialList,
    TrialQueue,
    describe_answer,
    first_of_each_group,
)


def job_with(**changed: Any) -> JobConfig:
    base = {
        "name": "try",
        "workload": {"factory": "my_module:make"},
        "prune": {"criterion": "taylor", "sparsity": 0.5},
    }
    return load_job(JobConfig.model_validate(base), changed)


def outcome_of(job: JobConfig, accuracy: float = 0.9, **changed: Any) -> Outcome:
    found = {"dense_accuracy": 0.95, "loss": 0.5, "seconds": 2.0} | changed
    values = {"accuracy": accuracy, "loss": found.pop("loss")}
    dense = {"accuracy": found.pop("dense_accuracy"), "loss": 0.4}
    state = found.pop("state", "finished")
    return Outcome(trial_id(job), job, state, **{"values": values, "dense": dense, **found})


def run(plan: Any, truth: Any, num_slots: int, order: random.Random) -> tuple[int, list[float]]:
    """Runs a plan, trials ending in any order; returns how many at most ran, and what was tried."""
    plan.num_slots = num_slots
    running: list[JobConfig] = []
    most, tried = 0, []
    while True:
        while len(running) < num_slots and (job := plan.next()) is not None:
            running.append(job)
            tried.append(job.prune.sparsity)
        most = max(most, len(running))
        if not running:
            break
        plan.tell(truth(running.pop(order.randrange(len(running)))))
    assert plan.is_over
    return most, tried


# -- lists -----------------------------------------------------------------------------------------


def test_a_list_is_given_out_in_order_and_over_when_all_have_ended() -> None:
    jobs = expand(job_with(**{"sweep.space": {"seed": [0, 1, 2]}}))
    plan = TrialList(jobs)
    assert [plan.next() for _ in range(4)] == [*jobs, None]
    for job in jobs:
        assert not plan.is_over
        plan.tell(outcome_of(job))
    assert plan.is_over


def test_known_trials_are_never_given_out() -> None:
    jobs = expand(job_with(**{"sweep.space": {"seed": [0, 1, 2, 3]}}))
    feeder = TrialQueue(TrialList(jobs), lambda job: outcome_of(job) if job.seed % 2 else None)
    first = feeder.next()
    assert first is not None
    feeder.put_back(first)
    assert feeder.num_running == 0
    given_out = []
    while (job := feeder.next()) is not None:
        given_out.append(job.seed)
        feeder.tell(outcome_of(job))
    assert given_out == [0, 2]
    assert feeder.is_over
    assert len(feeder.outcomes) == 4


def test_a_trial_that_others_have_comes_again_when_no_other_is_left() -> None:
    jobs = [job_with(seed=seed) for seed in range(4)]
    feeder = TrialQueue(TrialList(jobs), lambda job: None)
    first, second = feeder.next(), feeder.next()
    assert (first, second) == (jobs[0], jobs[1])
    assert not feeder.is_deferred(jobs[0])
    feeder.defer(jobs[0])
    assert feeder.num_running == 1
    assert [feeder.next() for _ in range(4)] == [jobs[2], jobs[3], jobs[0], None]
    assert feeder.is_deferred(jobs[0])
    for job in jobs[1:]:
        feeder.tell(outcome_of(job))
    assert not feeder.is_over
    feeder.defer(jobs[0])
    assert not feeder.is_over
    assert feeder.next() == jobs[0]
    feeder.tell(outcome_of(jobs[0]))
    assert feeder.is_over
    assert list(feeder.outcomes) == [trial_id(job) for job in (*jobs[1:], jobs[0])]


def test_one_of_each_group_comes_first() -> None:
    jobs = expand(job_with(**{"sweep.space": {"prune.sparsity": [0.5, 0.9], "seed": [0, 1]}}))
    groups = {trial_id(job): str(job.seed) for job in jobs}
    order = [(job.prune.sparsity, job.seed) for job in first_of_each_group(jobs, groups)]
    assert order == [(0.5, 0), (0.5, 1), (0.9, 0), (0.9, 1)]
    alone = dict.fromkeys(groups)
    assert first_of_each_group(jobs, alone) == jobs
    jobs = expand(job_with(**{"sweep.space": {"seed": [0, 1], "prune.sparsity": [0.5, 0.9]}}))
    order = [(job.prune.sparsity, job.seed) for job in first_of_each_group(jobs, groups)]
    assert order == [(0.5, 0), (0.5, 1), (0.9, 0), (0.9, 1)]


# -- bisection -------------------------------------------------------------------------------------


@given(
    edges=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4),
    num_slots=st.integers(1, 9),
    seed=st.integers(0, 99),
    lowest=st.sampled_from([0.0, 0.3]),
    tolerance=st.sampled_from([0.01, 0.05, 0.07]),
)
def test_the_largest_sparsity_is_found_whatever_the_order(
    edges: list[float], num_slots: int, seed: int, lowest: float, tolerance: float
) -> None:
    target = {"max_drop": 0.01, "lowest": lowest, "tolerance": tolerance, "highest": 0.95}
    job = job_with(**{"sweep.space": {"seed": list(range(len(edges)))}, "sweep.target": target})

    def truth(one: JobConfig) -> Outcome:
        return outcome_of(one, 0.945 if one.prune.sparsity <= edges[one.seed] else 0.5)

    plan = Bisection(expand(job), Sparsities(job))
    most, tried = run(plan, truth, num_slots, random.Random(seed))
    assert most <= num_slots
    grid = [round(lowest + n * tolerance, 6) for n in range(200)]
    grid = [sparsity for sparsity in grid if sparsity <= 0.95 + 1e-9]
    assert set(tried) <= set(grid)
    for edge, answer in zip(edges, plan.answers(), strict=True):
        within = [sparsity for sparsity in grid if sparsity <= edge]
        if within or lowest == 0:
            assert answer.sparsity == (max(within) if within else 0.0)
            assert answer.job.prune.sparsity == answer.sparsity
        else:
            assert answer.sparsity is None
        assert answer.is_highest == (bool(within) and max(within) == grid[-1])
    if num_slots == 1:
        # Halving: 95 sparsities in seven trials.
        assert len(tried) <= len(edges) * (len(grid)).bit_length()
        assert len(tried) == sum(answer.num_trials for answer in plan.answers())


def test_a_drop_of_just_the_target_is_within_it() -> None:
    job = job_with(**{"sweep.target.max_drop": 0.01})
    sparsities = Sparsities(job)
    assert sparsities.is_within(outcome_of(job, 0.97, dense_accuracy=0.98))
    assert not sparsities.is_within(outcome_of(job, 0.969, dense_accuracy=0.98))


def test_a_failed_trial_ends_its_search_alone() -> None:
    job = job_with(**{"sweep.space": {"seed": [0, 1]}, "sweep.target": {"max_drop": 0.01}})

    def truth(one: JobConfig) -> Outcome:
        if one.seed == 0:
            return outcome_of(one, state="failed", cause="out of luck")
        return outcome_of(one, 0.949)

    plan = Bisection(expand(job), Sparsities(job))
    run(plan, truth, 2, random.Random(0))
    broken, found = plan.answers()
    assert (broken.sparsity, broken.cause) == (None, "out of luck")
    assert found.sparsity == pytest.approx(0.99)
    assert found.is_highest
    assert found.seconds == 2.0 * found.num_trials


@pytest.mark.parametrize(
    ("accuracy", "dense", "cause"),
    [
        (0.0, 0.0, "accuracy is 0 throughout"),
        (0.3, 0.0, "accuracy is 0 throughout"),
        (79.0, 79.0, "accuracy 79 is no share of examples"),
        (0.75, 0.75, "accuracy is 75.00% at all 7 sparsities that were tried and of the dense"),
    ],
)
def test_a_metric_that_tells_nothing_gives_no_answer(
    accuracy: float, dense: float, cause: str
) -> None:
    job = job_with(**{"sweep.target": {"max_drop": 0.01}})
    plan = Bisection(expand(job), Sparsities(job))

    def truth(one: JobConfig) -> Outcome:
        return outcome_of(one, accuracy, dense_accuracy=dense)

    _, tried = run(plan, truth, 1, random.Random(0))
    (answer,) = plan.answers()
    assert cause in answer.cause
    assert (answer.sparsity, answer.trial_id, answer.accuracy) == (None, None, None)
    assert not answer.is_highest
    # Nothing more is tried once it is known.
    assert len(tried) == (7 if 0 < accuracy == dense < 1 else 1)


@pytest.mark.parametrize(
    ("accuracies", "dense", "changed", "words"),
    [
        ([0.0, 0.0], 0.0, {}, "only the loss does"),
        ([0.0, 0.0], 0.0, {"search": "optuna"}, "set sweep.metric to loss"),
        ([0.5, 0.5], 0.5, {"scheduler": "median"}, "is 0.5 in all 2 trials"),
        ([0.5, 0.5], 0.5, {}, ""),
        ([0.5, 0.4], 0.5, {"scheduler": "asha"}, ""),
        ([0.0, 0.0], 0.0, {"metric": "loss", "scheduler": "asha"}, ""),
    ],
)
def test_a_sweep_by_a_metric_that_tells_nothing_says_so(
    accuracies: list[float], dense: float, changed: dict[str, str], words: str
) -> None:
    jobs = [job_with(seed=seed) for seed in range(len(accuracies))]
    outcomes = [
        outcome_of(job, accuracy, dense_accuracy=dense, loss=job.seed)
        for job, accuracy in zip(jobs, accuracies, strict=True)
    ]
    sweep = jobs[0].sweep.model_copy(update=changed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_idle_metric(outcomes, sweep)
    assert [words in str(warning.message) for warning in caught] == [True] * bool(words)


def test_an_answer_names_its_trial() -> None:
    job = job_with(**{"sweep.target": {"max_drop": 0.01, "tolerance": 0.1}})
    plan = Bisection(expand(job), Sparsities(job))
    run(
        plan,
        lambda one: outcome_of(
            one, 0.95 if one.prune.sparsity < 0.65 else 0.2, dense_is_recalibrated=True
        ),
        1,
        random.Random(0),
    )
    (answer,) = plan.answers()
    assert answer.sparsity == 0.6
    assert answer.dense_is_recalibrated
    assert answer.trial_id == trial_id(job_with(**{"prune.sparsity": 0.6}))
    assert (answer.accuracy, answer.dense_accuracy) == (0.95, 0.95)


# -- other metrics than the accuracy ---------------------------------------------------------------

RMSE = MetricSpec(name="rmse", higher_is_better=False)
R2 = MetricSpec(name="r2")


def errors_of(job: JobConfig, **changed: Any) -> Outcome:
    """Makes an outcome whose errors double between sparsity 0 and 0.9, r2 falls and the loss."""
    grown = 1 + job.prune.sparsity / 0.9
    values = {"rmse": 2 * grown, "r2": 0.98 / grown, "loss": grown**2}
    dense = {"rmse": 2.0, "r2": 0.98, "loss": 1.0}
    found = {"values": values, "dense": dense, "specs": (RMSE, R2)} | changed
    return Outcome(trial_id(job), job, "finished", **found)


def search_with(target: dict[str, Any], **sweep: Any) -> Bisection:
    whole = {"tolerance": 0.01, **target}
    job = job_with(**{"sweep.target": whole, **{f"sweep.{k}": v for k, v in sweep.items()}})
    return Bisection(expand(job), Sparsities(job))


def test_a_search_that_failed_is_told_in_the_metric_of_its_other_trials() -> None:
    plan = search_with({"max_drop": 0.5})

    def truth(job: JobConfig) -> Outcome:
        if job.prune.sparsity == 0.5:
            return Outcome(trial_id(job), job, "failed", cause="broke")
        return errors_of(job)

    run(plan, truth, 2, random.Random(0))
    (answer,) = plan.answers()
    assert (answer.cause, answer.metric, answer.dense_score) == ("broke", RMSE, 2.0)


@pytest.mark.parametrize(
    ("target", "metric", "largest"),
    [
        # rmse 2 (1 + s / 0.9): up by 0.5 at s = 0.225, by a tenth at s = 0.09.
        ({"max_drop": 0.5}, None, 0.22),
        ({"max_drop": 0.5}, "rmse", 0.22),
        ({"max_relative_drop": 0.1}, None, 0.09),
        ({"max_drop": 1.5}, "rmse", 0.67),
        # r2 0.98 / (1 + s / 0.9): down by 0.1 at s = 0.1023.
        ({"max_drop": 0.1}, "r2", 0.10),
        # The loss (1 + s / 0.9)^2: up by a half at s = 0.2023.
        ({"max_relative_drop": 0.5}, "loss", 0.20),
    ],
)
def test_the_target_is_in_the_metric_s_direction_and_unit(
    target: dict[str, Any], metric: str | None, largest: float
) -> None:
    plan = search_with(target, metric=metric)
    run(plan, errors_of, 2, random.Random(1))
    (answer,) = plan.answers()
    assert answer.sparsity == largest
    name = metric or "rmse"
    assert answer.metric.name == name
    grown = 1 + largest / 0.9
    expected = {"rmse": 2 * grown, "r2": 0.98 / grown, "loss": grown**2}[name]
    assert answer.score == pytest.approx(expected)
    described = describe_answer(answer, [answer])
    assert described[name] == answer.score
    assert described[f"dense_{name}"] == answer.dense_score
    assert "accuracy" not in described
    with pytest.raises(GbpError, match=f"judged by {name}"):
        _ = answer.accuracy


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"doubt": "rmse of the dense network is 9, no better than by chance"}, "by chance"),
        ({"dense": {"rmse": math.inf, "loss": 1.0}}, "rmse is inf throughout"),
        ({"dense": {"loss": 1.0}}, "rmse is nan throughout"),
        ({"specs": (R2,)}, "sweep.metric = rmse: is no metric of this workload"),
    ],
)
def test_no_search_answers_from_a_metric_that_tells_nothing(
    changed: dict[str, Any], cause: str
) -> None:
    plan = search_with({"max_drop": 0.5}, metric="rmse")
    _, tried = run(plan, lambda job: errors_of(job, **changed), 1, random.Random(0))
    (answer,) = plan.answers()
    assert cause in answer.cause
    assert answer.sparsity is None
    assert len(tried) == 1


def test_a_constant_metric_gives_no_answer() -> None:
    values = {"rmse": 2.0, "loss": 1.0}
    plan = search_with({"max_relative_drop": 0.1})
    run(plan, lambda job: errors_of(job, values=values), 1, random.Random(0))
    (answer,) = plan.answers()
    assert answer.sparsity is None
    assert "rmse is 2 at all" in answer.cause
    assert "judge by another metric" in answer.cause


def test_what_is_not_a_number_is_outside_of_every_target() -> None:
    job = job_with(**{"sweep.target.max_relative_drop": 0.9})
    for value in (math.nan, math.inf):
        outcome = errors_of(job, values={"rmse": value, "loss": 1.0})
        assert not Sparsities(job).is_within(outcome)


@pytest.mark.parametrize(
    ("sweep", "specs", "words"),
    [
        ({"metric": "rmsee"}, (RMSE, R2), "did you mean 'rmse'? (allowed: rmse, r2, loss)"),
        ({"metric": "accuracy"}, (RMSE,), "is no metric of this workload (allowed: rmse, loss)"),
        ({"target": {"max_drop": 2.0}}, (ACCURACY,), "max_drop = 2: must be below 1 for accuracy"),
    ],
)
def test_a_metric_that_the_workload_has_not_is_refused(
    sweep: dict[str, Any], specs: tuple[MetricSpec, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        find_judge(SweepConfig.model_validate(sweep), specs)
    assert find_judge(SweepConfig(), specs) == specs[0]
    assert find_judge(SweepConfig(metric="loss"), specs) == LOSS
