"""Says why a loss, a gradient or a score of a pruned network is not finite, in words."""

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
    """Names the tensors of which whole rows or columns are zero; "" where there are none.

    Communicates where they are sharded.

    Args:
        weights: Prunable weights or their masks, by name; rows go along the first axis.
    """
    counts = []
    for weight in weights.values():
        is_zero = local(weight.detach()) == 0
        by_axis = [0, 0]
        for axis in range(min(2, is_zero.ndim)):
            # A rank sees the whole of a row, but not of a column.
            if is_zero.ndim > 1 and is_zero.numel() and not (axis and is_shard(weight)):
                lines = is_zero.movedim(axis, 0).flatten(1)
                by_axis[axis] = int(lines.all(dim=1).sum())
        counts += by_axis
    everywhere = add_over_ranks(counts, weights.values())
    found = [
        f"{number} {kind}{'s' if number > 1 else ''} of '{name}'"
        for name, by_axis in zip(
            weights, zip(everywhere[::2], everywhere[1::2], strict=True), strict=True
        )
        for kind, number in zip(("row", "column"), by_axis, strict=True)
        if number
    ]
    return name_some(found, 3)


def why_not_finite(weights: Mapping[str, Tensor]) -> str:
    """Blames what was pruned whole, if anything was and the weights are finite; else "".

    Communicates where they are sharded.

    Args:
        weights: The prunable ones, or their masks.
    """
    bad = [int(not bool(torch.isfinite(local(w.detach())).all())) for w in weights.values()]
    whole = find_pruned_whole(weights)
    if any(add_over_ranks(bad, weights.values())) or not whole:
        return ""
    return (
        f"{whole} were pruned whole, and dividing by the length or the spread of what is zero "
        f"gives NaN; {_REMEDY}"
    )
