"""Curves of many trials over sparsity, or over what is left, with the spread over seeds.

Trials of one workload that differ only in sparsity and seed form a curve; where whole units are
removed it goes over their target, and targets of different kinds are looked at apart. Trials that
differ only in the seed form a point, with a mean and a sample standard deviation. A configuration
that was run twice, in two jobs say, is one seed and counts once. Means are of what was measured;
differences to the dense network are taken seed by seed before they are averaged.

A trial's rounds before the last are points *on the way*: shown, never part of the Pareto front.
They can be compared with last rounds where each round ran a learning-rate schedule of its own.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.metrics import ACCURACY, MetricSpec, find_constant
from gbp_ray.report.spreads import Spread
from gbp_ray.results.goals import COSTS, GOAL_FIELDS, Goal
from gbp_ray.results.index import specs_in
from gbp_ray.results.query import Results, name_values
from gbp_ray.results.scores import DenseReference

__all__ = [
    "Curve",
    "Point",
    "Round",
    "Trial",
    "WorkloadCurves",
    "find_front",
    "gather_curves",
    "has_own_schedule",
    "pick_targets",
    "spread_out",
]

Item = TypeVar("Item")
_CRITERION = "prune.criterion"
_KINDS = {
    "sparsity": "single weights",
    "units": "whole units to a sparsity",
    **{kind: f"whole units to {name}" for kind, name in COSTS.items()},
}
"""Kinds of goals, as titles tell them apart."""
_NO_SETTING = ("cluster.", "workload.eval_batch_size", "workload.train_sample")
"""Fields that do not make a trial another one to compare with."""


class Round(NamedTuple):
    """One measured round; the first is the dense network."""

    round: int
    sparsity: float
    score: float
    score_pruned: float | None
    loss: float
    score_recalibrated: float | None
    loss_recalibrated: float | None
    train_loss: float | None
    train_score: float | None
    test_score: float | None
    judged_on: str
    is_chosen: bool
    num_parameters: int
    num_nonzero: int
    num_units: int
    macs: int
    macs_nonzero: int
    macs_left: float | None
    parameters_left: float
    bytes_left: float
    weights_sha256: str | None
    metric: MetricSpec = ACCURACY
    metric_fault: str = ""

    @property
    def compression(self) -> float:
        """Parameters before / parameters left, whole model."""
        return self.num_parameters / max(1, self.num_nonzero)

    @property
    def reference(self) -> DenseReference:
        """The measurement of the dense network that other rounds are compared with."""
        return DenseReference.of(
            self.score, self.loss, self.score_recalibrated, self.loss_recalibrated, self.metric
        )

    @property
    def speedup(self) -> float:
        """Multiply-adds before / left, saved in theory; 0 where they were not counted."""
        return self.macs / max(1, self.macs_nonzero)


@dataclass(frozen=True)
class Trial:
    """One finished trial, as far as the index tells.

    Attributes:
        goal: What was asked for.
        setting: The fields of its job in which the trials of all curves differ.
        is_compact: Removed units left the network.
        worker_seconds: Seconds of each phase, over all rounds and workers.
    """

    job: str
    trial_id: str
    seed: int
    goal: Goal
    setting: dict[str, Any]
    rounds: tuple[Round, ...]
    worker_seconds: dict[str, float]
    trial_seconds: float
    is_compact: bool

    @property
    def target(self) -> float:
        """The sparsity that was asked for, or what may be left."""
        return self.goal.value

    @property
    def dense(self) -> Round:
        """The network before the first prune."""
        return self.rounds[0]

    @property
    def final(self) -> Round:
        """The network after the last round."""
        return self.rounds[-1]

    @property
    def test_score(self) -> float | None:
        """Score of the chosen round on the test split, where one was measured."""
        return next((item.test_score for item in self.rounds if item.is_chosen), None)


@dataclass(frozen=True)
class Point:
    """The same round of trials that differ only in the seed.

    Attributes:
        target: The sparsity that was asked for, or what may be left.
        round: The round; None for each trial's last.
        test_score: On the test split, of the rounds chosen; only for a trial's last round.
        gap: Score on training examples minus score: overfitting.
        drop: Score minus the dense network's of the same seed, see `scores.DenseReference`.
        worker_seconds: Of the whole trials.
        phases: The mean of them by phase.
    """

    target: float
    round: int | None
    trials: tuple[Trial, ...]
    sparsity: Spread
    score: Spread
    score_pruned: Spread | None
    test_score: Spread | None
    gap: Spread | None
    drop: Spread
    loss: Spread | None
    num_nonzero: Spread
    compression: Spread
    speedup: Spread
    macs_left: Spread | None
    parameters_left: Spread
    bytes_left: Spread
    worker_seconds: Spread
    phases: dict[str, float]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that were run."""
        return tuple(trial.seed for trial in self.trials)

    def removed(self, measure: str) -> float:
        """Returns the mean share that is gone: the sparsity, or of a cost of the dense network."""
        if measure == "sparsity":
            return self.sparsity.mean
        left: Spread | None = getattr(self, f"{measure}_left")
        return math.nan if left is None else 1 - left.mean


@dataclass
class Curve:
    """Trials that differ only in sparsity and seed.

    Attributes:
        label: What tells it from the other curves of its workload.
        setting: The fields in which the curves differ.
        points: The most that is left first.
        on_the_way: The earlier rounds of the sparsest trials, where the sparsity then went on.
        has_own_schedules: Whether those can be compared with last rounds.
    """

    label: str
    criterion: str
    setting: dict[str, Any]
    points: list[Point]
    on_the_way: list[Point]
    has_own_schedules: bool

    def at(self, target: float) -> Point | None:
        """Finds the point of a sparsity."""
        return next((point for point in self.points if point.target == target), None)


@dataclass
class WorkloadCurves:
    """All finished trials of one workload.

    Attributes:
        title: The factory, with the options that tell it from the other workloads.
        dense: Score of the dense networks over seeds, see `scores.DenseReference`.
        dense_ways: The same with BatchNorm's statistics as stored and as re-estimated, where both
            were measured.
        front: The Pareto front of sparsity, or of `measure`, and score; the most left first.
        judged_on: The split of all scores: "test", or "validation".
        num_repeats: Trials left out because the same configuration was run before.
        varying: The fields in which the curves differ.
        metric: What all scores are of.
        kind: Of the goals of all trials, see `Goal`.
    """

    title: str
    curves: list[Curve]
    dense: Spread
    dense_loss: Spread | None
    dense_ways: dict[str, Spread]
    front: list[tuple[Curve, Point]]
    trials: list[Trial]
    num_repeats: int
    judged_on: str = "test"
    varying: list[str] = field(default_factory=list)
    metric: MetricSpec = ACCURACY
    kind: str = "sparsity"

    @property
    def has_units(self) -> bool:
        """Whether whole units are removed, not single weights."""
        return self.kind != "sparsity"

    @property
    def is_compact(self) -> bool:
        """Whether the units that were removed left the networks of all trials."""
        return self.has_units and all(trial.is_compact for trial in self.trials)

    @property
    def measure(self) -> str:
        """What curves are drawn over: the sparsity, or what is left of this key of `COSTS`."""
        if self.kind in ("sparsity", *COSTS):
            return self.kind
        return "macs" if "macs" in self.costs else "parameters"

    @property
    def costs(self) -> list[str]:
        """Keys of `COSTS` that were counted in all trials."""
        has_macs = all(trial.dense.macs > 0 for trial in self.trials)
        return [cost for cost in COSTS if cost != "macs" or has_macs]

    def name_target(self, target: float) -> str:
        """Names what was asked for in words."""
        return str(Goal(self.kind, target))

    def count_targets(self, number: int) -> str:
        """Counts sparsities, or targets of another kind."""
        names = ("target", "targets") if self.has_units else ("sparsity", "sparsities")
        return f"{number:,} {names[number != 1]}"

    def find_front(self, measure: str) -> list[tuple[Curve, Point]]:
        """Finds the points that no other has less left of and a better score."""
        pairs = [(curve, point) for curve in self.curves for point in curve.points]
        places = find_front([(p.removed(measure), self.rank(p)) for _, p in pairs])
        return [pairs[place] for place in places]

    @property
    def metric_fault(self) -> str:
        """The reason why the metric has no meaning for this workload, or ""."""
        return self.metric.find_fault([self.dense.mean])

    @property
    def metric_doubt(self) -> str:
        """The reason why the metric tells nothing here although it is possible, or ""."""
        dense = [trial.dense.metric_fault for trial in self.trials if trial.dense.metric_fault]
        if dense:
            return dense[0]
        if all(trial.dense.num_nonzero == trial.final.num_nonzero for trial in self.trials):
            return ""
        rounds = (item.score for trial in self.trials for item in trial.rounds)
        return find_constant(self.metric, rounds)

    def rank(self, point: Point) -> float:
        """Returns a number that is greater for a point with a better mean score."""
        return self.metric.rank(point.score.mean)

    @property
    def targets(self) -> list[float]:
        """Every sparsity or other target that was asked for, the one that leaves most first."""
        found = {point.target for curve in self.curves for point in curve.points}
        return sorted(found, key=lambda target: Goal(self.kind, target).depth)

    @property
    def seeds(self) -> list[int]:
        """Every seed that was run."""
        return sorted({trial.seed for trial in self.trials})


def gather_curves(results: Results) -> list[WorkloadCurves]:
    """Group finished trials into the curves of each workload."""
    varying = [name for name in results.find_varying() if not name.startswith(_NO_SETTING)]
    workload = [name for name in varying if name.startswith("workload.")]
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in _read_trials(results, varying):
        key = trial.dense.metric, trial.goal.kind, *(trial.setting[name] for name in workload)
        groups.setdefault(key, []).append(trial)
    factory = results.table["workload.factory"][0].as_py()
    curves = []
    num_metrics, num_kinds = (len({key[place] for key in groups}) for place in (0, 1))
    for (metric, kind, *values), trials in groups.items():
        named = dict(zip(workload, values, strict=True))
        title = [str(named.pop("workload.factory", factory))]
        title += name_values(named)
        if num_metrics > 1:
            title.append(metric.name)
        if num_kinds > 1:
            title.append(_KINDS[kind])
        curves.append(_compare(", ".join(title), trials))
    return curves


def find_front(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Find the Pareto front: pairs that no other pair equals in both and exceeds in one.

    Returns:
        Their places, by the first number; equal pairs are all there.
    """
    front: list[int] = []
    best = -math.inf
    order = sorted(range(len(pairs)), key=lambda i: pairs[i], reverse=True)
    for place in order:
        is_equal = bool(front) and pairs[place] == pairs[front[-1]]
        if pairs[place][1] > best or is_equal:
            front.append(place)
            best = pairs[place][1]
    return front[::-1]


def pick_targets(curves: Sequence[Curve], num_most: int) -> list[float]:
    """Picks the targets to look at closely: those that most curves have, evenly spread."""
    counts: dict[float, int] = {}
    for curve in curves:
        for point in curve.points:
            counts[point.target] = counts.get(point.target, 0) + 1
    shared = (target for target, count in counts.items() if count == max(counts.values()))
    kind = curves[0].points[0].trials[0].goal.kind
    ordered = sorted(shared, key=lambda target: Goal(kind, target).depth)
    return spread_out(ordered, num_most)


def spread_out(items: Sequence[Item], most: int) -> list[Item]:
    """Pick at most so many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def has_own_schedule(epochs: float, after: str, lr_schedule: str, rewind: str) -> bool:
    """Check whether each round ends as the last does, with its learning rate decayed."""
    is_alike = lr_schedule == "constant" or rewind == "learning_rate"
    return epochs == 0 or (after == "each" and is_alike)


# -- from rows to trials ---------------------------------------------------------------------------


def _read_trials(results: Results, varying: list[str]) -> list[Trial]:
    # Column by column: ten thousand trials are a few hundred thousand values.
    table = results.table
    schedule = ("finetune.epochs", "finetune.after", "finetune.lr_schedule", "prune.rewind")
    goals = (*GOAL_FIELDS, "prune.granularity", "prune.compact")
    names = ("job", "trial_id", "seed", *goals, _CRITERION, "cluster.num_workers")
    columns = {
        name: table[name].to_pylist() for name in {*names, *varying, *schedule, "trial_seconds"}
    }
    texts = [None] * len(table)
    if "metric_specs" in table.column_names:
        texts = table["metric_specs"].to_pylist()
    specs = {text: specs[0] for text, specs in specs_in(table).items()}
    faults = [""] * len(table)
    if "metric_fault" in table.column_names:
        faults = [fault or "" for fault in table["metric_fault"].to_pylist()]
    own = {"metric": [specs[text] for text in texts], "metric_fault": faults}
    values = (own[name] if name in own else _read_column(results, name) for name in Round._fields)
    rounds = list(map(Round._make, zip(*values, strict=True)))
    phases = {
        name.removeprefix("seconds."): table[name].to_pylist()
        for name in table.column_names
        if name.startswith("seconds.")
    }
    starts = [i for i, item in enumerate(rounds) if item.round == 0]
    trials = []
    for start, stop in zip(starts, [*starts[1:], len(rounds)], strict=True):
        workers = _num_workers(columns["cluster.num_workers"][start])
        spent = {
            phase: workers * sum(second or 0.0 for second in seconds[start:stop])
            for phase, seconds in phases.items()
        }
        trials.append(
            Trial(
                job=columns["job"][start],
                trial_id=columns["trial_id"][start],
                seed=columns["seed"][start],
                goal=Goal.of({name: columns[name][start] for name in goals}),
                setting={name: columns[name][start] for name in (*varying, _CRITERION, *schedule)},
                rounds=tuple(rounds[start:stop]),
                worker_seconds={phase: value for phase, value in spent.items() if value},
                trial_seconds=columns["trial_seconds"][start],
                is_compact=bool(columns["prune.compact"][start]),
            )
        )
    return trials


def _read_column(results: Results, field: str) -> list[Any]:
    if "score" in field.split("_"):
        return results.scores(field)
    return results.table[field].to_pylist()


def _compare(title: str, trials: list[Trial]) -> WorkloadCurves:
    varying = _find_varying(trials)
    groups: dict[tuple[Any, ...], dict[float, dict[int, Trial]]] = {}
    num_repeats = 0
    for trial in trials:
        key = tuple(trial.setting[name] for name in varying)
        seeds = groups.setdefault(key, {}).setdefault(trial.target, {})
        num_repeats += trial.seed in seeds
        seeds.setdefault(trial.seed, trial)
    curves = [_make_curve(points, varying) for points in groups.values()]
    curves.sort(key=lambda curve: (_place(curve.criterion), curve.label))
    _tell_apart(curves)
    counted = [t for curve in curves for point in curve.points for t in point.trials]
    dense = _average_dense(counted, lambda dense: dense.reference.score)
    assert dense is not None
    found = WorkloadCurves(
        title=title,
        curves=curves,
        dense=dense,
        dense_loss=_average_dense(counted, lambda dense: dense.reference.loss),
        dense_ways=_average_ways(counted),
        front=[],
        trials=counted,
        num_repeats=num_repeats,
        judged_on=trials[0].final.judged_on,
        varying=varying,
        metric=trials[0].dense.metric,
        kind=trials[0].goal.kind,
    )
    found.front = found.find_front(found.measure)
    return found


def _find_varying(trials: list[Trial]) -> list[str]:
    names = [name for name in trials[0].setting if name not in ("seed", *GOAL_FIELDS)]
    return [name for name in names if len({trial.setting[name] for trial in trials}) > 1]


def _make_curve(points: dict[float, dict[int, Trial]], varying: list[str]) -> Curve:
    by_target = {
        target: tuple(seeds[seed] for seed in sorted(seeds)) for target, seeds in points.items()
    }
    by_target = dict(sorted(by_target.items(), key=lambda item: item[1][0].goal.depth))
    sparsest = list(by_target.values())[-1]
    first = sparsest[0]
    setting = {name: first.setting[name] for name in varying}
    return Curve(
        label=_label(setting, str(first.setting[_CRITERION])),
        criterion=str(first.setting[_CRITERION]),
        setting=setting,
        points=[_make_point(target, trials, None) for target, trials in by_target.items()],
        on_the_way=[
            _make_point(sparsest[0].target, sparsest, number)
            for number in range(1, min(len(trial.rounds) for trial in sparsest) - 1)
            # A round that removes nothing more gives no new point.
            if all(t.rounds[number].sparsity < t.rounds[number + 1].sparsity for t in sparsest)
        ],
        has_own_schedules=has_own_schedule(
            first.setting["finetune.epochs"],
            first.setting["finetune.after"],
            first.setting["finetune.lr_schedule"],
            first.setting["prune.rewind"],
        ),
    )


def _make_point(target: float, trials: tuple[Trial, ...], number: int | None) -> Point:
    rounds = [trial.final if number is None else trial.rounds[number] for trial in trials]

    def spread(values: Iterable[float | None]) -> Spread:
        found = Spread.of(values)
        # Counts, sparsities and scores are always there.
        assert found is not None
        return found

    phases = {name: 0.0 for trial in trials for name in trial.worker_seconds}
    for trial in trials:
        for name, seconds in trial.worker_seconds.items():
            phases[name] += seconds / len(trials)
    return Point(
        target=target,
        round=number,
        trials=trials,
        sparsity=spread(item.sparsity for item in rounds),
        score=spread(item.score for item in rounds),
        score_pruned=Spread.of(item.score_pruned for item in rounds),
        test_score=None if number else Spread.of(trial.test_score for trial in trials),
        gap=Spread.of(
            item.train_score - item.score for item in rounds if item.train_score is not None
        ),
        drop=spread(
            item.score - trial.dense.reference.score
            for item, trial in zip(rounds, trials, strict=True)
        ),
        loss=Spread.of(item.loss for item in rounds),
        num_nonzero=spread(item.num_nonzero for item in rounds),
        compression=spread(item.compression for item in rounds),
        speedup=spread(item.speedup for item in rounds),
        macs_left=Spread.of(item.macs_left for item in rounds),
        parameters_left=spread(item.parameters_left for item in rounds),
        bytes_left=spread(item.bytes_left for item in rounds),
        worker_seconds=spread(sum(trial.worker_seconds.values()) for trial in trials),
        phases=phases,
    )


def _average_dense(trials: list[Trial], measure: Callable[[Round], float | None]) -> Spread | None:
    # Trials of a seed share their dense network, so a seed is one value however many there are.
    by_seed: dict[int, list[float]] = {}
    for trial in trials:
        if (value := measure(trial.dense)) is not None:
            by_seed.setdefault(trial.seed, []).append(value)
    return Spread.of(statistics.fmean(values) for values in by_seed.values())


def _average_ways(trials: list[Trial]) -> dict[str, Spread]:
    stored = _average_dense(trials, lambda dense: dense.score)
    recalibrated = _average_dense(trials, lambda dense: dense.score_recalibrated)
    if stored is None or recalibrated is None:
        return {}
    return {"as stored": stored, "with BatchNorm re-estimated": recalibrated}


# -- names -----------------------------------------------------------------------------------------


def _label(setting: dict[str, Any], criterion: str) -> str:
    others = {name: value for name, value in setting.items() if name != _CRITERION}
    words = name_values(others)
    if _CRITERION in setting or not words:
        words.insert(0, criterion)
    return ", ".join(words)


def _tell_apart(curves: Sequence[Curve]) -> None:
    """Numbers curves whose labels would be the same, as of values that differ beyond six digits."""
    counts: dict[str, int] = {}
    for curve in curves:
        counts[curve.label] = number = counts.get(curve.label, 0) + 1
        if number > 1:
            curve.label += f" ({number})"


def _place(criterion: str) -> tuple[int, str]:
    names = list(CRITERIA)
    return (names.index(criterion) if criterion in names else len(names), criterion)


def _num_workers(value: int | str | None) -> int:
    """Reads how many workers a trial had; of a range, which the index holds as text, the most."""
    most = json.loads(value)[-1] if isinstance(value, str) else value
    return max(1, most or 0)
