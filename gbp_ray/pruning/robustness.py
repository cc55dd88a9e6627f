"""Robust accuracy: the share of held-out examples that stay right under attack, the same on any W.

An example counts as right if it is right as it is and after every restart of the attack. Each batch
is attacked whole on one rank, under seeds of its own position, so that all trials meet the same
random starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.config import AttackConfig
from gbp_ray.errors import WorkloadError
from gbp_ray.means import check_share, count_right, loss_of, mark_right
from gbp_ray.pruning.attack import perturb
from gbp_ray.pruning.ranks import Ranks, isolated
from gbp_ray.pruning.sharding import is_sharded
from gbp_ray.workload import (
    Workload,
    count_top1,
    cut_batches,
    derive_seed,
    judged_split,
    num_examples,
    take_batch,
)
from gbp_ray.workload_checks import blaming_labels, check_labels

__all__ = ["num_attacked", "robust_accuracy"]


def robust_accuracy(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    attack: AttackConfig,
    batch_size: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Attacks the first examples that rounds are judged by; how many stay right. Communicates.

    Returns:
        A share in [0, 1] of the examples attacked, or under the built-in count of their labels.
    """
    split = judged_split(workload)
    data = getattr(workload, split)
    total = num_attacked(workload, attack)
    batches = cut_batches(total, batch_size)
    right, asked = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    num_restarts = attack.restarts if attack.kind == "pgd" else 1
    model.eval()

    def measure(item: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(batches[item].start, batches[item].stop)
        inputs, targets = take_batch(workload, data, indices, device=ranks.device)

        def loss_under(seen: Tensor) -> Tensor:
            return loss_of(workload, model(seen), targets)

        def find_right(seen: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), isolated(model, derive_seed("attack", item)):
                outputs = model(seen)
                check_labels(workload, split, indices, outputs, targets)
                return _find_right(workload, split, outputs, targets)

        with blaming_labels(workload, model, split, indices):
            still, is_asked = find_right(inputs)
            for restart in range(num_restarts):
                seed = derive_seed("attack", item, restart)
                attacked = perturb(model, loss_under, workload, inputs, attack, seed, "attack")
                still &= find_right(attacked)[0]
        return still.sum(), is_asked.sum()

    def measure_own() -> None:
        for turn, item in enumerate(ranks.deal(len(batches))):
            if item is not None:
                counts = measure(item)
                right.add_(counts[0])
                asked.add_(counts[1])
            elif is_sharded(model):
                # All ranks pass through a sharded network; one without a batch for nothing.
                measure(0)
            tell(min((turn + 1) * ranks.world_size, len(batches)), len(batches))

    ranks.together(measure_own, communicates=is_sharded(model))
    right, asked = ranks.fill_in(right), ranks.fill_in(asked)
    if asked.item() == 0:
        raise WorkloadError(
            f"attack.examples = {attack.examples}: none of the first {total} examples of "
            f"workload.{split} has a label; raise it"
        )
    return right.item() / asked.item()


def num_attacked(workload: Workload, attack: AttackConfig) -> int:
    """Counts the examples that an attack is tried on."""
    return min(attack.examples, num_examples(getattr(workload, judged_split(workload))))


def _find_right(
    workload: Workload, split: str, outputs: Any, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Finds which examples, or labelled positions, are answered right, and which are asked for."""
    if workload.count_correct is count_top1:
        return mark_right(workload, split, outputs, targets)
    # A workload's own metric only counts, so it is asked for one example after another.
    counts = []
    for row in range(len(targets)):
        right, _ = count_right(workload, split, outputs[row : row + 1], targets[row : row + 1])
        check_share(split, int(right), 1, "asked for a single one")
        counts.append(int(right))
    marks = torch.tensor(counts, dtype=torch.bool, device=targets.device)
    return marks, torch.ones_like(marks)
