"""Metrics and loss of a network on a split, the same on any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.config.metrics import MetricSpec
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import is_sharded
from gbp_ray.errors import PruneError, WorkloadError
from gbp_ray.results.records import FinalTest
from gbp_ray.training.batchnorm import recalibrate_as_asked
from gbp_ray.training.network import load_weights
from gbp_ray.training.progress import OnProgress, deal_batches, ignore_progress, with_changes
from gbp_ray.workloads.batch import forward
from gbp_ray.workloads.checks import blaming_labels, check_finite, check_labels
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import cut_batches, derive_seed, take_batch
from gbp_ray.workloads.losses import check_share, count_items, mean_loss
from gbp_ray.workloads.metrics import (
    compute_metric,
    is_share_of_right,
    metrics_of,
    specs_of,
    update_metric,
)

__all__ = ["Evaluation", "evaluate", "measure_final_test"]


class Evaluation(NamedTuple):
    """The measurements of a network on a split.

    Attributes:
        score: The value of the workload's first metric, which judges.
        loss: The mean over all items of the split.
        metrics: The values of all metrics by name, the first one's included.
        specs: What they are, with their values by chance, in order.
        num_items: The items that the loss is a mean over.
    """

    score: float
    loss: float
    metrics: dict[str, float]
    specs: tuple[MetricSpec, ...] = ()
    num_items: float = math.nan

    @property
    def several(self) -> dict[str, float]:
        """All metrics where there are more than the first, else nothing."""
        return self.metrics if len(self.metrics) > 1 else {}


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
    precision: str = "float32",
) -> Evaluation:
    """Measures metrics and mean loss on a split, each example once. Communicates.

    The loss is the mean over all items of the split (`count_items`), whatever the batch size.

    Args:
        split: "test", "validation" or "train"; never augmented.
        sample: (n,) positions of the examples to take; None takes all.
        precision: Of the passes, see `forward`.

    Raises:
        WorkloadError: The loss is not finite because of an example, a label is out of range, or a
            metric is impossible, as where more answers are right than were asked for; on every
            rank.
    """
    data = getattr(workload, split)
    chosen = torch.arange(num_examples(data)) if sample is None else sample
    total = len(chosen)
    batches = cut_batches(total, batch_size)
    losses, items = torch.zeros(2, len(batches), dtype=torch.float64, device=ranks.device)
    metrics = metrics_of(workload)
    # The first batch says how many sums a metric has.
    sums: list[Tensor] = []
    specs: list[MetricSpec] = []
    model.eval()

    def measure(item: int, *, is_counted: bool) -> None:
        indices = chosen[batches[item].start : batches[item].stop]
        batch = take_batch(workload, data, indices, device=ranks.device)
        targets = batch.targets
        with isolated(model, derive_seed("evaluate", item)):
            with blaming_labels(workload, model, split, indices):
                outputs = forward(model, workload, batch, precision)
                if is_counted:
                    check_labels(workload, split, indices, outputs, targets)
                    counts = count_items(workload, targets)
                    items[item] = len(indices) if counts is None else counts.sum()
                    loss = mean_loss(workload, outputs, targets).double()
                    # A mean over no items is NaN, and must add nothing.
                    losses[item] = loss if counts is None else loss.where(items[item] > 0, 0)
            if is_counted or not sums:
                found = [update_metric(m, workload, split, outputs, targets) for m in metrics]
                if not sums:
                    specs.extend(metric.describe(outputs) for metric in metrics)
                    zeros = [values.new_zeros(len(batches), len(values)) for values in found]
                    sums.extend(zeros)
                for rows, values in zip(sums, found, strict=True):
                    if is_counted:
                        _keep(rows, item, values)

    def measure_own() -> None:
        for item in deal_batches(ranks, len(batches), "evaluate", on_progress):
            if item is not None:
                measure(item, is_counted=True)
            elif is_sharded(model) or not sums:
                # All ranks pass through a sharded network, and know how many sums there are.
                measure(0, is_counted=False)
        for item in (~torch.isfinite(losses)).nonzero().flatten().tolist():
            check_finite(workload, split, chosen[batches[item].start : batches[item].stop])
        for metric, rows in zip(metrics, sums, strict=True):
            if is_share_of_right(metric, workload):
                for item, (right, asked) in enumerate(rows.long().tolist()):
                    check_share(split, right, asked, f"in batch {item + 1} of {len(batches)}")

    ranks.run_collectively(measure_own, communicates=is_sharded(model))
    losses, items = map(ranks.all_reduce_disjoint, (losses, items))
    sizes = items.new_tensor([len(batch) for batch in batches])
    # Where every example has equally many items, sizes give the same mean in whole numbers.
    weights = sizes if torch.equal(items * sizes[0], sizes * items[0]) else items
    num_items = weights.sum().item()
    if items.sum().item() == 0:
        raise WorkloadError(
            f"workload.{split}: none of its {total} examples has a label that counts; leave such "
            "examples out, or give some with labels"
        )
    values = {
        metric.name: compute_metric(metric, ranks.all_reduce_disjoint(rows).sum(dim=0), split)
        for metric, rows in zip(metrics, sums, strict=True)
    }
    loss = (losses * weights).sum().item() / num_items
    empty = [name for name, value in values.items() if math.isnan(value)]
    if empty and math.isfinite(loss):
        raise WorkloadError(
            f"workload.metrics: {empty[0]} is NaN on workload.{split}, whose {total} examples hold "
            "nothing that it can be computed of; give others, or another metric"
        )
    score = values[metrics[0].name]
    return Evaluation(score, loss, values, tuple(specs), items.sum().item())


def _keep(rows: Tensor, item: int, values: Tensor) -> None:
    if rows.shape[1:] != values.shape:
        raise WorkloadError(
            f"workload.metrics: a metric gives {len(values)} sums for one batch and "
            f"{rows.shape[1]} for another; update must return a vector of one length"
        )
    rows[item] = values


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
    size, precision = job.workload.eval_batch_size, job.workload.eval_precision
    measured = []
    for number in (chosen, 0):
        source = f"round_{number:03d}/weights.safetensors"
        weights = ranks.run_collectively(lambda number=number: read_weights(number))  # type: ignore[misc]
        load_weights(model, weights, source)
        of_round = with_changes(on_progress, round=number)
        found = evaluate(model, workload, ranks, size, of_round, precision=precision)
        if not math.isfinite(found.loss):
            raise PruneError(
                f"round {number}: the test loss is {found.loss:g}; its weights diverged"
            )
        measured.append(found)
    found, dense = measured
    recalibrated: Evaluation | None = None
    if recalibrate_as_asked(job, model, workload, ranks):
        again = evaluate(model, workload, ranks, size, on_progress, precision=precision)
        recalibrated = again if math.isfinite(again.loss) else None
    return FinalTest(
        metric=specs_of(workload)[0],
        round=chosen,
        score=found.score,
        loss=found.loss,
        dense_score=dense.score,
        dense_loss=dense.loss,
        dense_score_recalibrated=recalibrated and recalibrated.score,
        dense_loss_recalibrated=recalibrated and recalibrated.loss,
        metrics=found.several,
        dense_metrics=dense.several,
    )
