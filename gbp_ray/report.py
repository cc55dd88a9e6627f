"""Results as people read them: tables of a trial by round and by layer, from records alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gbp_ray.records import write_share, write_value
from gbp_ray.store import RoundRecord, TrialRecord
from gbp_ray.tables import TableColumn, fit_table

__all__ = [
    "difference_table",
    "layer_table",
    "overlap_table",
    "plan_lines",
    "plan_table",
    "results_table",
    "round_table",
    "summary_line",
]


def round_table(trial: TrialRecord) -> Table:
    """Lists the rounds of a trial, dense network first."""
    table = Table(box=SIMPLE_HEAD, title=trial.trial_id, title_justify="left", pad_edge=False)
    table.add_column("round")
    judged = "accuracy" if trial.final.judged_on == "test" else trial.final.judged_on
    is_attacked = any(record.robust_accuracy is not None for record in trial.rounds)
    attacked = ("under attack",) if is_attacked else ()
    headings = ("sparsity", judged, "in training", "before fine-tuning", *attacked, "loss")
    for heading in (*headings, "weights left", "MACs"):
        table.add_column(heading, justify="right")
    for record in trial.rounds:
        cost = record.cost
        mark = " chosen" if trial.test is not None and record is trial.chosen else ""
        table.add_row(
            (str(record.round) if record.round else "dense") + mark,
            f"{record.sparsity:.2%}",
            write_share(record.accuracy),
            write_share(record.train_accuracy),
            write_share(record.accuracy_pruned),
            *((write_share(record.robust_accuracy),) if is_attacked else ()),
            f"{record.loss:.4f}",
            f"{cost.num_nonzero:,}",
            _macs_left(cost.macs, cost.macs_nonzero),
        )
        if record.accuracy_recalibrated is not None and record.reference.has_gap:
            loss = "" if record.loss_recalibrated is None else f"{record.loss_recalibrated:.4f}"
            accuracy = write_share(record.accuracy_recalibrated)
            table.add_row("re-estimated", "", accuracy, *[""] * (2 + is_attacked), loss)
            table.caption = "re-estimated: dense, with BatchNorm as it is after each prune"
    return table


def layer_table(record: RoundRecord) -> Table:
    """Lists the prunable layers of a round."""
    title = f"layers after round {record.round}" if record.round else "layers, dense"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for heading in ("layer", "shape"):
        table.add_column(heading)
    for heading in ("weights", "left", "sparsity", "MACs left"):
        table.add_column(heading, justify="right")
    for layer in record.cost.layers:
        name = layer.name
        if layer.name in record.held_back:
            name += " (held back)"
        table.add_row(
            name,
            "x".join(str(size) for size in layer.shape),
            f"{layer.num_weights:,}",
            f"{layer.num_nonzero:,}",
            f"{layer.sparsity:.2%}",
            _macs_left(record.cost.macs, layer.macs_nonzero),
        )
    table.caption = record.cost.unpruned_in_words or None
    table.caption_justify = "left"
    return table


def results_table(
    rows: Sequence[Mapping[str, Any]], fields: Sequence[str], width: int
) -> tuple[Table, list[str]]:
    """Lists rounds of many trials: what was measured, and the given fields of their jobs.

    Args:
        width: Of the terminal, in characters.

    Returns:
        The table, and the columns that it has no room for.
    """

    def column(heading: str, write: Callable[[Any], str], rank: int = 0) -> TableColumn:
        return TableColumn(heading, [write(row) for row in rows], "right", rank)

    columns = [TableColumn("trial", [row["trial_id"] for row in rows], "left", widest=90)]
    if len({row["job"] for row in rows}) > 1:
        columns.append(TableColumn("job", [row["job"] for row in rows], "left"))
    columns.append(column("round", lambda row: str(row["round"]), 2))
    columns.append(column("sparsity", lambda row: f"{row['sparsity']:.2%}"))
    columns.append(column("accuracy", lambda row: write_share(row["accuracy"])))
    # Where rounds were judged by other examples, the test split has its own column.
    if any(row.get("judged_on", "test") != "test" for row in rows):
        columns.append(column("test", lambda row: write_share(row["test_accuracy"])))
    if any(row.get("robust_accuracy") is not None for row in rows):
        columns.append(column("under attack", lambda row: write_share(row["robust_accuracy"]), 1))
    columns += [
        column("loss", lambda row: f"{row['loss']:.4f}", 2),
        column("weights left", lambda row: f"{row['num_nonzero']:,}", 3),
        column("MACs left", lambda row: _macs_left(row["macs"], row["macs_nonzero"]), 4),
    ]
    for number, field in enumerate(fields):
        cells = [write_value(row[field]) for row in rows]
        columns.append(TableColumn(field, cells, "left", 5 + number))
    return fit_table(columns, width)


def difference_table(pairs: Mapping[str, Sequence[Any]], heading: str) -> Table:
    """Lists names with the two values that two trials have of each."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(heading)
    for side in ("A", "B"):
        table.add_column(side, justify="right", overflow="fold")
    for name, values in pairs.items():
        table.add_row(name, *(write_value(value) for value in values))
    return table


def overlap_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Lists by layer how many weights two trials keep, and how far these are the same."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("mask")
    for heading in ("weights", "kept by A", "kept by B", "overlap"):
        table.add_column(heading, justify="right")
    for layer in layers:
        sizes = [f"{size:,}" for size in dict.fromkeys(layer["num_weights"]) if size is not None]
        kept = ["" if number is None else f"{number:,}" for number in layer["num_kept"]]
        overlap = "" if layer["overlap"] is None else f"{layer['overlap']:.2%}"
        table.add_row(layer["name"], " / ".join(sizes), *kept, overlap)
    return table


def plan_table(plan: Mapping[str, Any]) -> Table:
    """Lists the phases of a plan: peak memory of a rank, what holds it, bytes sent to others."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase")
    for heading in ("peak MB", "sends MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("held at the peak, MB", overflow="fold")
    for phase in plan["phases"]:
        parts = sorted(phase["held"].items(), key=lambda item: -item[1])
        table.add_row(
            phase["name"],
            _megabytes(phase["num_bytes"]),
            _megabytes(phase["sent_bytes"]) if phase["sent_bytes"] else "",
            ", ".join(f"{name} {_megabytes(size)}" for name, size in parts),
        )
    return table


def plan_lines(planned: Mapping[str, Any]) -> list[str]:
    """Says what running a job would do and cost, beside the table of its phases."""
    done, left, plan = planned["rounds_done"], planned["rounds_left"], planned["plan"]
    if plan is None:
        return [f"finished: all {done} rounds are in {planned['uri']}; nothing would be run"]
    progress = "nothing yet"
    if done:
        progress = f"round {done - 1} is the last whole one, what comes before is skipped"
    memory = f"{_megabytes(plan['peak_bytes'])} MB at the peak"
    sent = f"{_megabytes(plan['sent_bytes_per_round'])} MB each round"
    workers = plan["num_workers"]
    passes = "no pass over the data"
    if plan["num_passes"]:
        times = "1 pass" if plan["num_passes"] == 1 else f"{plan['num_passes']} passes"
        passes = f"{times} over {plan['calibration_examples']:,} examples each round"
    return [
        f"network: {plan['num_parameters']:,} parameters, {plan['num_prunable']:,} prunable; "
        f"{plan['strategy']} on {workers or 1} {'worker' if workers < 2 else 'workers'}",
        f"memory of a rank: {memory}; {_megabytes(plan['data_bytes'])} MB of data come on top, and "
        "the interpreter with its libraries",
        f"scoring: {plan['criterion']}, {passes}; cost {plan['criterion_cost']} against a forward "
        "and backward pass",
        f"training: {plan['pretrain_steps']:,} steps, then {plan['finetune_steps']:,} after each "
        f"of {plan['num_rounds']} rounds, {plan['num_steps']:,} in all",
        f"sent by a rank: {sent}",
        f"stored: {_megabytes(plan['round_bytes'])} MB each round, "
        f"{_megabytes(plan['stored_bytes'])} MB in all, in {planned['uri']}",
        f"done: {progress}; {left} of {done + left} rounds would be run, the dense network's among "
        "them"
        if not done
        else f"done: {progress}; {left} of {done + left} rounds would be run",
        *(f"would not fit: {fault}" for fault in planned["misfits"]),
    ]


def summary_line(trial: TrialRecord) -> str:
    """Says in one line what was reached."""
    final, dense = trial.chosen, trial.dense_reference
    points = (trial.test_accuracy - dense.accuracy) * 100
    what = "accuracy" if trial.test is None else f"test accuracy of round {final.round}"
    cost = final.cost
    saved = f"{cost.macs / max(1, cost.macs_nonzero):.1f}x fewer multiply-adds in theory"
    if not cost.macs:
        saved = f"multiply-adds not counted{f' ({cost.macs_fault})' if cost.macs_fault else ''}"
    reached = (
        f"{what} {write_share(trial.test_accuracy)} ({points:+.2f} points against {dense.name})"
    )
    if fault := trial.accuracy_fault:
        loss = final.loss if trial.test is None else trial.test.loss
        reached = f"loss {loss:.6g} (dense {dense.loss:.6g}; {fault})"
    return (
        f"sparsity {final.sparsity:.2%} of {cost.num_units:,} prunable weights, {reached}, "
        f"{cost.compression:.1f}x fewer non-zero parameters, {saved}"
    )


def _macs_left(macs: int, left: int) -> str:
    """Shortens what is left of a network's multiply-adds, which are none where none are known."""
    return _short(left) if macs else "not counted"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}" if num_bytes >= 1e5 else f"{num_bytes / 1e6:.3f}"
