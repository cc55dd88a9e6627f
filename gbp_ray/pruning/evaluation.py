"""Accuracy and loss of a network on a split, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gbp_ray.pruning.ranks import Ranks, isolated
from gbp_ray.pruning.sharding import is_sharded
from gbp_ray.workload import Workload, cut_batches, derive_seed, num_examples, take_batch
from gbp_ray.workload_checks import blaming_labels, check_finite, check_labels

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    batch_size: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
    *,
    split: str = "test",
    sample: Tensor | None = None,
) -> tuple[float, float]:
    """Measures accuracy and mean loss on a split, each example once. Communicates.

    Args:
        split: "test", "validation" or "train"; never augmented.
        sample: (n,) positions of the examples to take; None takes all.

    Returns:
        (accuracy in [0, 1], mean loss).

    Raises:
        WorkloadError: An input or a target is NaN or infinite and the loss with it, or a label is
            out of range; on every rank, naming the example.
    """
    data = getattr(workload, split)
    chosen = torch.arange(num_examples(data)) if sample is None else sample
    total = len(chosen)
    batches = cut_batches(total, batch_size)
    losses = torch.zeros(len(batches), dtype=torch.float64, device=ranks.device)
    correct = torch.zeros((), dtype=torch.int64, device=ranks.device)
    model.eval()

    def measure(item: int, *, is_counted: bool) -> None:
        indices = chosen[batches[item].start : batches[item].stop]
        inputs, targets = take_batch(workload, data, indices, device=ranks.device)
        with isolated(model, derive_seed("evaluate", item)):
            with blaming_labels(workload, model, split, indices):
                outputs = model(inputs)
                if not is_counted:
                    return
                check_labels(workload, split, indices, outputs, targets)
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
            check_finite(workload, split, chosen[batches[item].start : batches[item].stop])

    # Nothing is exchanged before the end, so a rank that fails must not leave the others there.
    ranks.together(measure_own, communicates=is_sharded(model))
    losses, correct = ranks.fill_in(losses), ranks.fill_in(correct)
    return correct.item() / total, losses.sum().item() / total
