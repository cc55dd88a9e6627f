"""The figures of one workload in the report, each with what it shows and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.errors import name_some
from gbp_ray.report import figures, unit_figures
from gbp_ray.report.curves import WorkloadCurves, pick_targets
from gbp_ray.report.details import CloseUp
from gbp_ray.report.drawing import Draw, Sketch, style_curves
from gbp_ray.report.spreads import write_score
from gbp_ray.results.goals import COSTS

__all__ = [
    "sketch_workload",
]


def sketch_workload(curves: WorkloadCurves, close_ups: Sequence[CloseUp]) -> list[Sketch]:
    """Sketch every figure of a workload.

    Args:
        close_ups: The sparsities at which layers and masks are shown, as `look_closely` picks them.
    """
    styles, metric = style_curves(curves.curves), curves.metric
    targets = [close_up.target for close_up in close_ups] or pick_targets(curves.curves, 3)
    words = _word_figures(curves, targets)
    sketches: list[Sketch] = []

    def add(name: str, title: str, draw: Draw) -> None:
        sketches.append(Sketch(name, title, draw, *words[name]))

    # One point has nothing to be seen against; the table has its numbers.
    if sum(len(curve.points) for curve in curves.curves) > 1:
        name = _name_scores(metric)
        scores = partial(figures.draw_scores, curves, styles)
        tradeoffs = partial(figures.draw_tradeoffs, curves, styles)
        against = "sparsity" if curves.measure == "sparsity" else COSTS[curves.measure]
        add(name, f"{metric.title} against {against}", scores)
        add("tradeoffs", f"{metric.title} against size and arithmetic", tradeoffs)
    rounds = partial(figures.draw_rounds, curves, targets, styles)
    add("rounds", "Training over the rounds", rounds)
    if networks := unit_figures.pick_networks(curves, close_ups):
        draw = partial(unit_figures.draw_networks, networks)
        add("network", "The network before and after", draw)
    if close_ups and curves.has_units:
        draw = partial(unit_figures.draw_widths, close_ups, styles)
        add("widths", "Widths by layer", draw)
    elif close_ups:
        add("layers", "Sparsity by layer", partial(figures.draw_layers, close_ups, styles))
    if overlapping := [close_up for close_up in close_ups if close_up.overlaps]:
        add("overlaps", "Overlap of the masks", partial(figures.draw_overlaps, overlapping))
    add("cost", "Cost of each point", partial(figures.draw_cost, curves, targets))
    return sketches


def _name_scores(metric: MetricSpec) -> str:
    """Returns the name of the figure that shows the metric."""
    return "accuracy" if metric == ACCURACY else "scores"


def _word_figures(curves: WorkloadCurves, targets: Sequence[float]) -> dict[str, tuple[str, str]]:
    """Write for each figure its alternative text and its caption."""
    metric = curves.metric
    judged = f"{curves.judged_on.capitalize()} {metric.name}"
    most = "accurate" if metric == ACCURACY else "good"
    small, sparsest = ("small", "smallest") if curves.has_units else ("sparse", "sparsest")
    names = name_some([curve.label for curve in curves.curves], 8)
    best = []
    for target in targets:
        points = [(c.label, p) for c in curves.curves if (p := c.at(target))]
        where = curves.name_target(target)
        if points:
            label, point = max(points, key=lambda pair: curves.rank(pair[1]))
            reached = write_score(point.score, metric)
            best.append(f"{label} with {reached} at {where}")
    found = f"Best: {'; '.join(best)}. Dense: {write_score(curves.dense, metric)}."
    is_spread = any(p.score.num > 1 for c in curves.curves for p in c.points)
    spread = (
        "Bars are one sample standard deviation over seeds."
        if is_spread
        else "One seed: there are no deviations to show."
    )
    on_the_way = [curve for curve in curves.curves if curve.on_the_way]
    way = ""
    if on_the_way:
        own = [curve.has_own_schedules for curve in on_the_way]
        way = (
            f" Hollow marks are earlier rounds of the {sparsest} trials"
            + (
                ", each with a learning-rate schedule of its own: comparable, though pruned in "
                "fewer rounds."
                if all(own)
                else ", measured before the learning rate had come down: "
                f"{'lower' if metric.higher_is_better else 'upper'} bounds, not comparable with "
                "last rounds."
                if not any(own)
                else "; comparable only where each round has a learning-rate schedule of its own."
            )
            + " They are not part of the front."
        )
    front = (
        f" Rings mark the Pareto front: no other point is as {small} and as {most}."
        if len(curves.front) > 1
        else ""
    )
    at = ", ".join(f"{100 * target:.4g} %" for target in targets)
    at = f"sparsity {at}"
    measure, size = "sparsity", "compression and theoretical speed-up"
    sizes = (
        "Compression counts every parameter of the model; the speed-up counts multiply-adds "
        "and is theory, not a measured time."
    )
    if curves.has_units:
        at = ", ".join(map(curves.name_target, targets))
        measure = f"{COSTS[curves.measure]} left"
        others = [COSTS[cost] for cost in curves.costs if cost != curves.measure]
        size = f"{' and '.join(others)} left"
        sizes = f"{_describe_costs(curves)}{front}"
    return {
        _name_scores(metric): (
            f"{judged} against {measure} of {names}. {found}",
            f"{spread}{front}{way}",
        ),
        "tradeoffs": (
            f"{judged} against {size} of {names}. {found}",
            f"{sizes} {spread}",
        ),
        "rounds": (
            f"{judged} and loss after each round of {names}, for trials to {at}.",
            "Lines are means over seeds, bands one sample standard deviation. Dotted: "
            f"{metric.name} before the round's fine-tuning; training loss of the fine-tuning.",
        ),
        "layers": (
            f"Sparsity of each layer after the last round of {names}, at {at}; the "
            "numbers are in the table below.",
            "Layers from the input, top, to the output; means over seeds.",
        ),
        "network": (
            f"Units of each group before and after pruning to {at}, of the curve with the best "
            f"{metric.name}; the numbers are in the table below.",
            "The network from the input, top, to the output: a bar for each group of units, named "
            "by the first weight that makes them, as wide as the dense network in grey and as "
            "what is left in colour. Of the best curve at each target; means over seeds.",
        ),
        "widths": (
            f"Share of each group's units that is left after the last round of {names}, at {at}; "
            "the numbers are in the table below.",
            "Groups from the input, top, to the output, named by the first weight that makes "
            "their units; means over seeds.",
        ),
        "overlaps": (
            f"Matrix of the overlap of kept weights between {names}, at {at}; the numbers "
            "are in the table below.",
            "Kept weights in common over those that either keeps. Off the diagonal: two curves, "
            "the same seed. On it: two seeds of one curve. The table gives the overlap of random "
            "masks with the same layers' sparsities beside it.",
        ),
        "cost": (
            f"Worker-seconds by phase of each point of {names}.",
            "Seconds of each phase on record, over all rounds, times the workers; the mean over "
            "seeds. Start-up and waiting are not in it.",
        ),
    }


def _describe_costs(curves: WorkloadCurves) -> str:
    """Says what the costs of whole units are counts of."""
    what = "without its removed units" if curves.is_compact else "as it is once its zeros are out"
    return (
        f"What is left of the dense network's costs, counted in the network {what}; no measured "
        "time."
    )
