"""What a sweep found, or would cost: means and deviations over seeds, answers to a target.

Rows that differ in nothing but the seed are one line of the table. From rows alone: neither torch
nor Ray nor the records are needed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gbp_ray.records import write_share, write_value
from gbp_ray.tables import TableColumn, fit_table

__all__ = [
    "answers_table",
    "ends_table",
    "kinds_table",
    "summarize",
    "summary_table",
    "sweep_plan_lines",
]

_MEASURED = (
    "accuracy",
    "test_accuracy",
    "train_accuracy",
    "loss",
    "sparsity",
    "macs_nonzero",
    "num_nonzero",
)
_MEASURED_BY_SOME = ("robust_accuracy",)


def summarize(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Takes together the rows of trials that differ in the seed alone.

    Args:
        rows: The last round of each trial, as `Results.to_rows` gives them.
        fields: The dotted fields in which the trials differ; the seed among them is passed over.

    Returns:
        One row per combination: its fields, `num_seeds`, and of each measurement the mean and,
        as `..._deviation`, the sample standard deviation, None for a single trial. What only some
        jobs measure is there if any of these trials has it, None where not all have. Sorted by
        sparsity, then by accuracy, the best first.
    """
    rows = list(rows)
    measured = [*_MEASURED]
    measured += [n for n in _MEASURED_BY_SOME if any(row.get(n) is not None for row in rows)]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    kept = [field for field in fields if field != "seed"]
    for row in rows:
        groups.setdefault(tuple(repr(row[field]) for field in kept), []).append(row)
    lines = []
    for members in groups.values():
        line: dict[str, Any] = {field: members[0][field] for field in kept}
        line["num_seeds"] = len(members)
        for name in measured:
            values = [row[name] for row in members if row.get(name) is not None]
            is_whole = len(values) == len(members)
            line[name] = statistics.fmean(values) if is_whole else None
            has_spread = is_whole and len(values) > 1
            line[f"{name}_deviation"] = statistics.stdev(values) if has_spread else None
        line["judged_on"] = members[0].get("judged_on", "test")
        lines.append(line)
    # Measured sparsities of equal jobs may differ by a weight.
    return sorted(lines, key=lambda line: (round(line["sparsity"], 3), -line["accuracy"]))


def summary_table(
    lines: Sequence[Mapping[str, Any]], fields: Sequence[str], width: int = 140
) -> Table:
    """Shows what `summarize` gives, as far as a terminal's width has room for it."""
    # Where rounds were judged by other examples, the test split has its own columns.
    is_tested = any(line["judged_on"] != "test" for line in lines)
    is_attacked = any("robust_accuracy" in line for line in lines)
    sparsities = [f"{line['sparsity']:.2%}" for line in lines]
    shown = ["" if i and text == sparsities[i - 1] else text for i, text in enumerate(sparsities)]
    columns = [TableColumn("sparsity", shown)]
    for field in fields:
        if field not in ("seed", "prune.sparsity"):
            cells = [write_value(line[field]) for line in lines]
            columns.append(TableColumn(field.removeprefix("prune."), cells, "left"))

    def add(heading: str, name: str, rank: int) -> None:
        columns.append(
            TableColumn(heading, [write_share(line[name]) for line in lines], "right", rank)
        )
        deviations = [write_share(line[f"{name}_deviation"]) for line in lines]
        columns.append(TableColumn("+-", deviations, "right", rank))

    add("accuracy", "accuracy", 0)
    if is_tested:
        add("test", "test_accuracy", 0)
    if is_attacked:
        add("under attack", "robust_accuracy", 1)
    columns += [
        TableColumn("seeds", [str(line["num_seeds"]) for line in lines], "right", 2),
        TableColumn("loss", [f"{line['loss']:.4f}" for line in lines], "right", 3),
        TableColumn("weights left", [f"{line['num_nonzero']:,.0f}" for line in lines], "right", 4),
    ]
    return fit_table(columns, width)[0]


def answers_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Shows the largest sparsities within a target, and what they took."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("for")
    for heading in ("sparsity", "accuracy", "dense", "trials", "worker-seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for line in lines:
        sparsity = "none" if line["sparsity"] is None else f"{line['sparsity']:.2%}"
        note = line["cause"]
        if line["is_highest"]:
            note = "the highest that was asked for"
        elif line["sparsity"] is None and not note:
            note = "the lowest already loses more"
        mark = ""
        if line["dense_is_recalibrated"]:
            mark = "*"
            table.caption = "* with BatchNorm re-estimated, as after each prune"
        table.add_row(
            line["label"],
            sparsity,
            write_share(line["accuracy"]),
            write_share(line["dense_accuracy"]) + (mark if line["dense_accuracy"] else ""),
            str(line["num_trials"]),
            f"{line['seconds']:.0f}",
            note,
        )
    return table


def ends_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Shows the trials that failed or were stopped, and why."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why", overflow="fold")
    for line in lines:
        why = line["cause"] or f"weaker than others after round {line['round']}"
        table.add_row(line["trial_id"], line["state"], why)
    return table


def kinds_table(kinds: Sequence[Mapping[str, Any]]) -> Table:
    """Shows what the trials of a planned sweep hold and write."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("criterion", overflow="fold")
    for heading in ("trials", "peak MB", "in", "sends MB a round", "stores MB a round"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in kinds:
        plan = kind["plan"]
        peak = max(plan["phases"], key=lambda phase: phase["num_bytes"])
        table.add_row(
            kind["name"],
            f"{kind['num_trials']:,}",
            f"{plan['peak_bytes'] / 1e6:,.1f}",
            peak["name"],
            f"{plan['sent_bytes_per_round'] / 1e6:,.1f}" if plan["sent_bytes_per_round"] else "",
            f"{plan['round_bytes'] / 1e6:,.2f}",
        )
    return table


def sweep_plan_lines(planned: Mapping[str, Any]) -> list[str]:
    """Says what running a sweep would do and cost, beside the table of its kinds."""
    about = "about " if planned["is_estimate"] else ""
    skipped = f"{planned['num_finished']:,} are finished"
    if planned["num_stopped"]:
        skipped += f" and {planned['num_stopped']:,} stopped"
    lines = [f"trials: {about}{planned['num_trials']:,}, of which {skipped} and are skipped"]
    if not planned["num_left"]:
        return [*lines, f"nothing would be run; results: {planned['uri']}"]
    workers = planned["num_workers"]
    each = "1 worker" if workers < 2 else f"{workers} workers"
    begun = f", {planned['num_begun']:,} of them begun before" if planned["num_begun"] else ""
    lines += [
        f"to run: {about}{planned['num_left']:,}{begun}; {planned['num_at_once']:,} at a time, "
        f"{each} each, on {_machines(planned['machines'])}",
        f"training: {about}{planned['num_steps']:,} steps; {planned['num_dense']:,} dense "
        "networks, shared where trials agree on one",
        f"memory of a worker: {planned['worker_bytes'] / 1e6:,.1f} MB at the peak; "
        f"{planned['host_bytes'] / 1e6:,.0f} MB of its machine, data and libraries included",
        f"stored: {about}{planned['stored_bytes'] / 1e6:,.1f} MB in {planned['uri']}",
    ]
    if planned["num_unplanned"]:
        lines.append(
            f"not looked into: {planned['num_unplanned']:,} trials of further kinds; steps, memory "
            "and bytes leave them out"
        )
    if planned["seconds_left"] is not None:
        lines.append(f"time: {about}{planned['seconds_left']:,.0f} s at the pace of those finished")
    return lines + [f"would not fit: {fault}" for fault in planned["misfits"]]


def _machines(machines: Sequence[Sequence[Any]]) -> str:
    totals = {
        kind: sum(resources.get(kind, 0) for _, resources in machines) for kind in ("CPU", "GPU")
    }
    parts = [f"{number:g} {kind}s" for kind, number in totals.items() if number]
    count = "1 machine" if len(machines) == 1 else f"{len(machines)} machines"
    return f"{count} with {' and '.join(parts) or 'no CPUs'}"
