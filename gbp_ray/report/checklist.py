"""The checklist of Blalock et al. 2020 for pruning results, answered from records.

After "What is the State of Neural Network Pruning?" (arXiv 2003.03033), paraphrased, with one rule
of Wang et al. 2023 (arXiv 2301.05219): criteria are compared from the same dense network with the
same fine-tuning. Every answer is computed from what was run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gbp_ray.config.criteria import BASELINES
from gbp_ray.config.metrics import ACCURACY
from gbp_ray.report.curves import Point, WorkloadCurves

__all__ = [
    "Check",
    "answer_checklist",
    "find_clear_winners",
]

State = Literal["yes", "partly", "no"]
_ENOUGH_SEEDS = 3
_ENOUGH_TARGETS = 5
_ENOUGH_WORKLOADS = 3
_CRITERION = "prune.criterion"
_SCOPE = "prune.scope"


@dataclass(frozen=True)
class Check:
    """One question with its answer."""

    question: str
    state: State
    answer: str


def answer_checklist(
    curves: WorkloadCurves, *, num_workloads: int, versions: Sequence[str], num_unfinished: int
) -> list[Check]:
    """Answers the checklist for the trials of one workload.

    Args:
        num_workloads: Workloads that the same report shows.
        versions: The distinct sets of package versions on record.
        num_unfinished: Trials that started and did not finish, over all workloads.
    """
    return [
        _check_workload(curves),
        _check_num_workloads(num_workloads),
        _check_dense(curves),
        _check_baselines(curves),
        _check_targets(curves),
        _check_costs(curves),
        _check_seeds(curves),
        _check_sameness(curves),
        _check_grid(curves, num_unfinished),
        _check_versions(versions),
        _check_claims(curves),
        *_check_metric(curves),
    ]


def find_clear_winners(curves: WorkloadCurves) -> tuple[list[float], list[float]]:
    """Finds the targets at which the best curve leads by more than chance explains easily.

    Returns:
        Those where the best mean is ahead of the second best by more than both sample standard
        deviations together; and all where two curves or more have deviations to compare.
    """
    clear, compared = [], []
    for target in curves.targets:
        points = [p for c in curves.curves if (p := c.at(target)) and p.score.deviation is not None]
        if len(points) < 2:
            continue
        compared.append(target)
        best, second = sorted(points, key=curves.rank, reverse=True)[:2]
        lead = curves.rank(best) - curves.rank(second)
        if lead > (best.score.deviation or 0.0) + (second.score.deviation or 0.0):
            clear.append(target)
    return clear, compared


def _check_workload(curves: WorkloadCurves) -> Check:
    dense = curves.trials[0].dense
    macs = _count(dense.macs, "multiply-add") if dense.macs else "multiply-adds not counted"
    return Check(
        "Architecture, data and metric are named",
        "partly",
        f"{curves.title}: {dense.num_parameters:,} parameters, {dense.num_units:,} of them "
        f"prunable, {macs}. {_describe_metric(curves)} How the data are prepared, the factory's "
        "own code says.",
    )


def _describe_metric(curves: WorkloadCurves) -> str:
    metric = curves.metric
    if metric == ACCURACY:
        return "Accuracy is the share of the whole test split that is right after the last epoch."
    best = "highest" if metric.higher_is_better else "lowest"
    return (
        f"{metric.title} is measured on the whole {curves.judged_on} split after the last epoch; "
        f"the {best} is best."
    )


def _check_num_workloads(number: int) -> Check:
    return Check(
        f"At least {_ENOUGH_WORKLOADS} pairs of data and architecture",
        "yes" if number >= _ENOUGH_WORKLOADS else "partly" if number > 1 else "no",
        f"This report shows {_count(number, 'workload')}.",
    )


def _check_dense(curves: WorkloadCurves) -> Check:
    by_seed: dict[int, set[str | None]] = {}
    for trial in curves.trials:
        by_seed.setdefault(trial.seed, set()).add(trial.dense.weights_sha256)
    is_shared = all(len(found) == 1 and None not in found for found in by_seed.values())
    number = _count(curves.dense.num, "seed")
    if len(curves.trials) == len(by_seed):
        return Check("The dense network is measured the same way", "yes", f"With {number}.")
    return Check(
        "All start from the same dense networks, measured the same way",
        "yes" if is_shared else "no",
        f"{number} of the dense network; "
        + (
            "all trials of a seed start from the same weights (same SHA-256)."
            if is_shared
            else "trials of one seed start from different weights, so the dense networks' own "
            "spread is part of every difference."
        ),
    )


def _check_baselines(curves: WorkloadCurves) -> Check:
    found = {curve.criterion: curve for curve in curves.curves}
    there = [name for name in BASELINES if name in found]
    missing = [name for name in BASELINES if name not in found]
    by_layer = sorted(
        {
            curve.criterion
            for curve in curves.curves
            if curve.criterion in there and curve.setting.get(_SCOPE) == "layer"
        }
    )
    answer = f"There: {', '.join(['dense', *there])}."
    if missing:
        answer += f" Missing: {', '.join(missing)}."
    if by_layer:
        answer += f" By layer as well: {', '.join(by_layer)}."
    elif there:
        answer += " None of them with prune.scope = layer beside another scope."
    state: State = "no" if not there else "partly" if missing or not by_layer else "yes"
    return Check("Baselines: random and magnitude, whole and by layer", state, answer)


def _check_targets(curves: WorkloadCurves) -> Check:
    counts = [len(curve.points) for curve in curves.curves]
    metric, dense = curves.metric, curves.dense.mean
    sign = 1 if metric.higher_is_better else -1
    drops = [sign * point.drop.mean for point in _points(curves)]
    worst = min((drop for drop in drops if not math.isnan(drop)), default=0.0)
    is_share = metric.unit == "%"
    falls = worst < (-0.01 if is_share else -0.01 * abs(dense))
    is_enough = min(counts) >= _ENOUGH_TARGETS
    names = curves.count_targets(2).partition(" ")[2]
    first, last = _at(curves, curves.targets[0]), _at(curves, curves.targets[-1])
    answer = f"{_range(counts)} {names} per curve ({first} to {last}). "
    answer += (
        f"{metric.title} {metric.worsens} by "
        f"{f'{-100 * worst:.1f} points' if is_share else f'{-worst:.4g}'} at worst."
        if falls
        else f"{metric.title} {metric.worsens} by no more than {'a point' if is_share else '1 %'} "
        "anywhere: the {names} do not reach the end of what the network bears."
    )
    state: State = "yes" if is_enough and falls else "partly" if max(counts) > 1 else "no"
    question = f"At least {_ENOUGH_TARGETS} {names}, some where {metric.name} {metric.worsens}"
    return Check(question, state, answer)


def _check_costs(curves: WorkloadCurves) -> Check:
    has_macs = all(trial.dense.macs > 0 for trial in curves.trials)
    if curves.has_units:
        how = "removed units have left it" if curves.is_compact else "its zeros are taken out"
        return Check(
            "Parameters and multiply-adds, both",
            "yes" if has_macs else "partly",
            f"Both are counted in the network once {how}, beside the bytes of its tensors: sizes, "
            "not a measured time"
            + ("." if has_macs else "; multiply-adds are not on record for all of them."),
        )
    return Check(
        "Parameters and multiply-adds, both",
        "yes" if has_macs else "partly",
        "Compression is parameters before over parameters left, of the whole model; the speed-up "
        + (
            "is multiply-adds before over multiply-adds left: theory, not a measured time."
            if has_macs
            else "is unknown, because no multiply-adds are on record."
        ),
    )


def _check_seeds(curves: WorkloadCurves) -> Check:
    numbers = [len(point.trials) for point in _points(curves)]
    state: State = (
        "yes" if min(numbers) >= _ENOUGH_SEEDS else "partly" if max(numbers) > 1 else "no"
    )
    few = [
        f"{curve.label} at {_at(curves, point.target)}"
        for curve in curves.curves
        for point in curve.points
        if len(point.trials) < _ENOUGH_SEEDS
    ]
    answer = f"{_range(numbers)} seed{'' if max(numbers) == 1 else 's'} per point."
    if max(numbers) == 1:
        answer += " One value has no deviation: a difference may be luck."
    elif few:
        answer += f" Fewer than {_ENOUGH_SEEDS}: {_some(few)}."
    return Check(f"Mean and deviation over {_ENOUGH_SEEDS} seeds or more", state, answer)


def _check_sameness(curves: WorkloadCurves) -> Check:
    others = [name for name in curves.varying if name != _CRITERION]
    criteria = {curve.criterion for curve in curves.curves}
    if len(criteria) < 2:
        answer = f"Only {next(iter(criteria))} was run: there is no criterion to compare it with."
        return Check("Criteria compared under the same conditions", "no", answer)
    if not others:
        answer = "The curves differ in prune.criterion and in nothing else."
        return Check("Criteria compared under the same conditions", "yes", answer)
    return Check(
        "Criteria compared under the same conditions",
        "partly",
        f"The curves differ in {', '.join(others)} as well; compare those that agree in it.",
    )


def _check_grid(curves: WorkloadCurves, num_unfinished: int) -> Check:
    seeds, targets = curves.seeds, curves.targets
    missing = [
        f"{curve.label} at {_at(curves, target)}, seed {seed}"
        for curve in curves.curves
        for target in targets
        for seed in seeds
        if (point := curve.at(target)) is None or seed not in point.seeds
    ]
    total = len(curves.curves) * len(targets) * len(seeds)
    answer = (
        f"{total - len(missing)} of {total} combinations of curve, "
        f"{curves.count_targets(1).partition(' ')[2]} and seed are there."
    )
    if missing:
        answer += f" Missing: {_some(missing)}."
    if num_unfinished:
        answer += (
            f" {_count(num_unfinished, 'trial')} of this storage never finished and "
            f"{'is' if num_unfinished == 1 else 'are'} in no figure."
        )
    if curves.num_repeats:
        answer += f" {_count(curves.num_repeats, 'trial')} repeated another one: counted once."
    state: State = "yes" if not missing and not num_unfinished else "partly"
    return Check("Nothing is missing from the comparison", state, answer)


def _check_versions(versions: Sequence[str]) -> Check:
    if not versions:
        return Check("Software and hardware are on record", "no", "No versions are on record.")
    if len(versions) == 1:
        return Check(
            "Software and hardware are on record",
            "partly",
            f"{versions[0]}. Of the hardware only this is known.",
        )
    return Check(
        "Software and hardware are on record",
        "partly",
        f"{len(versions)} different sets of versions were at work: {_some(list(versions))}.",
    )


def _check_claims(curves: WorkloadCurves) -> Check:
    clear, compared = find_clear_winners(curves)
    name = curves.count_targets(1).partition(" ")[2]
    if not compared:
        return Check(
            "Differences are larger than the spread",
            "no",
            f"No {name} has two curves with two seeds each, so no difference can be judged.",
        )
    where = f" ({_some([_at(curves, target) for target in clear])})" if clear else ""
    return Check(
        "Differences are larger than the spread",
        "yes" if len(clear) == len(compared) else "partly" if clear else "no",
        f"The best curve leads the next by more than both deviations together at {len(clear)} of "
        f"{curves.count_targets(len(compared))}{where}; elsewhere the order of the "
        "best two means little.",
    )


def _check_metric(curves: WorkloadCurves) -> list[Check]:
    """Returns a check that names what makes the metric doubtful; none if nothing does."""
    doubt = curves.metric_fault or curves.metric_doubt
    question = "The metric tells networks apart"
    return [Check(question, "no", f"{doubt[0].upper()}{doubt[1:]}.")] if doubt else []


# -- words -----------------------------------------------------------------------------------------


def _at(curves: WorkloadCurves, target: float) -> str:
    return curves.name_target(target) if curves.has_units else f"{target:.4g}"


def _points(curves: WorkloadCurves) -> list[Point]:
    return [point for curve in curves.curves for point in curve.points]


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _some(texts: list[str], num_most: int = 6) -> str:
    more = f" and {len(texts) - num_most} more" if len(texts) > num_most else ""
    return f"{'; '.join(texts[:num_most])}{more}"
