"""Causes of a loss, a gradient or a score that is not finite: rows and columns pruned whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gbp_ray.distributed.sharding import add_over_ranks, is_shard, local
from gbp_ray.errors import name_some

__all__ = [
    "find_pruned_whole",
    "why_not_finite",
]

_REMEDY = (
    "guard what divides, as torch.nn.functional.normalize does, name the layer in prune.exclude, "
    "or lower prune.sparsity or prune.layer_max_sparsity"
)


def find_pruned_whole(weights: Mapping[str, Tensor]) -> str:
    """Lists whole rows and columns of zeros, or returns "". Communicates if weights are sharded.

    Args:
        weights: Prunable weights or their masks, by name; rows go along the first axis.
    """
    counts = []
    for weight in weights.values():
        is_zero = local(weight.detach()) == 0
        for axis in range(2):
            # A rank sees the whole of a row, but not of a column.
            is_seen = is_zero.ndim > 1 and is_zero.numel() and not (axis and is_shard(weight))
            lines = is_zero.movedim(axis, 0).flatten(1) if is_seen else is_zero.new_zeros(1, 1)
            counts.append(int(lines.all(dim=1).sum()))
    places = [(kind, name) for name in weights for kind in ("row", "column")]
    found = [
        f"{number} {kind}{'s' if number > 1 else ''} of '{name}'"
        for number, (kind, name) in zip(
            add_over_ranks(counts, weights.values()), places, strict=True
        )
        if number
    ]
    return name_some(found, 3)


def why_not_finite(weights: Mapping[str, Tensor]) -> str:
    """Blames rows and columns pruned whole, if all weights are finite; else returns "".

    Communicates if weights, or their masks, are sharded.
    """
    bad = [int(not bool(torch.isfinite(local(w.detach())).all())) for w in weights.values()]
    whole = find_pruned_whole(weights)
    if any(add_over_ranks(bad, weights.values())) or not whole:
        return ""
    return (
        f"{whole} were pruned whole, and dividing by the length or the spread of what is zero "
        f"gives NaN; {_REMEDY}"
    )
