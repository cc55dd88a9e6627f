"""Early stopping of a sweep's trials, guarded to be fair to pruning.

A metric gets worse at each prune and recovers with fine-tuning, and it gets worse with sparsity. So
a round is judged only

- by its score after fine-tuning,
- after `grace_rounds` pruned rounds,
- after `recovery_rounds` fine-tunings since the last prune, the round's own included (without
  fine-tuning there is nothing to wait for),
- against the same round of trials with the same sparsities after each round.

Rounds of an earlier run count for the comparison and never stop a trial.

Successive halving is Ray Tune's. The median rule is not: Tune's compares the best round so far,
which here is the one that has lost the fewest weights.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from gbp_ray.config.job import JobConfig
from gbp_ray.config.metrics import MetricSpec
from gbp_ray.config.prune import sparsity_schedule
from gbp_ray.config.sweep import SweepConfig
from gbp_ray.results.records import RoundRecord

__all__ = ["GuardedScheduler", "MedianRule", "is_judged", "sparsity_path"]

_RANK, _WORST = "rank", 1e300
_LEAST_COMPANY = 3
"""Number of other trials that a median needs."""


def sparsity_path(job: JobConfig) -> tuple[float, ...]:
    """Lists the sparsities after each round; trials with equal ones can be compared.

    With a target, of its cost; of a number that is no part of the dense network's, which is not
    known here, they only rise when the right ones do, and equal numbers have equal ones.
    """
    prune, last = job.prune, job.prune.sparsity
    if prune.target.is_of_cost:
        value = prune.target.value
        last = 1 - value if value <= 1 else 1 - 1 / value
    return tuple(sparsity_schedule(prune.schedule, last, prune.rounds, prune.ramp_rounds))


def is_judged(sweep: SweepConfig, job: JobConfig, number: int) -> bool:
    """Decides if a trial may be stopped after a round, which is not its last."""
    if not sweep.grace_rounds <= number < job.prune.rounds:
        return False
    if job.finetune.epochs == 0 or job.finetune.after == "last":
        return True
    before = (0.0, *sparsity_path(job))
    last_prune = max((n for n in range(1, number + 1) if before[n] > before[n - 1]), default=0)
    return number - last_prune + 1 >= sweep.recovery_rounds


class GuardedScheduler(FIFOScheduler):  # type: ignore[misc]
    """Applies a stopping rule to the rounds that may be judged, one rule per list of sparsities.

    `judge` describes the metric that judges; `job_of` returns the job of a Tune trial; `stopped` is
    called with job and round of each stop. Rules are given ranks, of which the greatest is best.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        judge: MetricSpec,
        job_of: Callable[[Any], JobConfig],
        stopped: Callable[[JobConfig, int], None],
    ) -> None:
        super().__init__()
        self._sweep, self._judged_by = sweep, judge
        self._job_of, self._stopped = job_of, stopped
        self._rules: dict[tuple[tuple[float, ...], str, str], Any] = {}
        self._is_over: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves itself, but a sweep is resumed from its store.
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Ignores them: the sweep sets the metric."""
        return True

    def remember(self, job: JobConfig, records: Iterable[RoundRecord]) -> None:
        """Enters the rounds of a trial that ended before."""
        earlier = SimpleNamespace(trial_id=f"earlier {job.model_dump_json()}")
        self._rule(job).on_trial_add(None, earlier)
        for record in records:
            self._judge(None, earlier, job, record.round, record.values.get(self._judged_by.name))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enters a trial."""
        self._rule(self._job_of(trial)).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Judges a round."""
        if trial.trial_id in self._is_over:
            return str(TrialScheduler.CONTINUE)
        job, number, value = self._job_of(trial), result["round"], result.get(self._judged_by.name)
        decision = self._judge(tune_controller, trial, job, number, value)
        if decision != TrialScheduler.STOP or result.get("is_old"):
            return str(TrialScheduler.CONTINUE)
        self._is_over.add(trial.trial_id)
        self._stopped(job, number)
        return str(TrialScheduler.STOP)

    def _judge(
        self, tune_controller: Any, trial: Any, job: JobConfig, number: int, value: float | None
    ) -> str:
        # Trials of another workload may not have the metric.
        if value is None or not is_judged(self._sweep, job, number):
            return str(TrialScheduler.CONTINUE)
        # Finite, as rules take means of neighbours.
        rank = min(max(self._judged_by.rank(value), -_WORST), _WORST)
        result = {"round": number, _RANK: rank}
        return str(self._rule(job).on_trial_result(tune_controller, trial, result))

    def _rule(self, job: JobConfig) -> Any:
        # Initial masks decide where the sparsities begin.
        cost = str(job.prune.target.kind or "sparsity")
        path = (sparsity_path(job), cost, job.prune.initial_masks_digest)
        if path not in self._rules:
            sweep = self._sweep
            if sweep.scheduler == "median":
                self._rules[path] = MedianRule()
            else:
                self._rules[path] = ASHAScheduler(
                    time_attr="round",
                    metric=_RANK,
                    mode="max",
                    # Beyond the last round, since ASHA stops every trial there.
                    max_t=max(job.prune.rounds, sweep.grace_rounds) + 1,
                    grace_period=sweep.grace_rounds,
                    reduction_factor=sweep.reduction_factor,
                )
        return self._rules[path]


class MedianRule(FIFOScheduler):  # type: ignore[misc]
    """Stops a trial that is worse than the median of the others at the same round."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[int, dict[str, float]] = defaultdict(dict)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Compares a round with the same round of the others."""
        values, value = self._values[result["round"]], result[_RANK]
        others = [other for name, other in values.items() if name != trial.trial_id]
        values[trial.trial_id] = value
        is_weak = len(others) >= _LEAST_COMPANY and value < statistics.median(others)
        return str(TrialScheduler.STOP if is_weak else TrialScheduler.CONTINUE)
