"""Two trials side by side: what was asked for, what was measured, which weights were kept.

Masks are compared as packed bits, without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gbp_ray.results.index import flatten
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.scores import name_score
from gbp_ray.results.store import Store, locate_trial
from gbp_ray.results.tensors import compare_masks, read_masks, sum_shared

__all__ = [
    "compare_trials",
]

_METRICS = (
    *("round", "sparsity", "score", "loss", "score_pruned", "loss_pruned"),
    *("robust_accuracy", "train_loss"),
)

_COSTS = ("num_nonzero", "compression", "macs_nonzero", "num_bytes_sparse")


def compare_trials(one: str | Path, other: str | Path) -> dict[str, Any]:
    """Compare the last whole rounds of two trials.

    Args:
        one: A trial's address, or a job's where that holds one trial.
        other: Likewise.

    Returns:
        `trials` (their addresses), `config` (dotted field to the two values, where they differ),
        `metrics` (name to the two values), `masks` (for each parameter its weights, how many each
        keeps, and `overlap`: intersection over union of the kept ones) and `overlap` over all. A
        parameter that one of the two does not have, or has in another shape, has overlap None.
        Where whole units were removed also `widths`: for each group its units, how many each
        keeps, None where one has no such group.

    Raises:
        StoreError: There is no such trial, or a record or mask is damaged.
    """
    sides = [_open(uri) for uri in (one, other)]
    rounds = [record for _, _, record in sides]
    masks = [read_masks(*side) for side in sides]
    shared = compare_masks(*masks)
    layers = []
    for name in sorted({name for side in masks for name in side}):
        pair = [side.get(name) for side in masks]
        layer: dict[str, Any] = {
            "name": name,
            "num_weights": [mask and mask.num_weights for mask in pair],
            "num_kept": [mask and mask.num_kept for mask in pair],
            "overlap": None,
        }
        if found := shared.get(name):
            layer |= {
                "kept_by_both": found.both,
                "kept_by_either": found.either,
                "overlap": found.overlap,
            }
        layers.append(layer)
    widths = _compare_widths(rounds)
    return {
        "trials": [store.trial_uri(trial) for store, trial, _ in sides],
        "config": _compare_config([_job_of(store, trial) for store, trial, _ in sides]),
        "metrics": _compare_metrics(rounds)
        | {name: [getattr(record.cost, name) for record in rounds] for name in _COSTS},
        "masks": layers,
        "overlap": sum_shared(shared.values()).overlap if shared else None,
        **({"widths": widths} if widths else {}),
    }


def _open(uri: str | Path) -> tuple[Store, str, RoundRecord]:
    store, trial = locate_trial(uri)
    return store, trial, store.read_rounds(trial)[-1]


def _job_of(store: Store, trial: str) -> dict[str, Any] | None:
    record = store.read_trial(trial)
    if record is None:
        # What was asked for is part of the trial's record, which comes last.
        return None
    return flatten(record.job.model_dump(mode="json", exclude={"storage"}))


def _compare_metrics(rounds: list[RoundRecord]) -> dict[str, list[Any]]:
    """Names what two rounds measured; None is what only the other one did."""
    found = []
    for record in rounds:
        own = {name_score(name, record.metric.name): getattr(record, name) for name in _METRICS}
        found.append(own | record.metrics)
    return {name: [own.get(name) for own in found] for name in found[0] | found[1]}


def _compare_config(jobs: list[dict[str, Any] | None]) -> dict[str, list[Any]] | None:
    one, other = jobs
    if one is None or other is None:
        return None
    names = sorted({*one, *other})
    return {
        name: [one.get(name), other.get(name)] for name in names if one.get(name) != other.get(name)
    }


def _compare_widths(rounds: list[RoundRecord]) -> list[dict[str, Any]]:
    """Lists the groups of whole units with what two rounds keep of each."""
    sides = [{w.name: w for w in r.cost.units.widths} if r.cost.units else {} for r in rounds]
    groups = []
    for name in dict.fromkeys(name for side in sides for name in side):
        found = [side.get(name) for side in sides]
        groups.append(
            {
                "name": name,
                "num_units": [width and width.num_units for width in found],
                "num_kept": [width and width.num_kept for width in found],
            }
        )
    return groups
