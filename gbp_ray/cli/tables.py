"""Tables and lines that verbs print, from records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from gbp_ray.cli.columns import TableColumn, fit_table, make_table
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.results.goals import COSTS, GOAL_FIELDS, Goal, has_units, write_left
from gbp_ray.results.records import (
    CostRecord,
    RoundRecord,
    TrialRecord,
    WidthRecord,
    describe_unpruned,
    write_value,
)
from gbp_ray.results.scores import spec_of, write_share

__all__ = [
    "RE_ESTIMATED",
    "TableColumn",
    "answers_table",
    "difference_table",
    "ends_table",
    "fit_table",
    "kinds_table",
    "layer_table",
    "make_table",
    "overlap_table",
    "plan_lines",
    "plan_table",
    "results_table",
    "round_table",
    "summary_line",
    "summary_lines",
    "summary_table",
    "sweep_plan_lines",
    "widths_table",
    "write_megabytes",
]

RE_ESTIMATED = "* with BatchNorm re-estimated, as after each prune"


def write_megabytes(num_bytes: float) -> str:
    """Write a size in MB, a small one with more digits."""
    return f"{num_bytes / 1e6:,.1f}" if num_bytes >= 1e5 else f"{num_bytes / 1e6:.3f}"


def round_table(trial: TrialRecord) -> Table:
    """List the rounds of a trial, dense network first."""
    metric = trial.metric
    judged = metric.name if trial.final.judged_on == "test" else trial.final.judged_on
    is_attacked = any(record.robust_accuracy is not None for record in trial.rounds)
    is_tuned = any(
        record.score_pruned is not None
        and (record.train_loss is not None or record.score_pruned != record.score)
        for record in trial.rounds
    )
    others = trial.dense.other_metrics
    rows, caption = [], None
    for record in trial.rounds:
        cost = record.cost
        mark = " chosen" if trial.test is not None and record is trial.chosen else ""
        rows.append(
            (
                (str(record.round) if record.round else "dense") + mark,
                *_shares_of(cost),
                metric.write(record.score),
                metric.write(record.train_score),
                *((metric.write(record.score_pruned),) if is_tuned else ()),
                *(other.write(record.metrics.get(other.name)) for other in others),
                *((write_share(record.robust_accuracy),) if is_attacked else ()),
                f"{record.loss:.4f}",
                *(() if cost.units is None else (f"{cost.units.num_kept:,}",)),
                f"{cost.num_nonzero:,}",
                _macs_left(cost.macs, cost.macs_nonzero),
            )
        )
        if record.score_recalibrated is not None and record.reference.has_gap:
            loss = "" if record.loss_recalibrated is None else f"{record.loss_recalibrated:.4f}"
            score = metric.write(record.score_recalibrated)
            between = [""] * (1 + is_tuned + len(others) + is_attacked)
            shares = ["" for _ in _shares_of(cost)]
            rows.append(("re-estimated", *shares, score, *between, loss))
            caption = "re-estimated: dense, with BatchNorm as it is after each prune"
    attacked = ("under attack",) if is_attacked else ()
    is_whole = trial.final.cost.units is not None
    headings = ["MACs left", "weights left"] if is_whole else ["sparsity"]
    headings += [judged, "in training", *(["before fine-tuning"] if is_tuned else [])]
    headings += [*(other.name for other in others), *attacked, "loss"]
    headings += ["units", "weights", "MACs"] if is_whole else ["weights left", "MACs"]
    table = make_table(rows, ["round"], headings, title=trial.trial_id)
    table.caption = caption
    return table


def _shares_of(cost: CostRecord) -> tuple[str, ...]:
    """Writes what is left of the network where it loses whole units, else the sparsity."""
    if cost.units is None:
        return (f"{cost.sparsity:.2%}",)
    return write_left(cost.left["macs_left"]), write_left(cost.left["parameters_left"])


def layer_table(record: RoundRecord) -> Table:
    """List the prunable layers of a round, of whole units with the widths before and after."""
    title = f"layers after round {record.round}" if record.round else "layers, dense"
    if record.cost.units is not None:
        return _width_table(record, title)
    rows = [
        (
            layer.name + (" (held back)" if layer.name in record.held_back else ""),
            "x".join(str(size) for size in layer.shape),
            f"{layer.num_weights:,}",
            f"{layer.num_nonzero:,}",
            f"{layer.sparsity:.2%}",
            # What part of the network's products is the layer's may not be known.
            _macs_left(
                record.cost.macs and (layer.macs or not record.cost.macs_fault), layer.macs_nonzero
            ),
        )
        for layer in record.cost.layers
    ]
    numbers = ("weights", "left", "sparsity", "MACs left")
    table = make_table(rows, ("layer", "shape"), numbers, title=title)
    table.caption = record.cost.unpruned_in_words or None
    table.caption_justify = "left"
    return table


def _widths_by_weight(widths: Iterable[WidthRecord]) -> dict[str, WidthRecord]:
    """Adds up the groups that one weight makes."""
    found: dict[str, WidthRecord] = {}
    for width in widths:
        units, kept = width.num_units, width.num_kept
        if (other := found.get(width.weight)) is not None:
            units, kept = units + other.num_units, kept + other.num_kept
        found[width.weight] = width.model_copy(update={"num_units": units, "num_kept": kept})
    return found


def _width_table(record: RoundRecord, title: str) -> Table:
    cost = record.cost
    assert cost.units is not None
    widths = _widths_by_weight(cost.units.widths)
    layers = {layer.name: layer for layer in cost.layers}
    rows = []
    for name in dict.fromkeys((*layers, *widths)):
        width, layer = widths.get(name), layers.get(name)
        made = "" if width is None else f"{width.num_units:,} -> {width.num_kept:,}"
        if width is not None and width.kind != "channel":
            made += f" {width.kind}s"
        cells = [""] * 4
        if layer is not None:
            cells = [
                "x".join(map(str, layer.shape)),
                f"{layer.num_weights:,}",
                f"{layer.num_nonzero:,}",
                f"{1 - layer.sparsity:.1%}",
            ]
            # What part of the network's products is the layer's may not be known.
            is_known = bool(cost.macs and (layer.macs or not cost.macs_fault))
            cells.append(_macs_left(is_known, layer.macs_nonzero))
        mark = " (held back)" if name in record.held_back else ""
        rows.append((name + mark, cells[0], made, *cells[1:]))
    numbers = ("units", "weights", "left", "of them", "MACs left")
    table = make_table(rows, ("layer", "shape"), numbers, title=title)
    notes = [
        "units: those that a layer makes and no layer before it, before -> after; it shares the "
        "others, or keeps them",
        cost.unpruned_in_words,
    ]
    table.caption = ". ".join(filter(None, notes))  # printed text holds no line breaks
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
    is_whole = all(map(has_units, rows)) and bool(rows)
    heads = ("weights", "MACs") if is_whole else ("weights left", "MACs left")
    if not is_whole:
        columns.append(column("sparsity", lambda row: f"{row['sparsity']:.2%}"))
    else:
        columns.append(column("MACs left", lambda row: write_left(row["macs_left"])))
        columns.append(column("weights left", lambda row: write_left(row["parameters_left"]), 1))

    def add(heading: str, name: str, spec: MetricSpec) -> None:
        columns.append(column(heading, lambda row: spec.write(row[name])))

    for spec in _specs_of(rows):
        add(spec.name, spec.name, spec)
        # Where rounds were judged by other examples, the test split has its own column.
        if any(row.get("judged_on", "test") != "test" for row in rows):
            add("test", f"test_{spec.name}", spec)
    if any(row.get("robust_accuracy") is not None for row in rows):
        columns.append(column("under attack", lambda row: write_share(row["robust_accuracy"]), 1))
    columns += [
        column("loss", lambda row: f"{row['loss']:.4f}", 2),
        column(heads[0], lambda row: f"{row['num_nonzero']:,}", 3),
        column(heads[1], lambda row: _macs_left(row["macs"], row["macs_nonzero"]), 4),
    ]
    for number, field in enumerate(fields):
        cells = [write_value(row[field]) for row in rows]
        columns.append(TableColumn(field, cells, "left", 5 + number))
    return fit_table(columns, width)


def difference_table(pairs: Mapping[str, Sequence[Any]], heading: str) -> Table:
    """List names with the two values that two trials have of each."""
    table = make_table((), [heading])
    for side in ("A", "B"):
        table.add_column(side, justify="right", overflow="fold")
    for name, values in pairs.items():
        table.add_row(name, *map(write_value, values))
    return table


def overlap_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """List by layer how many weights two trials keep, and the overlap."""
    rows = []
    for layer in layers:
        sizes = [f"{size:,}" for size in dict.fromkeys(layer["num_weights"]) if size is not None]
        kept = ["" if number is None else f"{number:,}" for number in layer["num_kept"]]
        overlap = "" if layer["overlap"] is None else f"{layer['overlap']:.2%}"
        rows.append((layer["name"], " / ".join(sizes), *kept, overlap))
    return make_table(rows, ["mask"], ("weights", "kept by A", "kept by B", "overlap"))


def widths_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """List by group how many of its units two trials keep."""
    rows = []
    for group in groups:
        sizes = [f"{size:,}" for size in dict.fromkeys(group["num_units"]) if size is not None]
        kept = ["" if number is None else f"{number:,}" for number in group["num_kept"]]
        rows.append((group["name"], " / ".join(sizes), *kept))
    return make_table(rows, ["units of"], ("dense", "kept by A", "kept by B"))


def plan_table(plan: Mapping[str, Any]) -> Table:
    """List the phases of a plan: peak memory of a rank, what holds it, bytes sent to others."""
    rows = [
        (
            phase["name"],
            write_megabytes(phase["num_bytes"]),
            write_megabytes(phase["sent_bytes"]) if phase["sent_bytes"] else "",
            ", ".join(
                f"{name} {write_megabytes(size)}"
                for name, size in sorted(phase["held"].items(), key=lambda item: -item[1])
            ),
        )
        for phase in plan["phases"]
    ]
    return make_table(rows, ["phase"], ("peak MB", "sends MB"), ["held at the peak, MB"])


def plan_lines(planned: Mapping[str, Any]) -> list[str]:
    """Describe what running a job would do and cost, beside the table of its phases."""
    done, left, plan = planned["rounds_done"], planned["rounds_left"], planned["plan"]
    if plan is None:
        return [f"finished: all {done} rounds are in {planned['uri']}; nothing would be run"]
    progress = "nothing yet"
    if done:
        progress = f"round {done - 1} is the last whole one, what comes before is skipped"
    memory = f"{write_megabytes(plan['peak_bytes'])} MB at the peak"
    sent = f"{write_megabytes(plan['sent_bytes_per_round'])} MB each round"
    workers = plan["num_workers"]
    passes = "no pass over the data"
    if plan["num_passes"]:
        times = "1 pass" if plan["num_passes"] == 1 else f"{plan['num_passes']} passes"
        passes = f"{times} over {plan['calibration_examples']:,} examples each round"
    refit = ""
    if any(phase["name"] == "reconstruct" for phase in plan["phases"]):
        refit = f"a pass of both networks over {plan['calibration_examples']:,} examples each round"
    once = plan["pretrain_steps"] + plan["finetune_steps"]
    is_last = plan["num_rounds"] > 1 and plan["num_steps"] == once > plan["pretrain_steps"]
    units = plan.get("units", "")
    prunable = f"{plan['num_prunable']:,} {'in such units' if units else 'prunable'}"
    return [
        *([f"units: {units}"] if units else []),
        f"network: {plan['num_parameters']:,} parameters, {prunable}; "
        f"{plan['strategy']} on {workers or 1} {'worker' if workers < 2 else 'workers'}",
        *filter(None, [describe_unpruned(plan["unpruned"], plan["num_prunable"])]),
        f"memory of a rank: {memory}{', of the dense network' if units else ''}; "
        f"{write_megabytes(plan['data_bytes'])} MB of data on top, "
        "and the interpreter with its libraries",
        f"scoring: {plan['criterion']}, {passes}; cost {plan['criterion_cost']} against a forward "
        "and backward pass",
        *([f"reconstruction: {refit}"] if refit else []),
        f"training: {plan['pretrain_steps']:,} steps, then {plan['finetune_steps']:,} after "
        f"{'the last' if is_last else 'each'} of {plan['num_rounds']} rounds, "
        f"{plan['num_steps']:,} in all",
        f"sent by a rank: {sent}",
        f"stored: {write_megabytes(plan['round_bytes'])} MB each round"
        f"{', in dense shapes with zeros' if units else ''}, "
        f"{write_megabytes(plan['stored_bytes'])} MB in all, in {planned['uri']}",
        f"done: {progress}; {left} of {done + left} rounds would be run, the dense network's among "
        "them"
        if not done
        else f"done: {progress}; {left} of {done + left} rounds would be run",
        *(f"would not fit: {fault}" for fault in planned["misfits"]),
    ]


def summary_line(trial: TrialRecord) -> str:
    """Summarize a trial in one line."""
    final, dense, metric = trial.chosen, trial.dense_reference, trial.metric
    what = metric.name if trial.test is None else f"test {metric.name} of round {final.round}"
    cost = final.cost
    saved = f"{cost.macs / max(1, cost.macs_nonzero):.1f}x fewer multiply-adds in theory"
    if not cost.macs:
        saved = f"multiply-adds not counted{f' ({cost.macs_fault})' if cost.macs_fault else ''}"
    elif cost.macs_fault:
        saved = f"{saved} ({cost.macs_fault})"
    change = metric.write_change(trial.test_score - dense.score)
    reached = f"{what} {metric.write(trial.test_score)} ({change} against {dense.name})"
    if fault := trial.metric_fault:
        loss = final.loss if trial.test is None else trial.test.loss
        reached = f"loss {loss:.6g} (dense {dense.loss:.6g}; {fault})"
    if cost.units is not None:
        return f"{_describe_units(cost)}; {reached}"
    return (
        f"sparsity {final.sparsity:.2%} of {cost.num_units:,} prunable weights, {reached}, "
        f"{cost.compression:.1f}x fewer non-zero parameters, {saved}"
    )


def _describe_units(cost: CostRecord) -> str:
    """Says what a network without its removed units has, beside the dense one."""
    units = cost.units
    assert units is not None
    gone = units.num_units - units.num_kept
    how = "left the network" if units.is_compact else "are zeros in the network"
    macs = f"multiply-adds not counted{f' ({cost.macs_fault})' if cost.macs_fault else ''}"
    if units.macs:
        macs = f"{cost.macs / units.macs:.1f}x fewer multiply-adds"
        macs += "" if units.is_compact else " once they are out of it"
        macs += f" ({units.macs / cost.macs:.1%}: {_short(units.macs)} of {_short(cost.macs)})"
    parameters = f"{cost.num_parameters / max(1, units.num_parameters):.1f}x fewer parameters"
    parameters += f" ({units.num_parameters / max(1, cost.num_parameters):.1%})"
    digits = 1 if cost.num_bytes >= 1e7 else 3
    sizes = [f"{size / 1e6:,.{digits}f}" for size in (units.num_bytes, cost.num_bytes)]
    size = f"{' of '.join(sizes)} MB"
    return f"{gone:,} of {units.num_units:,} units {how}: {macs}, {parameters}, {size}"


def summary_lines(trial: TrialRecord) -> list[str]:
    """Summarizes a trial, and says what makes its metric doubtful."""
    doubt = trial.metric_doubt
    return [summary_line(trial), *([f"doubtful: {doubt}"] if doubt else [])]


def _macs_left(macs: int, left: int) -> str:
    """Shortens what is left of a network's multiply-adds, which are none where none are known."""
    return _short(left) if macs else "not counted"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def summary_table(
    lines: Sequence[Mapping[str, Any]], fields: Sequence[str], width: int = 140
) -> Table:
    """Shows what `summarize` gives, as far as a terminal's width has room for it."""
    # Where rounds were judged by other examples, the test split has its own columns.
    is_tested = any(line["judged_on"] != "test" for line in lines)
    is_attacked = any("robust_accuracy" in line for line in lines)
    specs = _specs_of(lines) or [ACCURACY]
    texts = [f"{line['sparsity']:.2%}" for line in lines]
    heading, goals, known = "sparsity", texts, {"seed", "prune.sparsity"}
    if lines and all("goal" in line for line in lines):
        kinds = {line["goal"]["kind"] for line in lines}
        kind = kinds.pop() if len(kinds) == 1 else "macs"
        kind = kind if kind in COSTS else "macs"
        heading, known = f"{COSTS[kind]} left", {"seed", *GOAL_FIELDS}
        texts = [write_left(line[f"{kind}_left"]) for line in lines]
        # One goal is met to within a unit, not with one number of multiply-adds.
        goals = [str(Goal(**line["goal"])) for line in lines]
    shown = ["" if i and goals[i] == goals[i - 1] else text for i, text in enumerate(texts)]
    columns = [TableColumn(heading, shown)]
    for field in fields:
        if field not in known:
            cells = [write_value(line[field]) for line in lines]
            columns.append(TableColumn(field.removeprefix("prune."), cells, "left"))

    def add(heading: str, name: str, rank: int, spec: MetricSpec = ACCURACY) -> None:
        cells = [spec.write(line[name]) for line in lines]
        columns.append(TableColumn(heading, cells, "right", rank))
        deviations = [spec.write(line[f"{name}_deviation"]) for line in lines]
        columns.append(TableColumn("+-", deviations, "right", rank))

    for spec in specs:
        add(spec.name, spec.name, 0, spec)
        if is_tested:
            add("test", f"test_{spec.name}", 0, spec)
    if is_attacked:
        add("under attack", "robust_accuracy", 1)
    columns += [
        TableColumn("seeds", [str(line["num_seeds"]) for line in lines], "right", 2),
        TableColumn("loss", [f"{line['loss']:.4f}" for line in lines], "right", 3),
        TableColumn("weights left", [f"{line['num_nonzero']:,.0f}" for line in lines], "right", 4),
    ]
    return fit_table(columns, width)[0]


def _specs_of(rows: Sequence[Mapping[str, Any]]) -> list[MetricSpec]:
    """Lists what judged rows, each name once: jobs may describe one metric differently."""
    return list({spec.name: spec for spec in map(spec_of, rows)}.values())


def answers_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """List the largest sparsities within a target, and what they took."""
    rows = []
    # Answers of several workloads may be judged by several metrics.
    specs = [MetricSpec.model_validate(line.get("metric", ACCURACY)) for line in lines]
    heading = specs[0].name if len(set(specs)) == 1 else "score"
    for line, spec in zip(lines, specs, strict=True):
        dense = line[f"dense_{spec.name}"]
        sparsity = "none" if line["sparsity"] is None else f"{line['sparsity']:.2%}"
        note = line["cause"]
        if line["is_highest"]:
            note = "the highest that was asked for"
        elif line["sparsity"] is None and not note:
            note = "the lowest already loses more"
        mark = "*" if line["dense_is_recalibrated"] and dense else ""
        rows.append(
            (
                line["label"],
                sparsity,
                spec.write(line[spec.name]),
                spec.write(dense) + mark,
                str(line["num_trials"]),
                f"{line['seconds']:.0f}",
                note,
            )
        )
    numbers = ("sparsity", heading, "dense", "trials", "worker-seconds")
    table = make_table(rows, ["for"], numbers, [""])
    if any(line["dense_is_recalibrated"] for line in lines):
        table.caption = RE_ESTIMATED
    return table


def ends_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """List the trials that failed or were stopped, and why."""
    table = make_table((), ())
    table.add_column("trial", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why", overflow="fold")
    for line in lines:
        why = line["cause"] or f"weaker than others after round {line['round']}"
        table.add_row(line["trial_id"], line["state"], why)
    return table


def kinds_table(kinds: Sequence[Mapping[str, Any]]) -> Table:
    """List what the trials of a planned sweep hold and write."""
    rows = []
    for kind in kinds:
        plan = kind["plan"]
        sent = plan["sent_bytes_per_round"]
        rows.append(
            (
                kind["name"],
                f"{kind['num_trials']:,}",
                write_megabytes(plan["peak_bytes"]),
                max(plan["phases"], key=lambda phase: phase["num_bytes"])["name"],
                write_megabytes(sent) if sent else "",
                write_megabytes(plan["round_bytes"]),
            )
        )
    numbers = ("trials", "peak MB", "in", "sends MB a round", "stores MB a round")
    return make_table(rows, ["criterion"], numbers)


def sweep_plan_lines(planned: Mapping[str, Any]) -> list[str]:
    """Describe what running a sweep would do and cost, beside the table of its kinds."""
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
        f"memory of a worker: {write_megabytes(planned['worker_bytes'])} MB at the peak; "
        f"{planned['host_bytes'] / 1e6:,.0f} MB of its machine, data and libraries included",
        f"stored: {about}{write_megabytes(planned['stored_bytes'])} MB in {planned['uri']}",
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
