"""Accuracy and loss of a network on the test split, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gbp_ray.pruning.ranks import Ranks, isolated
from gbp_ray.pruning.sharding import is_sharded
from gbp_ray.workload import (
    Workload,
    blaming_labels,
    check_finite,
    check_labels,
    cut_batches,
    derive_seed,
    num_examples,
    take_batch,
)

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    batch_size: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, float]:
    """Measures accuracy and mean loss on the test split, each example once. Communicates.

    Returns:
        (accuracy in [0, 1], mean loss).

    Raises:
        WorkloadError: An input or a target is NaN or infinite and the loss with it, or a label is
            out of range; on every rank, naming the example.
    """
    total = num_examples(workload.test)
    batches = cut_batches(total, batch_size)
    losses = torch.zeros(len(batches), dtype=torch.float64, device=ranks.device)
    correct = torch.zeros((), dtype=torch.int64, device=ranks.device)
    model.eval()

    def measure(item: int, *, is_counted: bool) -> None:
        indices = torch.arange(batches[item].start, batches[item].stop)
        inputs, targets = take_batch(workload, workload.test, indices, device=ranks.device)
        with blaming_labels(workload, model, "test", indices):
            with isolated(model, derive_seed("evaluate", item)):
                outputs = model(inputs)
            if not is_counted:
                return
            check_labels(workload, "test", indices, outputs, targets)
            losses[item] = workload.loss(outputs, targets).double() * len(indices)
        correct.add_(workload.count_correct(outputs, targets))

    def measure_own() -> None:
        for turn, item in enumerate(ranks.deal(len(batches))):
            if item is not None:
                measure(item, is_counted=True)
            elif is_sharded(model):
                # All ranks pass through a sharded network; one without a batch for nothing.
                measure(0, is_counted=False)
            tell(min((turn + 1) * ranks.world_size, len(batches)), len(batches))
        for item in (~torch.isfinite(losses)).nonzero().flatten().tolist():
            check_finite(workload, "test", torch.arange(batches[item].start, batches[item].stop))

    # Nothing is exchanged before the end, so a rank that fails must not leave the others there.
    ranks.together(measure_own, communicates=is_sharded(model))
    losses, correct = ranks.fill_in(losses), ranks.fill_in(correct)
    return correct.item() / total, losses.sum().item() / total
