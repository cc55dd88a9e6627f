"""Trials that Optuna suggests from earlier results, by Ray Tune's `OptunaSearch`.

Finished trials of the job inside the space are its memory: a repeated search starts from them and
adds those missing to `num_samples`. A combination that the schema refuses, or that was tried
before, is reported to Optuna at once and costs nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gbp_ray.config.job import JobConfig, takes_whole_numbers, trial_id
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.config.sweep import Axis, parse_space
from gbp_ray.errors import ConfigError
from gbp_ray.runtime.outcomes import Outcome, find_judge
from gbp_ray.runtime.search import SearchPlan, job_at, space_fields, values_at

__all__ = ["OptunaPlan", "make_search"]

_MOST_ATTEMPTS = 100
"""Useless combinations in a row before the space counts as exhausted."""


class OptunaPlan(SearchPlan):
    """Plans `num_samples` trials, finished ones of this space included.

    `make_search`, normally this module's, is called only if trials are left, and so is `read_specs`
    only where no finished trial tells which metrics the workload has.
    """

    def __init__(
        self,
        base: JobConfig,
        earlier: Iterable[JobConfig],
        make_search: Callable[[JobConfig, MetricSpec], Any],
        read_specs: Callable[[JobConfig], Sequence[MetricSpec]] = lambda job: (ACCURACY,),
    ) -> None:
        self._base, self._make_search, self._read_specs = base, make_search, read_specs
        self._judge = ACCURACY
        self.total = base.sweep.num_samples
        self._earlier = deque(list(earlier)[: self.total])
        self._num_given = 0
        self._search: Any = None
        self._keys: dict[str, str] = {}
        self._told: dict[str, Outcome] = {}
        self._num_running = 0

    def next(self) -> JobConfig | None:
        """Returns the earlier trials, then Optuna's suggestions."""
        assert self.total is not None
        if self._num_given >= self.total:
            return None
        job = self._earlier.popleft() if self._earlier else self._suggest()
        if job is not None:
            self._num_given += 1
            self._num_running += 1
        return job

    def tell(self, outcome: Outcome) -> None:
        """Reports a trial's end to Optuna."""
        self._num_running -= 1
        self._told[outcome.trial_id] = outcome
        if (key := self._keys.get(outcome.trial_id)) is not None:
            self._report(key, outcome)

    @property
    def is_over(self) -> bool:
        """True when all trials have ended."""
        assert self.total is not None
        return self._num_running == 0 and self._num_given >= self.total

    def _suggest(self) -> JobConfig | None:
        if self._search is None:
            known = next((outcome.specs for outcome in self._told.values()), None)
            specs = self._read_specs(self._base) if known is None else known
            self._judge = find_judge(self._base.sweep, specs)
            self._search = self._make_search(self._base, self._judge)
            fields = space_fields(self._base)
            for outcome in self._told.values():
                if (value := self._value_of(outcome)) is not None:
                    self._search.add_evaluated_point(values_at(outcome.job, fields), value)
        for attempt in range(_MOST_ATTEMPTS):
            key = f"{self._num_given}-{attempt}"
            values = self._search.suggest(key)
            try:
                job = job_at(self._base, values)
            except ConfigError:
                self._search.on_trial_complete(key, error=True)
                continue
            name = trial_id(job)
            if name in self._told:
                self._report(key, self._told[name])
            elif name in self._keys:
                self._search.on_trial_complete(key, error=True)
            else:
                self._keys[name] = key
                return job
        self.total = self._num_given
        return None

    def _report(self, key: str, outcome: Outcome) -> None:
        if (value := self._value_of(outcome)) is not None:
            self._search.on_trial_complete(key, {self._judge.name: value})
        else:
            self._search.on_trial_complete(key, error=True)

    def _value_of(self, outcome: Outcome) -> float | None:
        value = outcome.values.get(self._judge.name)
        is_told = outcome.state == "finished" and value is not None and not math.isnan(value)
        return value if is_told else None


def make_search(base: JobConfig, judge: MetricSpec) -> Any:
    """Makes Tune's Optuna search over the space of a sweep, for what judges its trials."""
    # Optuna is an extra.
    import optuna

    # isort: split
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = base.sweep
    space = {axis.fields[0]: _domain(tune, axis) for axis in parse_space(sweep.space)}
    return OptunaSearch(
        OptunaSearch.convert_search_space(space),
        metric=judge.name,
        mode="max" if judge.higher_is_better else "min",
        seed=base.seed,
    )


def _domain(tune: Any, axis: Axis) -> Any:
    if not axis.is_drawn:
        return tune.choice([value for (value,) in axis.points(takes_whole_numbers)])
    if axis.kind == "choice":
        return tune.choice([value for (value,) in axis.given])
    (low,), (high,) = axis.given
    if axis.is_whole(takes_whole_numbers):
        # Tune excludes the upper bound.
        return (tune.lograndint if axis.kind == "loguniform" else tune.randint)(low, high + 1)
    return (tune.loguniform if axis.kind == "loguniform" else tune.uniform)(low, high)
