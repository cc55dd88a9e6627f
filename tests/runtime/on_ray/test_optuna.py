"""Trials that Optuna chooses: from what was reached, none twice, on from where it stood."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.runtime.on_ray.optuna import OptunaPlan, make_search
from gbp_ray.runtime.outcomes import Outcome

pytest.importorskip("optuna")

SPACE = {
    "finetune.learning_rate": {"loguniform": [1e-4, 1.0]},
    "prune.criterion": ["magnitude", "fisher"],
    "prune.rounds": {"uniform": [1, 4]},
}


def job_with(num_samples: int, space: dict[str, Any] = SPACE) -> JobConfig:
    sweep = {"space": space, "search": "optuna", "num_samples": num_samples}
    return load_job(None, {"sweep": sweep})


def truth(job: JobConfig) -> float:
    """Best at a learning rate of 0.01 with fisher."""
    away = abs(math.log10(job.finetune.learning_rate) + 2)
    return 0.9 - 0.1 * away - 0.2 * (job.prune.criterion == "magnitude")


def drive(plan: OptunaPlan) -> list[JobConfig]:
    done = []
    while (job := plan.next()) is not None:
        done.append(job)
        values = {"accuracy": truth(job), "loss": 1.0}
        plan.tell(Outcome(trial_id(job), job, "finished", values=values))
    assert plan.is_over
    return done


def test_it_goes_where_it_is_better() -> None:
    jobs = drive(OptunaPlan(job_with(40), [], make_search))
    assert len({trial_id(job) for job in jobs}) == len(jobs) == 40
    assert {job.prune.rounds for job in jobs} <= {1, 2, 3, 4}
    first, last = jobs[:10], jobs[-10:]
    assert sum(map(truth, last)) > sum(map(truth, first)) + 0.5
    assert all(job.sweep.space == {} for job in jobs)


def test_it_goes_on_from_what_is_there() -> None:
    earlier = drive(OptunaPlan(job_with(25), [], make_search))
    # All there: Optuna is not even made.
    assert drive(OptunaPlan(job_with(25), earlier, lambda base: 1 / 0)) == earlier
    more = drive(OptunaPlan(job_with(35), earlier, make_search))
    assert more[:25] == earlier
    assert len({trial_id(job) for job in more}) == 35
    assert sum(map(truth, more[25:])) / 10 > sum(map(truth, earlier)) / 25


def test_a_space_without_more_to_try_ends() -> None:
    jobs = drive(
        OptunaPlan(job_with(9, {"prune.criterion": ["magnitude", "fisher"]}), [], make_search)
    )
    assert sorted(job.prune.criterion for job in jobs) == ["fisher", "magnitude"]


def test_what_the_schema_refuses_costs_nothing() -> None:
    space = {"prune.sparsity": [0.5, 0.8], "prune.layer_max_sparsity": [0.6, 1.0]}
    jobs = drive(OptunaPlan(job_with(9, space), [], make_search))
    found = {(job.prune.sparsity, job.prune.layer_max_sparsity) for job in jobs}
    assert found == {(0.5, 0.6), (0.5, 1.0), (0.8, 1.0)}
