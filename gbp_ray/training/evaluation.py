"""Accuracy and loss of a network on a split, the same on any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import is_sharded
from gbp_ray.errors import PruneError, WorkloadError
from gbp_ray.results.records import FinalTest
from gbp_ray.training.batchnorm import recalibrate_as_asked
from gbp_ray.training.network import load_weights
from gbp_ray.training.progress import OnProgress, deal_batches, ignore_progress, with_changes
from gbp_ray.workloads.checks import blaming_labels, check_finite, check_labels
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import cut_batches, derive_seed, take_batch
from gbp_ray.workloads.metrics import check_share, count_items, count_right

__all__ = ["evaluate", "measure_final_test"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    batch_size: int,
    on_progress: OnProgress = ignore_progress,
    *,
    split: str = "test",
    sample: Tensor | None = None,
) -> tuple[float, float]:
    """Measures accuracy and mean loss on a split, each example once. Communicates.

    The loss is the mean over all items of the split (`count_items`), whatever the batch size.

    Args:
        split: "test", "validation" or "train"; never augmented.
        sample: (n,) positions of the examples to take; None takes all.

    Raises:
        WorkloadError: The loss is not finite because of an example, a label is out of range, or
            more answers are right than were asked for; on every rank.
    """
    data = getattr(workload, split)
    chosen = torch.arange(num_examples(data)) if sample is None else sample
    total = len(chosen)
    batches = cut_batches(total, batch_size)
    losses, items = torch.zeros(2, len(batches), dtype=torch.float64, device=ranks.device)
    right, asked = torch.zeros(2, len(batches), dtype=torch.int64, device=ranks.device)
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
                counts = count_items(workload, targets)
                items[item] = len(indices) if counts is None else counts.sum()
                loss = workload.loss(outputs, targets).double()
                # A mean over no items is NaN, and must add nothing.
                losses[item] = loss if counts is None else loss.where(items[item] > 0, 0)
            right[item], asked[item] = count_right(workload, split, outputs, targets)

    def measure_own() -> None:
        for item in deal_batches(ranks, len(batches), "evaluate", on_progress):
            if item is not None:
                measure(item, is_counted=True)
            elif is_sharded(model):
                # All ranks pass through a sharded network.
                measure(0, is_counted=False)
        for item in (~torch.isfinite(losses)).nonzero().flatten().tolist():
            check_finite(workload, split, chosen[batches[item].start : batches[item].stop])
        for item, counted in enumerate(zip(right.tolist(), asked.tolist(), strict=True)):
            check_share(split, *counted, f"in batch {item + 1} of {len(batches)}")

    ranks.run_collectively(measure_own, communicates=is_sharded(model))
    losses, items, right, asked = map(ranks.all_reduce_disjoint, (losses, items, right, asked))
    sizes = items.new_tensor([len(batch) for batch in batches])
    # Where every example has equally many items, sizes give the same mean in whole numbers.
    weights = sizes if torch.equal(items * sizes[0], sizes * items[0]) else items
    num_asked, num_items = asked.sum().item(), weights.sum().item()
    if items.sum().item() == 0 or num_asked == 0:
        raise WorkloadError(
            f"workload.{split}: none of its {total} examples has a label that counts; leave such "
            "examples out, or give some with labels"
        )
    return right.sum().item() / num_asked, (losses * weights).sum().item() / num_items


def measure_final_test(
    job: JobConfig,
    workload: Workload,
    model: nn.Module,
    ranks: Ranks,
    chosen: int,
    read_weights: Callable[[int], bytes],
    on_progress: OnProgress = ignore_progress,
) -> FinalTest:
    """Measures the chosen round and the dense network on the test split. Communicates.

    Args:
        model: Loads the weights of both rounds.
        chosen: Number of the round, from `records.choose_round`.
        read_weights: Number of a round -> its weights.safetensors.

    Raises:
        PruneError: A loss is not finite.
        StoreError: Weights cannot be read.
    """
    batch_size = job.workload.eval_batch_size
    measured = []
    for number in (chosen, 0):
        source = f"round_{number:03d}/weights.safetensors"
        weights = ranks.run_collectively(lambda number=number: read_weights(number))  # type: ignore[misc]
        load_weights(model, weights, source)
        of_round = with_changes(on_progress, round=number)
        accuracy, loss = evaluate(model, workload, ranks, batch_size, of_round)
        if not math.isfinite(loss):
            raise PruneError(f"round {number}: the test loss is {loss:g}; its weights diverged")
        measured.append((accuracy, loss))
    (accuracy, loss), (dense_accuracy, dense_loss) = measured
    recalibrated: tuple[float | None, float | None] = None, None
    if recalibrate_as_asked(job, model, workload, ranks):
        again = evaluate(model, workload, ranks, batch_size, on_progress)
        recalibrated = again if math.isfinite(again[1]) else recalibrated
    return FinalTest(
        round=chosen,
        accuracy=accuracy,
        loss=loss,
        dense_accuracy=dense_accuracy,
        dense_loss=dense_loss,
        dense_accuracy_recalibrated=recalibrated[0],
        dense_loss_recalibrated=recalibrated[1],
    )
