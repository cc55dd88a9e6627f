"""The end of a trial in a sweep, and what a sweep judges its trials by."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gbp_ray.config.job import JobConfig
from gbp_ray.config.metrics import ACCURACY, LOSS, MetricSpec
from gbp_ray.config.schema import nearest_name
from gbp_ray.config.sweep import SweepConfig
from gbp_ray.errors import ConfigError
from gbp_ray.results.scores import DenseReference, as_accuracy

__all__ = ["Outcome", "dense_values", "find_judge", "values_in", "warn_of_idle_metric"]


@dataclass(frozen=True)
class Outcome:
    """The end of a trial in a sweep, with its last whole round and the worker time of all phases.

    Attributes:
        specs: The metrics that were measured, the one that judges rounds first.
        values: Their values by name, and the loss.
        dense: Those of the dense network, see `records.DenseReference`.
        doubt: Why the dense network's score tells nothing although it is possible, or "".
        cause: The reason of a failure.
        is_new: False if an earlier sweep ran the trial.
    """

    trial_id: str
    job: JobConfig
    state: Literal["finished", "stopped", "failed"]
    round: int | None = None
    specs: tuple[MetricSpec, ...] = (ACCURACY,)
    values: Mapping[str, float] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)
    dense_is_recalibrated: bool = False
    doubt: str = ""
    cause: str = ""
    seconds: float = 0.0
    is_new: bool = True

    @property
    def metric(self) -> MetricSpec:
        """The metric that judges rounds."""
        return self.specs[0]

    @property
    def score(self) -> float | None:
        """Its value."""
        return self.values.get(self.metric.name)

    @property
    def accuracy(self) -> float | None:
        """The same, where it is the accuracy; else a GbpError. Likewise `dense_accuracy`."""
        return as_accuracy(self.metric, self.score)

    @property
    def dense_accuracy(self) -> float | None:
        """The dense network's."""
        return as_accuracy(self.metric, self.dense.get(self.metric.name))

    def find_fault(self, judge: MetricSpec) -> str:
        """Returns the reason why a metric is meaningless for this trial, or ""."""
        known = [values[judge.name] for values in (self.values, self.dense) if judge.name in values]
        return judge.find_fault(known)


def values_in(
    row: Mapping[str, Any], specs: Sequence[MetricSpec], *, before: str = "", after: str = ""
) -> dict[str, float]:
    """Picks metrics and loss from a row, whose columns have words before or after their names."""
    names = [*(spec.name for spec in specs), LOSS.name]
    return {n: value for n in names if (value := row.get(f"{before}{n}{after}")) is not None}


def dense_values(
    row: Mapping[str, Any], specs: Sequence[MetricSpec]
) -> tuple[dict[str, float], bool]:
    """Picks those of the dense network from its row, and whether BatchNorm was re-estimated."""
    name = specs[0].name
    is_recalibrated = DenseReference.of(
        row[name],
        row["loss"],
        row[f"{name}_recalibrated"],
        row["loss_recalibrated"],
        specs[0],
    ).is_recalibrated
    return values_in(row, specs, after="_recalibrated" * is_recalibrated), is_recalibrated


def find_judge(sweep: SweepConfig, specs: Sequence[MetricSpec]) -> MetricSpec:
    """Finds what a sweep judges its trials by, among the metrics of their workload.

    Raises:
        ConfigError: The workload has no such metric, or the target does not suit it.
    """
    known = {spec.name: spec for spec in (*specs, LOSS)}
    judge = known.get(sweep.metric or specs[0].name)
    if judge is None:
        raise ConfigError(
            f"sweep.metric = {sweep.metric}: is no metric of this workload"
            f"{nearest_name(sweep.metric or '', list(known))} (allowed: {', '.join(known)})"
        )
    drop = sweep.target.max_drop
    if drop is not None and judge.unit == "%" and drop >= 1:
        raise ConfigError(
            f"sweep.target.max_drop = {drop:g}: must be below 1 for {judge.name}, which is a "
            "share: 0.01 is one point"
        )
    return judge


def warn_of_idle_metric(outcomes: Iterable[Outcome], sweep: SweepConfig) -> None:
    """Warns if a sweep's metric cannot tell its trials apart."""
    ended = [outcome for outcome in outcomes if outcome.state != "failed"]
    if not ended:
        return
    judge = find_judge(sweep, ended[0].specs)
    values = {outcome.values.get(judge.name) for outcome in ended}
    is_chosen_by = sweep.search == "optuna" or sweep.scheduler != "fifo"
    remedy = "; set sweep.metric to loss" if is_chosen_by else ""
    if all(outcome.find_fault(judge) for outcome in ended):
        warnings.warn(f"sweep: {ended[0].find_fault(judge)}{remedy}", stacklevel=3)
    elif is_chosen_by and len(ended) > 1 and len(values) == 1 and None not in values:
        warnings.warn(
            f"sweep.metric = {judge.name}: is {values.pop():g} in all {len(ended)} trials, so "
            "nothing was chosen by it",
            stacklevel=3,
        )
