"""Which trial comes next: a list to its end, or bisections towards a sparsity.

A plan is asked for a trial when there is room for one, and told how each ended. It knows neither
Ray nor the storage. The same outcomes lead to the same answers whatever the order in which they
arrive and however many trials ran at a time.
"""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.config.sweep import SweepConfig, parse_space
from gbp_ray.errors import ConfigError
from gbp_ray.results.index import read_index
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
    "first_of_each_group",
    "job_at",
    "warn_of_idle_metric",
]


@dataclass(frozen=True)
class Outcome:
    """How a trial of a sweep ended.

    Attributes:
        round: Its last whole round, or None where there is none.
        cause: Why it failed, one line.
        seconds: What its workers spent on it, all phases together.
        is_new: Whether this sweep ran it, rather than finding it.
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
        """Why accuracy tells nothing of this trial; empty where it may."""
        values = [v for v in (self.accuracy, self.dense_accuracy) if v is not None]
        return find_accuracy_fault(values)


class SearchPlan(ABC):
    """What is left to try."""

    total: int | None = None
    """How many trials there are in all, where that is known."""
    num_slots: int = 1
    """How many run at a time."""

    @abstractmethod
    def next(self) -> JobConfig | None:
        """Gives the next trial; None where there is nothing to start before others end."""

    @abstractmethod
    def tell(self, outcome: Outcome) -> None:
        """Takes note of how a trial ended that `next` gave."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether every trial has ended."""


class TrialList(SearchPlan):
    """Trials known beforehand, in order."""

    def __init__(self, jobs: Iterable[JobConfig]) -> None:
        self._jobs = deque(jobs)
        self.total = self._num_open = len(self._jobs)

    def next(self) -> JobConfig | None:
        """Gives them one after another."""
        return self._jobs.popleft() if self._jobs else None

    def tell(self, outcome: Outcome) -> None:
        """Counts."""
        self._num_open -= 1

    @property
    def is_over(self) -> bool:
        """Whether all have ended."""
        return self._num_open == 0


@dataclass(frozen=True)
class Answer:
    """The largest sparsity within the target, for one combination of everything else.

    Attributes:
        job: The combination; its sparsity is the answer's, or the lowest where there is none.
        sparsity: None where the lowest already loses too much, or a trial failed.
        trial_id: The trial at that sparsity; None at 0, which is the dense network.
        dense_accuracy: Of the dense network that trials were compared with: see
            `records.DenseReference`, also for `dense_is_recalibrated`.
        is_highest: Whether the search ended at its upper end.
        num_trials: How many it took, those found finished included.
        seconds: What the workers spent on these.
        cause: Why there is no answer, one line.
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
    """One bisection over the numbers of the sparsities lowest, lowest + tolerance, ...

    Attributes:
        low: The largest number known to be within the target, or taken to be.
        high: The least known not to be.
        asked: Numbers whose trial was given out; their outcome, once told.
    """

    job: JobConfig
    low: int
    high: int
    asked: dict[int, Outcome | None] = field(default_factory=dict)
    cause: str = ""

    @property
    def is_over(self) -> bool:
        return self.high - self.low <= 1 or bool(self.cause)

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2


class Bisection(SearchPlan):
    """Finds for each job the largest sparsity that loses no more accuracy than allowed.

    There is no answer where accuracy is no share of examples, 0 throughout, or the same at every
    sparsity that was tried: it then says nothing about sparsity.

    Accuracy is taken to fall with sparsity. Where noise makes it rise again, the answer is still a
    sparsity that is within the target, next to one that is not.

    With room left, the trials that may come next are run before it is known which does; that
    changes what is spent and not what is found.

    Args:
        jobs: From `expand`.
    """

    def __init__(self, jobs: Iterable[JobConfig], sparsities: Sparsities) -> None:
        self._sparsities = sparsities
        self._searches = [_Search(job, sparsities.first, sparsities.num) for job in jobs]
        self._places: dict[str, tuple[_Search, int]] = {}
        self._num_running = 0

    def next(self) -> JobConfig | None:
        """Gives the middle of a search that has none running, else one that may become it."""
        searches = [search for search in self._searches if not search.is_over]
        for search in searches:
            if search.middle not in search.asked:
                return self._ask(search, search.middle)
        if self._num_running >= self.num_slots:
            return None
        for search in searches:
            for low, high in ((search.low, search.middle), (search.middle, search.high)):
                if high - low > 1 and (low + high) // 2 not in search.asked:
                    return self._ask(search, (low + high) // 2)
        return None

    def tell(self, outcome: Outcome) -> None:
        """Moves the search on as far as is known."""
        self._num_running -= 1
        search, number = self._places[outcome.trial_id]
        search.asked[number] = outcome
        while not search.is_over and (known := search.asked.get(search.middle)) is not None:
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
        """Whether every search has ended, and every trial that it started."""
        return self._num_running == 0 and all(search.is_over for search in self._searches)

    def answers(self) -> list[Answer]:
        """Says what was found, in the order of the jobs."""
        return [self._answer(search) for search in self._searches]

    def _ask(self, search: _Search, number: int) -> JobConfig:
        job = self._sparsities.at(search.job, number)
        search.asked[number] = None
        self._places[trial_id(job)] = (search, number)
        self._num_running += 1
        return job

    def _answer(self, search: _Search) -> Answer:
        told = [outcome for outcome in search.asked.values() if outcome is not None]
        best = search.asked.get(search.low)
        cause = search.cause or ("" if search.low < self._sparsities.num - 1 else _constant(told))
        is_dense = search.low == 0 and self._sparsities.first == 0
        has_answer = not cause and (best is not None or is_dense)
        first = told[0] if told else None
        dense = None if first is None else first.dense_accuracy
        return Answer(
            job=self._sparsities.at(search.job, max(search.low, 0)),
            sparsity=self._sparsities[search.low] if has_answer else None,
            trial_id=best.trial_id if best and has_answer else None,
            accuracy=(best.accuracy if best else dense) if has_answer else None,
            dense_accuracy=dense,
            is_highest=has_answer and search.low == self._sparsities.num - 1,
            num_trials=len(told),
            seconds=sum(outcome.seconds for outcome in told),
            cause=cause,
            dense_is_recalibrated=first is not None and first.dense_is_recalibrated,
        )


def _constant(told: Sequence[Outcome]) -> str:
    """Says so where several trials and their dense network have the very same accuracy."""
    found = {outcome.accuracy for outcome in told} | {outcome.dense_accuracy for outcome in told}
    if len(told) < 2 or len(found) > 1 or None in found:
        return ""
    return (
        f"accuracy is {write_share(found.pop())} at all {len(told)} sparsities that were tried and "
        "of the dense network, so it tells none of them apart; raise sweep.target.highest or give "
        "another count_correct"
    )


def warn_of_idle_metric(outcomes: Iterable[Outcome], sweep: SweepConfig) -> None:
    """Warns where the metric that a sweep goes by says nothing about its trials."""
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
    """The sparsities of a search by number, and which outcomes are within its target.

    Number 0 is the lowest. A search begins at `first`: at 0 where the lowest is the dense network,
    which is within any target, else one below it, so that the lowest itself is tried.

    Attributes:
        num: How many there are; the first number that is beyond the highest.
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
        """Tells whether a trial lost no more than allowed; a rounding error is no loss."""
        assert outcome.accuracy is not None
        assert outcome.dense_accuracy is not None
        return outcome.accuracy >= outcome.dense_accuracy - self._max_drop - 1e-9


def first_of_each_group(
    jobs: Iterable[JobConfig], groups: Mapping[str, str | None]
) -> list[JobConfig]:
    """Puts the first of each group before all others, so that these do not wait for it.

    Args:
        groups: What a trial shares with others, by its id; None for nothing.
    """
    first, rest, seen = [], [], set()
    for job in jobs:
        group = groups[trial_id(job)]
        if group is not None and group not in seen:
            first.append(job)
            seen.add(group)
        else:
            rest.append(job)
    return [*first, *rest]


class TrialQueue:
    """Gives out the trials of a plan that are not known yet, and gathers how all of them ended.

    Args:
        known: Finds how a trial ended before this sweep, or None.
    """

    def __init__(self, plan: SearchPlan, known: Callable[[JobConfig], Outcome | None]) -> None:
        self.plan, self._known = plan, known
        self.outcomes: dict[str, Outcome] = {}
        self._given: dict[str, JobConfig] = {}
        self._kept: JobConfig | None = None
        self._deferred: deque[JobConfig] = deque()
        self._met: set[str] = set()

    @property
    def num_running(self) -> int:
        """How many were given out and have not ended."""
        return len(self._given)

    def job_of(self, name: str) -> JobConfig:
        """Finds a trial that was given out, by its id: the very object, of which there is one."""
        return self._given[name]

    def next(self) -> JobConfig | None:
        """Gives the next trial that needs work; None where there is none at the moment.

        Trials that others are at work on come when no other is left.
        """
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
        """Takes a trial back, to give it out again."""
        assert self._kept is None
        self._kept = self._given.pop(trial_id(job))

    def defer(self, job: JobConfig) -> None:
        """Takes a trial back that another driver is at work on, to give it out when it must be."""
        self._deferred.append(self._given.pop(trial_id(job)))
        self._met.add(trial_id(job))

    def is_deferred(self, job: JobConfig) -> bool:
        """Tells whether a trial was taken back before, so that it is to be waited for."""
        return trial_id(job) in self._met

    def tell(self, outcome: Outcome) -> None:
        """Takes note of how a trial ended that was given out."""
        del self._given[outcome.trial_id]
        self._note(outcome)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self._kept is None and not self._deferred and self.plan.is_over

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.trial_id] = outcome
        self.plan.tell(outcome)


class TrialHistory:
    """Finds how a job's trials ended before.

    Args:
        sweep: Without a scheduler nothing is weak, and what one has stopped goes on.
    """

    def __init__(self, store: Store, sweep: SweepConfig) -> None:
        table, _ = read_index(store.objects)
        phases = [name for name in table.column_names if name.startswith("seconds.")]
        measured = ["accuracy", "loss", "accuracy_recalibrated", "loss_recalibrated"]
        columns = ["trial_id", "round", "is_final", *measured, *phases]
        self._table = table
        # Folders are listed, too, since results may have been removed by hand.
        self._there = set(store.objects.list_folders("trials/"))
        self._rounds: dict[str, list[dict[str, Any]]] = {}
        for row in table.select(columns).to_pylist():
            self._rounds.setdefault(row["trial_id"], []).append(row)
        stops = [] if sweep.scheduler == "fifo" else store.list_unfinished("stopped.json")
        self._stops = {name: store.read_stop(name) for name in stops}
        self._store = store

    def __call__(self, job: JobConfig) -> Outcome | None:
        """Says how a trial ended; None where it did not, or failed."""
        name = trial_id(job)
        if name not in self._there:
            return None
        if (rows := self._rounds.get(name)) is not None:
            spent_s = sum(
                v or 0 for row in rows for k, v in row.items() if k.startswith("seconds.")
            )
            return self._outcome(job, "finished", rows[0], rows[-1], spent_s)
        if (stop := self._stops.get(name)) is not None:
            records = self._store.read_rounds(name)
            rows = [record.model_dump() for record in records[: stop.round + 1]]
            spent_s = sum(sum(record.seconds.values()) for record in records)
            return self._outcome(job, "stopped", rows[0], rows[-1], spent_s)
        return None

    def find_in(self, base: JobConfig) -> list[JobConfig]:
        """Lists the finished trials that lie in the space of a sweep."""
        fields = [field for axis in parse_space(base.sweep.space) for field in axis.fields]
        if not set(fields) <= set(self._table.column_names):
            return []
        found = []
        columns = list(dict.fromkeys(["trial_id", "is_final", *fields]))
        for row in self._table.select(columns).to_pylist():
            if row["is_final"]:
                try:
                    job = job_at(base, {field: row[field] for field in fields})
                except ConfigError:
                    continue
                # The id covers all that is not in the space.
                if trial_id(job) == row["trial_id"]:
                    found.append(job)
        return found

    def _outcome(
        self,
        job: JobConfig,
        state: Any,
        dense: dict[str, Any],
        last: dict[str, Any],
        spent_s: float,
    ) -> Outcome:
        reference = DenseReference.of(
            dense["accuracy"],
            dense["loss"],
            dense["accuracy_recalibrated"],
            dense["loss_recalibrated"],
        )
        return Outcome(
            trial_id=trial_id(job),
            job=job,
            state=state,
            round=last["round"],
            accuracy=last["accuracy"],
            loss=last["loss"],
            dense_accuracy=reference.accuracy,
            dense_is_recalibrated=reference.is_recalibrated,
            seconds=spent_s * max(1, job.cluster.max_workers),
            is_new=False,
        )


def job_at(base: JobConfig, values: dict[str, Any]) -> JobConfig:
    """Makes the trial at a point of the space.

    Raises:
        ConfigError: The schema refuses it.
    """
    # Six digits, so that a trial's record reads like its job.
    plain = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
    return load_job(base, {**plain, "sweep": {}})


_EXTRAS = {"optuna": "search", "mlflow": "loggers", "wandb": "loggers", "tensorboardX": "loggers"}


def check_extras(job: JobConfig) -> None:
    """Makes sure that what a sweep asks for is installed.

    Raises:
        ConfigError: It is not; says what to install.
    """
    asked = [name.replace("tensorboard", "tensorboardX") for name in job.sweep.loggers]
    asked += ["optuna"] if job.sweep.search == "optuna" else []
    for name in asked:
        if importlib.util.find_spec(name) is None:
            what = name if name == "tensorboardX" else f"'gbp-ray[{name}]'"
            raise ConfigError(
                f"sweep.{_EXTRAS[name]} = {name}: is not installed; pip install {what}"
            )
