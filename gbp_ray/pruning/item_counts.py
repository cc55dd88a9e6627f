"""Over how many items the losses of training examples are means, known to all ranks alike.

A step's gradient is that of the mean over all items of its batch, and so are scores. A rank that
computes one part must know how much the others weigh, so the targets of a batch are counted before
any part is computed: each rank counts its share of those that are met for the first time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gbp_ray.means import count_items, cross_entropy_options
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.workload import Workload, num_examples, take_batch

__all__ = ["counts_of", "emphases_of"]


def counts_of(workload: Workload, indices: Tensor, ranks: Ranks) -> Tensor | None:
    """Counts the items of training examples. Communicates, the same on all ranks.

    Args:
        indices: (n,) positions in the training split.

    Returns:
        (n,) float64 on the CPU; None where each example counts alike, whatever it counts.

    Raises:
        WorkloadError: As `means.count_items`; on every rank.
    """
    # By the number of ranks: all of a group must have met the same examples.
    if (known := workload.known_counts.get(ranks.world_size)) is None:
        size = num_examples(workload.train) if ranks.together(lambda: _may_differ(workload)) else 0
        known = torch.full((size,), torch.nan, dtype=torch.float64)
        workload.known_counts[ranks.world_size] = known
    if not len(known):
        return None
    new = indices[known[indices].isnan()]
    if len(new):
        found = torch.zeros(len(new), dtype=torch.float64)
        own = slice(ranks.rank, None, ranks.world_size)
        found[own] = ranks.together(lambda: _count(workload, new[own]))
        known[new] = ranks.fill_in(found.to(ranks.device)).cpu()
    counts = known[indices]
    return None if counts[0] > 0 and bool((counts == counts[0]).all()) else counts


def emphases_of(
    workload: Workload, batch: Tensor, parts: list[Tensor] | tuple[Tensor, ...], ranks: Ranks
) -> list[float]:
    """Computes how much more each part weighs in a batch's loss than its examples do.

    Communicates as `counts_of`.

    Args:
        batch: (B,) the examples of a step.
        parts: The same, cut.

    Returns:
        For each part its share of the items over its share of the examples; 1 where all count
        alike, 0 for a part without items.
    """
    counts = counts_of(workload, batch, ranks)
    total = 0.0 if counts is None else counts.sum().item()
    if counts is None or total == 0:
        return [float(counts is None)] * len(parts)
    own = counts.split([len(part) for part in parts])
    return [
        items.sum().item() / total * (len(batch) / len(part))
        for items, part in zip(own, parts, strict=True)
    ]


def _may_differ(workload: Workload) -> bool:
    if workload.count is not None:
        return workload.count is not len
    options = cross_entropy_options(workload.loss)
    if options is None:
        return False
    if options.get("weight") is not None or options.get("ignore_index", -100) != -100:
        return True
    # Labels of positions, of which some may be ignored; an example's only one must not be.
    return _targets(workload, torch.zeros(1, dtype=torch.long)).ndim > 1


def _count(workload: Workload, indices: Tensor) -> Tensor:
    counts = [torch.zeros(0, dtype=torch.float64)]
    # One by one, as a data set's items may be large.
    size = len(indices) if isinstance(workload.train, tuple) else 1
    for part in indices.split(max(1, size)) if len(indices) else ():
        found = count_items(workload, _targets(workload, part))
        counts.append(torch.ones(len(part), dtype=torch.float64) if found is None else found.cpu())
    return torch.cat(counts)


def _targets(workload: Workload, indices: Tensor) -> Tensor:
    return take_batch(replace(workload, prepare=None), workload.train, indices)[1]
