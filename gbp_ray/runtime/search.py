"""The choice of a sweep's next trial: from a list, or by bisection for the largest sparsity.

A plan returns a trial when there is room for one and receives the outcome of each, without Ray or
the storage. Equal outcomes lead to equal answers, whatever their order and however many trials ran
at a time.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Literal

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.config.metrics import ACCURACY, MetricSpec, find_constant
from gbp_ray.config.sweep import SweepConfig, parse_space
from gbp_ray.errors import ConfigError
from gbp_ray.results.index import flatten, name_measured, read_index
from gbp_ray.results.scores import as_accuracy, name_score, read_specs
from gbp_ray.results.store import Store
from gbp_ray.runtime.outcomes import Outcome, dense_values, find_judge, values_in

__all__ = [
    "Answer",
    "Bisection",
    "SearchPlan",
    "Sparsities",
    "TrialHistory",
    "TrialList",
    "TrialQueue",
    "check_extras",
    "describe_answer",
    "first_of_each_group",
    "job_at",
    "space_fields",
    "values_at",
]


class SearchPlan(ABC):
    """Decides which trials a sweep runs."""

    total: int | None = None
    """Number of all trials, if known."""
    num_slots: int = 1
    """Number of trials that run at a time."""

    @abstractmethod
    def next(self) -> JobConfig | None:
        """Returns the next trial; None if there is none before others end."""

    @abstractmethod
    def tell(self, outcome: Outcome) -> None:
        """Receives the outcome of a trial that `next` returned."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """True when all trials have ended."""


class TrialList(SearchPlan):
    """A fixed list of trials, in order."""

    def __init__(self, jobs: Iterable[JobConfig]) -> None:
        self._jobs = deque(jobs)
        self.total = self._num_open = len(self._jobs)

    def next(self) -> JobConfig | None:
        """Returns the first trial left."""
        return self._jobs.popleft() if self._jobs else None

    def tell(self, outcome: Outcome) -> None:
        """Counts the trials that have ended."""
        self._num_open -= 1

    @property
    def is_over(self) -> bool:
        """True when all trials have ended."""
        return self._num_open == 0


@dataclass(frozen=True)
class Answer:
    """The largest sparsity within the target, for one combination of the other fields.

    Attributes:
        job: The combination, at the answer's sparsity or, without an answer, at the lowest.
        sparsity: None if the lowest loses too much or a trial failed; `cause` tells why.
        trial_id: None at sparsity 0, which is the dense network.
        dense_score: Of the dense network compared with; see `records.DenseReference`.
        metric: What it was judged by, the loss perhaps.
        is_highest: True at the upper end of the search.
        seconds: Worker time of all its trials, those of earlier sweeps included.
    """

    job: JobConfig
    sparsity: float | None
    trial_id: str | None
    score: float | None
    dense_score: float | None
    is_highest: bool
    num_trials: int
    seconds: float
    cause: str = ""
    dense_is_recalibrated: bool = False
    metric: MetricSpec = ACCURACY

    @property
    def accuracy(self) -> float | None:
        """The score, where it is the accuracy; else a GbpError. Likewise `dense_accuracy`."""
        return as_accuracy(self.metric, self.score)

    @property
    def dense_accuracy(self) -> float | None:
        """The dense network's."""
        return as_accuracy(self.metric, self.dense_score)


@dataclass
class _Search:
    """One bisection: sparsity number `low` is within the target, `high` is not.

    `started` holds the outcomes of its trials, None before their end.
    """

    job: JobConfig
    low: int
    high: int
    started: dict[int, Outcome | None] = field(default_factory=dict)
    cause: str = ""

    @property
    def is_over(self) -> bool:
        return self.high - self.low <= 1 or bool(self.cause)

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2


class Bisection(SearchPlan):
    """Finds for each job the largest sparsity that is worse than dense by no more than allowed.

    There is no answer if the metric is impossible, tells nothing, as an accuracy that is always 0
    or that of chance, or is equal at all sparsities tried. It is assumed to get worse with
    sparsity. If noise makes it better again, the answer is still a sparsity within the target next
    to one outside. With room left, both trials that may come next are run; this changes the cost
    and not the answer.
    """

    def __init__(self, jobs: Iterable[JobConfig], sparsities: Sparsities) -> None:
        self._sparsities = sparsities
        self._searches = [_Search(job, sparsities.first, sparsities.num) for job in jobs]
        self._places: dict[str, tuple[_Search, int]] = {}
        self._num_running = 0

    def next(self) -> JobConfig | None:
        """Returns the middle of an interval, or with room left the middle of one of its halves."""
        searches = [search for search in self._searches if not search.is_over]
        for search in searches:
            if search.middle not in search.started:
                return self._start(search, search.middle)
        if self._num_running >= self.num_slots:
            return None
        for search in searches:
            for low, high in ((search.low, search.middle), (search.middle, search.high)):
                if high - low > 1 and (low + high) // 2 not in search.started:
                    return self._start(search, (low + high) // 2)
        return None

    def tell(self, outcome: Outcome) -> None:
        """Narrows the trial's search as far as outcomes are known."""
        self._num_running -= 1
        search, number = self._places[outcome.trial_id]
        search.started[number] = outcome
        while not search.is_over and (known := search.started.get(search.middle)) is not None:
            if known.state != "finished":
                search.cause = known.cause or known.state
            elif fault := self._sparsities.find_fault(known):
                search.cause = fault
            elif self._sparsities.is_within(known):
                search.low = search.middle
            else:
                search.high = search.middle

    @property
    def is_over(self) -> bool:
        """True when all searches, and all trials that they started, have ended."""
        return self._num_running == 0 and all(search.is_over for search in self._searches)

    def answers(self) -> list[Answer]:
        """Lists the answers in the order of the jobs."""
        return [self._answer(search) for search in self._searches]

    def _start(self, search: _Search, number: int) -> JobConfig:
        job = self._sparsities.at(search.job, number)
        search.started[number] = None
        self._places[trial_id(job)] = (search, number)
        self._num_running += 1
        return job

    def _answer(self, search: _Search) -> Answer:
        ended = [outcome for outcome in search.started.values() if outcome is not None]
        best, num = search.started.get(search.low), self._sparsities.num
        # A trial that failed may not know what it is judged by.
        first = next((outcome for outcome in ended if outcome.state != "failed"), None)
        judge = ACCURACY if first is None else self._sparsities.judge(first)
        cause = search.cause or ("" if search.low < num - 1 else _constant(ended, judge))
        is_dense = search.low == 0 and self._sparsities.first == 0
        has_answer = not cause and (best is not None or is_dense)
        dense = None if first is None else first.dense.get(judge.name)
        return Answer(
            job=self._sparsities.at(search.job, max(search.low, 0)),
            sparsity=self._sparsities[search.low] if has_answer else None,
            trial_id=best.trial_id if best and has_answer else None,
            score=(best.values.get(judge.name) if best else dense) if has_answer else None,
            dense_score=dense,
            is_highest=has_answer and search.low == num - 1,
            num_trials=len(ended),
            seconds=sum(outcome.seconds for outcome in ended),
            cause=cause,
            dense_is_recalibrated=first is not None and first.dense_is_recalibrated,
            metric=judge,
        )


def _constant(ended: Sequence[Outcome], judge: MetricSpec) -> str:
    """Explains that all trials and their dense network have an equal value; else returns ""."""
    sides = [side for outcome in ended for side in (outcome.values, outcome.dense)]
    values = [side.get(judge.name, math.nan) for side in sides]
    where = f"at all {len(ended)} sparsities that were tried and of the dense network"
    fault = "" if any(map(math.isnan, values)) else find_constant(judge, values, where)
    other = "give another count_correct" if judge == ACCURACY else "judge by another metric"
    return fault and f"{fault}; raise sweep.target.highest or {other}"


def describe_answer(answer: Answer, others: Sequence[Answer]) -> dict[str, Any]:
    """Returns an answer in plain values, named by the fields in which it differs from others."""
    flat = [flatten(other.job.model_dump(mode="json")) for other in others]
    own = flatten(answer.job.model_dump(mode="json"))
    varying = [
        name
        for name in own
        if name not in ("prune.sparsity", "storage")
        and any(other.get(name) != own[name] for other in flat)
    ]
    label = ", ".join(f"{name}={own[name]}" for name in varying)
    return {
        "label": label or answer.job.name,
        "fields": {name: own[name] for name in varying},
        **{
            name_score(name, answer.metric.name): value
            for name, value in vars(answer).items()
            if name not in ("job", "metric")
        },
        **({} if answer.metric == ACCURACY else {"metric": answer.metric.model_dump()}),
    }


class Sparsities:
    """The sparsities of a search by number, and its target.

    Number 0 is the lowest, `num` the first beyond the highest. A search begins at `first`: 0 if the
    lowest is the dense network, which meets any target, else -1, so that the lowest is tried.
    """

    def __init__(self, job: JobConfig) -> None:
        self._sweep, target = job.sweep, job.sweep.target
        self._lowest, self._step = target.lowest, target.tolerance
        self.num = int((target.highest - target.lowest) / target.tolerance + 1e-9) + 1
        self.first = 0 if target.lowest == 0 else -1

    def __getitem__(self, number: int) -> float:
        return round(self._lowest + number * self._step, 6)

    def at(self, job: JobConfig, number: int) -> JobConfig:
        """Makes the trial at a sparsity."""
        tree = job.model_dump(mode="json", exclude_unset=True)
        tree["prune"]["sparsity"] = self[number]
        return JobConfig.model_validate(tree)

    def judge(self, outcome: Outcome) -> MetricSpec:
        """Finds what a trial is judged by; its first metric where the job names none that it has.

        The sweep's own checks refuse such a job.
        """
        with suppress(ConfigError):
            return find_judge(self._sweep, outcome.specs)
        return outcome.metric

    def find_fault(self, outcome: Outcome) -> str:
        """Returns why a trial cannot be judged, or ""."""
        try:
            judge = find_judge(self._sweep, outcome.specs)
        except ConfigError as error:
            return str(error)
        dense = outcome.dense.get(judge.name)
        fault = outcome.find_fault(judge) or judge.find_fault(
            [math.nan if dense is None else dense]
        )
        # What is known of chance is known of the first metric.
        return fault or (outcome.doubt if judge == outcome.metric else "")

    def is_within(self, outcome: Outcome) -> bool:
        """Decides if a trial is no worse than allowed, up to a rounding error."""
        judge, target = self.judge(outcome), self._sweep.target
        value, dense = outcome.values[judge.name], outcome.dense[judge.name]
        allowed = target.max_drop
        if allowed is None:
            assert target.max_relative_drop is not None
            allowed = target.max_relative_drop * abs(dense)
        return judge.rank(value) >= judge.rank(dense) - allowed - 1e-9


def first_of_each_group(
    jobs: Iterable[JobConfig], groups: Mapping[str, str | None]
) -> list[JobConfig]:
    """Moves the first trial of each group to the front, so that the others do not wait for it."""
    first: dict[str, JobConfig] = {}
    rest = []
    for job in jobs:
        group = groups[trial_id(job)]
        if group is None or first.setdefault(group, job) is not job:
            rest.append(job)
    return [*first.values(), *rest]


class TrialQueue:
    """Hands out the trials of a plan that have not ended before, and collects all outcomes."""

    def __init__(self, plan: SearchPlan, known: Callable[[JobConfig], Outcome | None]) -> None:
        self.plan, self._known = plan, known
        self.outcomes: dict[str, Outcome] = {}
        self._given: dict[str, JobConfig] = {}
        self._kept: JobConfig | None = None
        self._deferred: deque[JobConfig] = deque()
        self._met: set[str] = set()

    @property
    def num_running(self) -> int:
        """Number of trials handed out that have not ended."""
        return len(self._given)

    def job_of(self, name: str) -> JobConfig:
        """Returns the running trial of this id, always the same object."""
        return self._given[name]

    def next(self) -> JobConfig | None:
        """Returns the next trial to run, deferred ones last; None if there is none now."""
        job, self._kept = self._kept, None
        while job is None and (candidate := self.plan.next()) is not None:
            if (outcome := self._known(candidate)) is None:
                job = candidate
            else:
                self._note(outcome)
        if job is None and self._deferred:
            job = self._deferred.popleft()
        if job is not None:
            self._given[trial_id(job)] = job
        return job

    def put_back(self, job: JobConfig) -> None:
        """Takes a trial back; it comes next."""
        assert self._kept is None
        self._kept = self._given.pop(trial_id(job))

    def defer(self, job: JobConfig) -> None:
        """Takes a trial back that another driver holds; it comes last."""
        self._deferred.append(self._given.pop(trial_id(job)))
        self._met.add(trial_id(job))

    def is_deferred(self, job: JobConfig) -> bool:
        """True if a trial was deferred before, so that its driver must be waited for."""
        return trial_id(job) in self._met

    def tell(self, outcome: Outcome) -> None:
        """Receives the outcome of a trial that `next` returned."""
        del self._given[outcome.trial_id]
        self._note(outcome)

    @property
    def is_over(self) -> bool:
        """True when nothing is left to do."""
        return self._kept is None and not self._deferred and self.plan.is_over

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.trial_id] = outcome
        self.plan.tell(outcome)


class TrialHistory:
    """Finds the outcomes of a job's trials that ended before, as `TrialQueue` needs them."""

    def __init__(self, store: Store, sweep: SweepConfig) -> None:
        self._store = store
        self._table, _ = read_index(store.objects)
        # Results may have been removed by hand.
        self._there = set(store.objects.list_folders("trials/"))
        phases = [name for name in self._table.column_names if name.startswith("seconds.")]
        self._rounds: dict[str, list[dict[str, Any]]] = {}
        # Not the job's fields, of which there are many.
        names = [name for name in self._table.column_names if "." not in name]
        for row in self._table.select([*names, *phases]).to_pylist():
            row["spent_s"] = sum(row[phase] or 0 for phase in phases)
            self._rounds.setdefault(row["trial_id"], []).append(row)
        # Without a scheduler, trials that one has stopped go on.
        stops = [] if sweep.scheduler == "fifo" else store.list_unfinished("stopped.json")
        self._stops = {name: store.read_stop(name) for name in stops}

    def __call__(self, job: JobConfig) -> Outcome | None:
        """Returns the outcome of a trial; None if it has not ended, or failed."""
        name = trial_id(job)
        if name not in self._there:
            return None
        state: Literal["finished", "stopped"] = "finished"
        rows = self._rounds.get(name)
        last = -1
        if rows is None:
            if (stop := self._stops.get(name)) is None:
                return None
            records = self._store.read_rounds(name)
            state, last = "stopped", min(stop.round, len(records) - 1)
            rows = [
                {**name_measured(r), "round": r.round, "spent_s": sum(r.seconds.values())}
                for r in records
            ]
        specs = read_specs(rows[0].get("metric_specs"))
        dense, is_recalibrated = dense_values(rows[0], specs)
        return Outcome(
            trial_id=name,
            job=job,
            state=state,
            round=rows[last]["round"],
            specs=specs,
            values=values_in(rows[last], specs),
            dense=dense,
            dense_is_recalibrated=is_recalibrated,
            doubt=rows[0].get("metric_fault") or "",
            seconds=sum(row["spent_s"] for row in rows) * max(1, job.cluster.max_workers),
            is_new=False,
        )

    def find_in(self, base: JobConfig) -> list[JobConfig]:
        """Lists the finished trials in the space of a sweep."""
        fields = space_fields(base)
        if not set(fields) <= set(self._table.column_names):
            return []
        found = []
        columns = list(dict.fromkeys(["trial_id", "is_final", *fields]))
        for row in self._table.select(columns).to_pylist():
            if row["is_final"]:
                with suppress(ConfigError):
                    job = job_at(base, {field: row[field] for field in fields})
                    # The id covers all fields outside the space.
                    if trial_id(job) == row["trial_id"]:
                        found.append(job)
        return found


def space_fields(base: JobConfig) -> list[str]:
    """Lists the fields that vary in a sweep's space."""
    return [field for axis in parse_space(base.sweep.space) for field in axis.fields]


def values_at(job: JobConfig, fields: Iterable[str]) -> dict[str, Any]:
    """Returns a job's values of some fields, by dotted path."""
    tree = job.model_dump(mode="json")
    return {field: reduce(getitem, field.split("."), tree) for field in fields}


def job_at(base: JobConfig, values: dict[str, Any]) -> JobConfig:
    """Makes the trial at a point of the space; raises a ConfigError if the schema refuses it."""
    # Six digits, so that records and job files read alike.
    plain = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
    return load_job(base, {**plain, "sweep": {}})


def check_extras(job: JobConfig) -> None:
    """Raises a ConfigError if a library that the sweep asks for is not installed."""
    needed = [
        ("loggers", name.replace("tensorboard", "tensorboardX")) for name in job.sweep.loggers
    ]
    needed += [("search", "optuna")] if job.sweep.search == "optuna" else []
    for key, name in needed:
        if importlib.util.find_spec(name) is None:
            what = name if name == "tensorboardX" else f"'gbp-ray[{name}]'"
            raise ConfigError(f"sweep.{key} = {name}: is not installed; pip install {what}")
