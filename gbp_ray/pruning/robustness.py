"""Robust accuracy: the share of held-out examples that stay right under attack, the same on any W.

An example counts as right if it is right as it is and after every restart of the attack. Each batch
is attacked whole on one rank, under seeds of its own position, so that all trials meet the same
random starts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gbp_ray.config import AttackConfig
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
        A share in [0, 1] of the examples attacked.
    """
    split = judged_split(workload)
    data = getattr(workload, split)
    total = num_attacked(workload, attack)
    batches = cut_batches(total, batch_size)
    right = torch.zeros((), dtype=torch.int64, device=ranks.device)
    num_restarts = attack.restarts if attack.kind == "pgd" else 1
    model.eval()

    def measure(item: int) -> Tensor:
        indices = torch.arange(batches[item].start, batches[item].stop)
        inputs, targets = take_batch(workload, data, indices, device=ranks.device)

        def loss_of(seen: Tensor) -> Tensor:
            return workload.loss(model(seen), targets)

        def find_right(seen: Tensor) -> Tensor:
            with torch.no_grad(), isolated(model, derive_seed("attack", item)):
                outputs = model(seen)
                check_labels(workload, split, indices, outputs, targets)
                return _find_right(workload, outputs, targets)

        with blaming_labels(workload, model, split, indices):
            still = find_right(inputs)
            for restart in range(num_restarts):
                seed = derive_seed("attack", item, restart)
                still &= find_right(
                    perturb(model, loss_of, workload, inputs, attack, seed, "attack")
                )
        return still

    def measure_own() -> None:
        for turn, item in enumerate(ranks.deal(len(batches))):
            if item is not None:
                right.add_(measure(item).sum())
            elif is_sharded(model):
                # All ranks pass through a sharded network; one without a batch for nothing.
                measure(0)
            tell(min((turn + 1) * ranks.world_size, len(batches)), len(batches))

    ranks.together(measure_own, communicates=is_sharded(model))
    return ranks.fill_in(right).item() / total


def num_attacked(workload: Workload, attack: AttackConfig) -> int:
    """Counts the examples that an attack is tried on."""
    return min(attack.examples, num_examples(getattr(workload, judged_split(workload))))


def _find_right(workload: Workload, outputs: Tensor, targets: Tensor) -> Tensor:
    """Finds which examples are answered right, (B,)."""
    if workload.count_correct is count_top1:
        return outputs.argmax(dim=1) == targets
    # A workload's own metric only counts, so it is asked for one example after another.
    counts = [
        int(workload.count_correct(outputs[row : row + 1], targets[row : row + 1])) > 0
        for row in range(len(targets))
    ]
    return torch.tensor(counts, device=targets.device)
