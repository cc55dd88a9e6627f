"""Trials of whole units without training: costs that were worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sample_sweep import sweep_job, write_sweep_trial

from gbp_ray.results.records import (
    CostRecord,
    LayerRecord,
    TrialRecord,
    UnitsRecord,
    WidthRecord,
)
from gbp_ray.results.store import Store

DENSE = (8, 4)
"""Channels of a.weight, which reads 2 inputs, and heads of b.weight, of 3 rows each."""


def units_cost(channels: int, heads: int, *, is_compact: bool = True) -> CostRecord:
    """Makes the cost of a (channels x 2) layer at 10 places, and of a (3 heads x channels) one."""

    def count(channels: int, heads: int) -> tuple[int, int]:
        return 2 * channels, 3 * heads * channels

    dense, left = count(*DENSE), count(channels, heads)
    shapes = {"a.weight": (8, 2), "b.weight": (12, 8)}
    places = 10, 1
    macs = [sum(n * p for n, p in zip(sizes, places, strict=True)) for sizes in (dense, left)]
    return CostRecord(
        num_parameters=sum(dense),
        num_nonzero=sum(left),
        macs=macs[0],
        macs_nonzero=macs[1],
        num_bytes=4 * sum(dense) + 40,
        num_bytes_sparse=4 * sum(left) + 40,
        layers=tuple(
            LayerRecord(
                name=name,
                shape=shape,
                num_weights=before,
                num_nonzero=after,
                macs=before * place,
                macs_nonzero=after * place,
            )
            for (name, shape), before, after, place in zip(
                shapes.items(), dense, left, places, strict=True
            )
        ),
        units=UnitsRecord(
            num_parameters=sum(left),
            macs=macs[1],
            num_bytes=4 * sum(left) + 40,
            is_compact=is_compact,
            widths=(
                WidthRecord(name="a.weight", kind="channel", num_units=8, num_kept=channels),
                WidthRecord(name="b.weight", kind="head", num_units=4, num_kept=heads),
            ),
        ),
    )


def write_units_trial(
    storage: str | Path | Store, channels: int, heads: int, score: float, **fields: Any
) -> TrialRecord:
    """Writes a trial of one round that ends with so many units; fields are those of prune."""
    store = storage if isinstance(storage, Store) else Store(storage, "units")
    fields = {"granularity": "channel+head", "rounds": 1, "sparsity": 0.0} | fields
    seed = fields.pop("seed", 0)
    job = sweep_job(store.name, seed=seed, **fields)
    cost = units_cost(channels, heads, is_compact=job.prune.compact)
    return write_sweep_trial(
        store,
        job,
        shapes={"a.weight": (8, 2), "b.weight": (12, 8)},
        dense={"cost": units_cost(*DENSE, is_compact=job.prune.compact), "score": 0.9},
        final={"cost": cost, "score": score},
    )
