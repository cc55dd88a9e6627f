"""Which trials of a sweep are stopped early, and the guard that keeps this fair to pruning.

Accuracy falls at each prune and comes back with fine-tuning, and it falls for good where more is
removed. So a round is judged only

- on its accuracy after fine-tuning,
- after `grace_rounds` pruned rounds,
- once `recovery_rounds` fine-tunings have followed the last prune, the round's own included
  (without fine-tuning nothing recovers, and nothing is waited for),
- against trials that walk the very same sparsities, at the same round.

A round that an earlier run has left is taken into account and never a reason to stop.

Successive halving is Ray Tune's. The median rule is our own: Tune's compares the best of all rounds
so far, which here is the one that has lost the fewest weights.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from gbp_ray.config.job import JobConfig
from gbp_ray.config.prune import sparsity_schedule
from gbp_ray.config.sweep import SweepConfig
from gbp_ray.results.records import RoundRecord

__all__ = [
    "GuardedScheduler",
    "MedianRule",
    "is_judged",
    "sparsity_path",
]

_LEAST_COMPANY = 3
"""Others that the median needs."""


def sparsity_path(job: JobConfig) -> tuple[float, ...]:
    """Lists the sparsities after each round: trials with the same ones can be compared."""
    prune = job.prune
    return tuple(sparsity_schedule(prune.schedule, prune.sparsity, prune.rounds, prune.ramp_rounds))


def is_judged(sweep: SweepConfig, job: JobConfig, number: int) -> bool:
    """Tells whether a trial may be stopped after a round."""
    # The last round needs no stopping.
    if not sweep.grace_rounds <= number < job.prune.rounds:
        return False
    if job.finetune.epochs == 0:
        return True
    before = (0.0, *sparsity_path(job))
    last_prune = max((n for n in range(1, number + 1) if before[n] > before[n - 1]), default=0)
    return number - last_prune + 1 >= sweep.recovery_rounds


class GuardedScheduler(FIFOScheduler):  # type: ignore[misc]
    """Lets a rule of stopping judge the rounds that may be judged, one rule per walk.

    Args:
        sweep: Names the rule and sets the guard.
        job_of: Finds the job of a Tune trial.
        stopped: Told of each stop, with the trial's job and the round.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        job_of: Callable[[Any], JobConfig],
        stopped: Callable[[JobConfig, int], None],
    ) -> None:
        super().__init__()
        self._sweep, self._job_of, self._stopped = sweep, job_of, stopped
        self._rules: dict[tuple[tuple[float, ...], str], Any] = {}
        self._is_over: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves itself, but it is the store that a sweep is resumed from.
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Takes nothing over: the sweep says what counts."""
        return True

    def remember(self, job: JobConfig, records: Iterable[RoundRecord]) -> None:
        """Takes a trial that ended before into account."""
        standing = _Standing(job)
        self._rule(job).on_trial_add(None, standing)
        for record in records:
            self._judge(None, standing, job, record.round, getattr(record, self._sweep.metric))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enters a trial."""
        self._rule(self._job_of(trial)).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Judges a round."""
        if self._sweep.metric not in result or trial.trial_id in self._is_over:
            return str(TrialScheduler.CONTINUE)
        job, number = self._job_of(trial), result["round"]
        decision = self._judge(tune_controller, trial, job, number, result[self._sweep.metric])
        if decision != TrialScheduler.STOP or result.get("is_old"):
            return str(TrialScheduler.CONTINUE)
        self._is_over.add(trial.trial_id)
        self._stopped(job, number)
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Does nothing: the rounds have been told one by one."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing: what a broken trial reached before still counts."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing."""

    def _judge(
        self, tune_controller: Any, trial: Any, job: JobConfig, number: int, value: float
    ) -> str:
        if not is_judged(self._sweep, job, number):
            return str(TrialScheduler.CONTINUE)
        result = {"round": number, self._sweep.metric: value}
        return str(self._rule(job).on_trial_result(tune_controller, trial, result))

    def _rule(self, job: JobConfig) -> Any:
        # Where masks are given, they decide where the walk begins.
        walk = (sparsity_path(job), job.prune.initial_masks_digest)
        if walk not in self._rules:
            self._rules[walk] = self._make_rule(job)
        return self._rules[walk]

    def _make_rule(self, job: JobConfig) -> Any:
        mode = "max" if self._sweep.metric == "accuracy" else "min"
        if self._sweep.scheduler == "median":
            return MedianRule(self._sweep.metric, mode)
        return ASHAScheduler(
            time_attr="round",
            metric=self._sweep.metric,
            mode=mode,
            # The best trial is not to be stopped for having come to its end.
            max_t=max(job.prune.rounds, self._sweep.grace_rounds) + 1,
            grace_period=self._sweep.grace_rounds,
            reduction_factor=self._sweep.reduction_factor,
        )


class MedianRule:
    """Stops a trial that is worse than the median of the others at the same round."""

    def __init__(self, metric: str, mode: str) -> None:
        self._metric, self._sign = metric, 1 if mode == "max" else -1
        self._values: dict[int, dict[str, float]] = defaultdict(dict)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing: a trial counts from its first judged round on."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Compares a round with what the others have reached in it so far."""
        values, value = self._values[result["round"]], self._sign * result[self._metric]
        others = [other for name, other in values.items() if name != trial.trial_id]
        values[trial.trial_id] = value
        is_weak = len(others) >= _LEAST_COMPANY and value < statistics.median(others)
        return str(TrialScheduler.STOP if is_weak else TrialScheduler.CONTINUE)


class _Standing:
    """What a rule needs of a trial that no longer runs."""

    def __init__(self, job: JobConfig) -> None:
        self.trial_id = f"earlier {job.model_dump_json()}"
