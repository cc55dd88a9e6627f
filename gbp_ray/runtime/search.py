"""The choice of a sweep's next trial: from a list, or by bisection for the largest sparsity.

A plan returns a trial when there is room for one and receives the outcome of each, without Ray or
the storage. Equal outcomes lead to equal answers, whatever their order and however many trials ran
at a time.
"""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Literal

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.config.sweep import SweepConfig, parse_space
from gbp_ray.errors import ConfigError
from gbp_ray.results.index import flatten, read_index
from gbp_ray.results.records import DenseReference, find_accuracy_fault, write_share
from gbp_ray.results.store import Store

__all__ = [
    "Answer",
    "Bisection",
    "Outcome",
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
    "warn_of_idle_metric",
]


_MEASURED = ("accuracy", "loss", "accuracy_recalibrated", "loss_recalibrated")


@dataclass(frozen=True)
class Outcome:
    """The end of a trial in a sweep, with its last whole round and the worker time of all phases.

    `cause` is the reason of a failure; `is_new` is False if an earlier sweep ran the trial.
    """

    trial_id: str
    job: JobConfig
    state: Literal["finished", "stopped", "failed"]
    round: int | None = None
    accuracy: float | None = None
    loss: float | None = None
    dense_accuracy: float | None = None
    dense_is_recalibrated: bool = False
    cause: str = ""
    seconds: float = 0.0
    is_new: bool = True

    @property
    def accuracy_fault(self) -> str:
        """The reason why accuracy is meaningless for this trial, or ""."""
        values = [v for v in (self.accuracy, self.dense_accuracy) if v is not None]
        return find_accuracy_fault(values)


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
        dense_accuracy: Of the dense network compared with; see `records.DenseReference`.
        is_highest: True at the upper end of the search.
        seconds: Worker time of all its trials, those of earlier sweeps included.
    """

    job: JobConfig
    sparsity: float | None
    trial_id: str | None
    accuracy: float | None
    dense_accuracy: float | None
    is_highest: bool
    num_trials: int
    seconds: float
    cause: str = ""
    dense_is_recalibrated: bool = False


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
    """Finds for each job the largest sparsity that loses no more accuracy than allowed.

    There is no answer if accuracy is not a fraction of the examples, always 0, or equal at all
    sparsities tried. Accuracy is assumed to fall with sparsity. If noise makes it rise again, the
    answer is still a sparsity within the target next to one outside. With room left, both trials
    that may come next are run; this changes the cost and not the answer.
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
            elif fault := known.accuracy_fault or find_accuracy_fault([known.dense_accuracy or 0]):
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
        cause = search.cause or ("" if search.low < num - 1 else _constant(ended))
        is_dense = search.low == 0 and self._sparsities.first == 0
        has_answer = not cause and (best is not None or is_dense)
        first = ended[0] if ended else None
        dense = None if first is None else first.dense_accuracy
        return Answer(
            job=self._sparsities.at(search.job, max(search.low, 0)),
            sparsity=self._sparsities[search.low] if has_answer else None,
            trial_id=best.trial_id if best and has_answer else None,
            accuracy=(best.accuracy if best else dense) if has_answer else None,
            dense_accuracy=dense,
            is_highest=has_answer and search.low == num - 1,
            num_trials=len(ended),
            seconds=sum(outcome.seconds for outcome in ended),
            cause=cause,
            dense_is_recalibrated=first is not None and first.dense_is_recalibrated,
        )


def _constant(ended: Sequence[Outcome]) -> str:
    """Explains that all trials and their dense network have equal accuracy; else returns ""."""
    found = {outcome.accuracy for outcome in ended} | {outcome.dense_accuracy for outcome in ended}
    if len(ended) < 2 or len(found) > 1 or None in found:
        return ""
    return (
        f"accuracy is {write_share(found.pop())} at all {len(ended)} sparsities that were tried "
        "and of the dense network, so it cannot tell them apart; raise sweep.target.highest or "
        "give another count_correct"
    )


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
        **{name: value for name, value in vars(answer).items() if name != "job"},
    }


def warn_of_idle_metric(outcomes: Iterable[Outcome], sweep: SweepConfig) -> None:
    """Warns if a sweep's metric cannot tell its trials apart."""
    ended = [outcome for outcome in outcomes if outcome.state != "failed"]
    values = {getattr(outcome, sweep.metric) for outcome in ended}
    is_chosen_by = sweep.search == "optuna" or sweep.scheduler != "fifo"
    remedy = "; set sweep.metric to loss" if is_chosen_by else ""
    if ended and sweep.metric == "accuracy" and all(o.accuracy_fault for o in ended):
        warnings.warn(f"sweep: {ended[0].accuracy_fault}{remedy}", stacklevel=3)
    elif is_chosen_by and len(ended) > 1 and len(values) == 1:
        warnings.warn(
            f"sweep.metric = {sweep.metric}: is {values.pop():g} in all {len(ended)} trials, so "
            "nothing was chosen by it",
            stacklevel=3,
        )


class Sparsities:
    """The sparsities of a search by number, and its target.

    Number 0 is the lowest, `num` the first beyond the highest. A search begins at `first`: 0 if the
    lowest is the dense network, which meets any target, else -1, so that the lowest is tried.
    """

    def __init__(self, job: JobConfig) -> None:
        target = job.sweep.target
        assert target.max_drop is not None
        self._lowest, self._step, self._max_drop = target.lowest, target.tolerance, target.max_drop
        self.num = int((target.highest - target.lowest) / target.tolerance + 1e-9) + 1
        self.first = 0 if target.lowest == 0 else -1

    def __getitem__(self, number: int) -> float:
        return round(self._lowest + number * self._step, 6)

    def at(self, job: JobConfig, number: int) -> JobConfig:
        """Makes the trial at a sparsity."""
        tree = job.model_dump(mode="json", exclude_unset=True)
        tree["prune"]["sparsity"] = self[number]
        return JobConfig.model_validate(tree)

    def is_within(self, outcome: Outcome) -> bool:
        """Decides if a trial lost no more accuracy than allowed, up to a rounding error."""
        assert outcome.accuracy is not None
        assert outcome.dense_accuracy is not None
        return outcome.accuracy >= outcome.dense_accuracy - self._max_drop - 1e-9


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
        for row in self._table.select(["trial_id", "round", *_MEASURED, *phases]).to_pylist():
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
            rows = [r.model_dump() | {"spent_s": sum(r.seconds.values())} for r in records]
        reference = DenseReference.of(*(rows[0][field] for field in _MEASURED))
        return Outcome(
            trial_id=name,
            job=job,
            state=state,
            round=rows[last]["round"],
            accuracy=rows[last]["accuracy"],
            loss=rows[last]["loss"],
            dense_accuracy=reference.accuracy,
            dense_is_recalibrated=reference.is_recalibrated,
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
