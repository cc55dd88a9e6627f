"""Results as people read them: tables of a trial by round and by layer, from records alone."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from gbp_ray.store import RoundRecord, TrialRecord

__all__ = ["layer_table", "round_table", "summary_line"]


def round_table(trial: TrialRecord) -> Table:
    """Lists the rounds of a trial, dense network first."""
    table = Table(box=SIMPLE_HEAD, title=trial.trial_id, title_justify="left", pad_edge=False)
    table.add_column("round")
    for heading in ("sparsity", "accuracy", "before fine-tuning", "loss", "weights left", "MACs"):
        table.add_column(heading, justify="right")
    for record in trial.rounds:
        cost = record.cost
        table.add_row(
            str(record.round) if record.round else "dense",
            f"{record.sparsity:.2%}",
            f"{record.accuracy:.2%}",
            "" if record.accuracy_pruned is None else f"{record.accuracy_pruned:.2%}",
            f"{record.loss:.4f}",
            f"{cost.num_nonzero:,}",
            _short(cost.macs_nonzero),
        )
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
        name = escape(layer.name)
        if layer.name in record.held_back:
            name += " (held back)"
        table.add_row(
            name,
            "x".join(str(size) for size in layer.shape),
            f"{layer.num_weights:,}",
            f"{layer.num_nonzero:,}",
            f"{layer.sparsity:.2%}",
            _short(layer.macs_nonzero),
        )
    return table


def summary_line(trial: TrialRecord) -> str:
    """Says in one line what was reached."""
    dense, final = trial.dense, trial.final
    points = (final.accuracy - dense.accuracy) * 100
    return (
        f"sparsity {final.sparsity:.2%} of {final.cost.num_units:,} prunable weights, accuracy "
        f"{final.accuracy:.2%} ({points:+.2f} points against dense), compression "
        f"{final.cost.compression:.1f}x, {final.cost.macs / max(1, final.cost.macs_nonzero):.1f}x "
        "fewer multiply-adds in theory"
    )


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"
