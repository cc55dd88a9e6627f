"""Who is stopped early: only the weak, only when they have recovered, only among their like."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from gbp_ray.config.job import JobConfig, load_job
from gbp_ray.config.metrics import ACCURACY, LOSS, MetricSpec
from gbp_ray.config.sweep import SweepConfig
from gbp_ray.runtime.on_ray.schedulers import GuardedScheduler, is_judged, sparsity_path


def job_with(**changed: Any) -> JobConfig:
    base = {
        "name": "try",
        "workload": {"factory": "my_module:make"},
        "prune": {"criterion": "taylor", "sparsity": 0.9, "rounds": 9},
        "finetune": {"epochs": 1},
    }
    return load_job(JobConfig.model_validate(base), changed)


class Race:
    """Trials that report rounds to a scheduler, in a drawn order, until they end or are stopped."""

    def __init__(self, judge: MetricSpec = ACCURACY, **sweep: Any) -> None:
        self.stopped: list[tuple[int, int]] = []
        self.scheduler = GuardedScheduler(
            SweepConfig.model_validate(sweep),
            judge,
            lambda trial: trial.job,
            lambda job, number: self.stopped.append((job.seed, number)),
        )

    def run(self, curves: dict[JobConfig | int, list[float]], jobs: list[JobConfig]) -> None:
        order = random.Random(1)
        trials = [SimpleNamespace(trial_id=str(n), job=job) for n, job in enumerate(jobs)]
        for trial in trials:
            self.scheduler.on_trial_add(None, trial)
        left = {trial.trial_id: 0 for trial in trials}
        while left:
            trial = trials[int(order.choice(sorted(left)))]
            number = left[trial.trial_id]
            result = {"round": number, "accuracy": curves[trial.job.seed][number], "loss": 1.0}
            decision = self.scheduler.on_trial_result(None, trial, result)
            left[trial.trial_id] += 1
            if decision == "STOP" or number == trial.job.prune.rounds:
                del left[trial.trial_id]


# -- which rounds may be judged --------------------------------------------------------------------


def judged(job: JobConfig, **sweep: Any) -> list[int]:
    config = SweepConfig.model_validate({"scheduler": "asha", **sweep})
    return [n for n in range(job.prune.rounds + 1) if is_judged(config, job, n)]


def test_neither_the_dense_network_nor_the_last_round_is_judged() -> None:
    assert judged(job_with(**{"prune.rounds": 4})) == [1, 2, 3]
    assert judged(job_with(**{"prune.rounds": 1})) == []


def test_grace_is_counted_in_rounds() -> None:
    assert judged(job_with(**{"prune.rounds": 5}), grace_rounds=3) == [3, 4]


def test_a_trial_that_recovers_is_left_alone() -> None:
    # Pruned in rounds 1 to 3, fine-tuned alone in 4 to 8.
    job = job_with(**{"prune.rounds": 8, "prune.ramp_rounds": 3})
    assert judged(job) == [1, 2, 3, 4, 5, 6, 7]
    assert judged(job, recovery_rounds=2) == [4, 5, 6, 7]
    assert judged(job, recovery_rounds=4) == [6, 7]
    # Each round prunes, so none has had two fine-tunings.
    assert judged(job_with(**{"prune.rounds": 8}), recovery_rounds=2) == []


def test_without_fine_tuning_nothing_is_waited_for() -> None:
    job = job_with(**{"prune.rounds": 4, "finetune.epochs": 0})
    assert judged(job, recovery_rounds=3) == [1, 2, 3]


# -- who is stopped --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_the_weak_are_stopped_and_the_best_never(scheduler: str) -> None:
    jobs = [job_with(seed=seed) for seed in range(12)]
    # Falling with each round, as pruning does; the higher the seed, the better throughout.
    curves = {seed: [0.99 - 0.02 * n - 0.01 * (11 - seed) for n in range(10)] for seed in range(12)}
    race = Race(scheduler=scheduler)
    race.run(curves, jobs)
    stopped = dict(race.stopped)
    assert len(stopped) >= 4
    assert 11 not in stopped
    assert sum(stopped) / len(stopped) < 5.5
    assert all(number >= 1 for number in stopped.values())


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_trials_of_other_sparsities_are_no_company(scheduler: str) -> None:
    # Each is far worse than the ones before, and each walks sparsities of its own.
    jobs = [job_with(seed=seed, **{"prune.sparsity": 0.5 + 0.04 * seed}) for seed in range(12)]
    assert len({sparsity_path(job) for job in jobs}) == 12
    race = Race(scheduler=scheduler)
    race.run({seed: [0.95 - 0.05 * seed] * 10 for seed in range(12)}, jobs)
    assert race.stopped == []


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_fall_right_after_a_prune_stops_nobody(scheduler: str) -> None:
    jobs = [job_with(seed=seed, **{"prune.ramp_rounds": 5}) for seed in range(8)]
    # Seeds 0 to 3 fall deep while they are pruned and come back after it.
    deep, even = [0.9, 0.1, 0.1, 0.1, 0.1, 0.2, 0.99, 0.99, 0.99, 0.99], [0.9] * 10
    race = Race(scheduler=scheduler, recovery_rounds=2)
    race.run({seed: deep if seed < 4 else even for seed in range(8)}, jobs)
    assert not [seed for seed, _ in race.stopped if seed < 4]
    eager = Race(scheduler=scheduler, recovery_rounds=1)
    eager.run({seed: deep if seed < 4 else even for seed in range(8)}, jobs)
    assert [seed for seed, _ in eager.stopped if seed < 4], "the guard made no difference"


def test_the_loss_is_better_when_it_is_less() -> None:
    race = Race(LOSS, scheduler="median")
    jobs = [job_with(seed=seed) for seed in range(6)]
    for seed, job in enumerate(jobs):
        trial = SimpleNamespace(trial_id=str(seed), job=job)
        race.scheduler.on_trial_add(None, trial)
        race.scheduler.on_trial_result(None, trial, {"round": 1, "loss": float(seed)})
    assert race.stopped == [(3, 1), (4, 1), (5, 1)]


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_earlier_trials_count_and_old_rounds_stop_nobody(scheduler: str) -> None:
    race = Race(scheduler=scheduler)
    for seed in range(6):
        values = {"accuracy": 0.9, "loss": 0.1}
        records: Any = [SimpleNamespace(round=n, values=values) for n in range(10)]
        race.scheduler.remember(job_with(seed=seed), records)
    weak = SimpleNamespace(trial_id="weak", job=job_with(seed=9))
    race.scheduler.on_trial_add(None, weak)
    old = {"round": 1, "accuracy": 0.1, "loss": 2.0, "is_old": True}
    assert race.scheduler.on_trial_result(None, weak, old) == "CONTINUE"
    new = [{"round": n, "accuracy": 0.1, "loss": 2.0} for n in (2, 3)]
    assert "STOP" in [race.scheduler.on_trial_result(None, weak, result) for result in new]
    assert len(race.stopped) == 1


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_weak_are_those_at_the_metric_s_other_end(
    scheduler: str, higher_is_better: bool
) -> None:
    judge = MetricSpec(name="rmse", higher_is_better=higher_is_better)
    race = Race(judge, scheduler=scheduler)
    jobs = [job_with(seed=seed) for seed in range(9)]
    for seed, job in enumerate(jobs):
        trial = SimpleNamespace(trial_id=str(seed), job=job)
        race.scheduler.on_trial_add(None, trial)
        # Trials come from the best to the worst.
        value = 9.0 - seed if higher_is_better else 1.0 + seed
        race.scheduler.on_trial_result(None, trial, {"round": 1, "rmse": value, "loss": 1.0})
    assert (0, 1) not in race.stopped
    assert {(seed, 1) for seed in range(4, 9)} <= set(race.stopped)


def test_what_is_no_number_is_weak_and_what_is_missing_is_not_judged() -> None:
    race = Race(MetricSpec(name="rmse", higher_is_better=False), scheduler="median")
    values = {"rmse": 1.0}, {"rmse": 2.0}, {"rmse": math.inf}, {"rmse": math.nan}, {"rmse": 1.5}, {}
    for seed, measured in enumerate(values):
        trial = SimpleNamespace(trial_id=str(seed), job=job_with(seed=seed))
        race.scheduler.on_trial_add(None, trial)
        race.scheduler.on_trial_result(None, trial, {"round": 1, "accuracy": 0.0, **measured})
    assert race.stopped == [(3, 1)]
