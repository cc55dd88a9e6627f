"""The loss of a batch, the items that it is a mean over, and right answers.

A loss is a mean over items. Most often each example is one; under class weights it counts as its
class weighs, and where positions are labelled, as many times as it has labels that are not ignored.
So sums over batches, microbatches and workers are exact whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.batch import (
    Batch,
    forward,
    kind_of,
    labels_of,
    logits_of,
    size_of,
    take_part,
    tensors_in,
)
from gbp_ray.workloads.contract import Workload, count_top1

__all__ = [
    "batch_loss",
    "check_share",
    "class_labels",
    "count_batch",
    "count_items",
    "count_right",
    "cross_entropy_options",
    "ignored_label",
    "loss_of",
    "mark_right",
    "mean_loss",
    "zero_loss",
]

_IGNORED = -100
"""The label that torch's losses ignore by default."""


def cross_entropy_options(loss: Callable[..., Any]) -> dict[str, Any] | None:
    """Reads the options of torch's cross entropy or NLL loss; returns None for any other loss."""
    if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss):
        names = ("weight", "ignore_index", "reduction")
        return {name: getattr(loss, name) for name in names}
    function, keywords = loss, {}
    if isinstance(loss, partial) and not loss.args:
        function, keywords = loss.func, loss.keywords
    return keywords if function in (functional.cross_entropy, functional.nll_loss) else None


def ignored_label(workload: Workload) -> int:
    """Returns the label that the workload's loss leaves out."""
    options = cross_entropy_options(workload.loss) or {}
    return int(options.get("ignore_index", _IGNORED))


def mean_loss(workload: Workload, outputs: Any, targets: Any) -> Tensor:
    """Computes the loss of a batch, a mean over its items.

    Without a loss of the workload's own, outputs for a mapping must carry theirs, as those of
    Hugging Face's models do; of others the logits are taken.

    Raises:
        WorkloadError: Outputs for a mapping carry no loss, or other targets are no tensor.
    """
    if workload.loss is functional.cross_entropy and isinstance(targets, Mapping):
        carried = outputs.get("loss") if isinstance(outputs, Mapping) else None
        carried = getattr(outputs, "loss", None) if carried is None else carried
        if not isinstance(carried, Tensor):
            raise WorkloadError(
                f"workload.loss: outputs ({kind_of(outputs)}) carry no loss for a batch that is "
                f"{kind_of(targets)}; give Workload a loss(outputs, batch), or batches with labels"
            )
        return carried
    if workload.loss is functional.cross_entropy:
        if not isinstance(targets, Tensor):
            raise WorkloadError(
                f"workload.loss: cross entropy takes a tensor of labels, not {kind_of(targets)}; "
                "give Workload a loss(outputs, targets)"
            )
        return functional.cross_entropy(logits_of(outputs), targets)
    return workload.loss(outputs, targets)


def batch_loss(model: nn.Module, workload: Workload, batch: Batch) -> Tensor:
    """Passes a batch through a network, and computes its loss, a mean over its items."""
    return mean_loss(workload, forward(model, workload, batch), batch.targets)


def loss_of(workload: Workload, outputs: Any, targets: Any) -> Tensor:
    """Computes the loss of a batch; 0 for one without any item, of which a mean would be NaN."""
    counts = count_items(workload, targets)
    if counts is not None and not counts.any():
        return zero_loss(outputs)
    return mean_loss(workload, outputs, targets)


def zero_loss(outputs: Any) -> Tensor:
    """Makes a loss of 0 whose gradients are 0, for any outputs."""
    tensors = [t for t in tensors_in(outputs) if t.is_floating_point()]
    zeros = [t.masked_fill(torch.ones_like(t, dtype=torch.bool), 0).sum() for t in tensors]
    return torch.stack(zeros).sum()


def count_batch(workload: Workload, targets: Any) -> float:
    """Counts the items that the loss of a batch is a mean over."""
    counts = count_items(workload, targets)
    return float(size_of(targets)) if counts is None else float(counts.sum())


def count_items(workload: Workload, targets: Any) -> Tensor | None:
    """Counts the items of each example that the workload's loss is a mean over.

    Returns:
        (B,) float64, on the targets' device; None where each example is one item.

    Raises:
        WorkloadError: The workload's own count is negative or no number.
    """
    if workload.count is len:
        return None
    if workload.count is not None:
        size = size_of(targets)
        # One by one: a sum over the batch may round fractions otherwise.
        parts = [take_part(targets, slice(row, row + 1), size) for row in range(size)]
        counts = [_count_own(workload, part) for part in parts]
        device = next(tensors_in(targets)).device
        return torch.tensor(counts, dtype=torch.float64, device=device)
    is_carried = isinstance(targets, Mapping) and workload.loss is functional.cross_entropy
    if is_carried:
        # The loss that outputs carry is taken for a mean over labels that are not ignored.
        targets = targets.get("labels")
    options = cross_entropy_options(workload.loss)
    if options is None or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    weight, ignored = options.get("weight"), options.get("ignore_index", _IGNORED)
    if targets.ndim == 1 and weight is None and ignored == _IGNORED and not is_carried:
        return None
    is_labelled = targets != ignored
    items = is_labelled.double()
    if weight is not None:
        items *= weight.double().to(targets.device)[targets.long().where(is_labelled, 0)]
    return items.reshape(len(targets), -1).sum(dim=1)


def _count_own(workload: Workload, targets: Any) -> float:
    assert workload.count is not None
    counted = workload.count(targets)
    try:
        count = float(counted)
    except (TypeError, ValueError, RuntimeError):
        count = math.nan
    if not 0 <= count < math.inf:
        raise WorkloadError(
            "workload.count: must return how many items the loss of these targets is a mean over, "
            f"0 or more, not {kind_of(counted) if math.isnan(count) else count}"
        )
    return count


def count_right(
    workload: Workload, outputs: Any, targets: Any
) -> tuple[Tensor | int, Tensor | int]:
    """Counts the right answers of a batch, and the examples, or labels, that they are a share of.

    `check_share` checks the share, since on a GPU each look at a count waits for it.

    Raises:
        WorkloadError: The built-in count does not suit the shapes, or an own count is no integer.
    """
    if workload.count_correct is count_top1:
        is_right, is_asked = mark_right(workload, outputs, targets)
        return is_right.sum(), is_asked.sum()
    correct: Any = workload.count_correct(outputs, targets)
    is_count = isinstance(correct, int) or (
        isinstance(correct, Tensor)
        and correct.ndim == 0
        and not (correct.is_floating_point() or correct.is_complex())
    )
    if not is_count:
        raise WorkloadError(
            "workload.count_correct: must return how many answers of the batch are right, an "
            f"integer scalar tensor, not {kind_of(correct)}"
        )
    return correct, size_of(targets)


def mark_right(workload: Workload, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Marks the targets that the built-in count finds right, and those that are not ignored.

    Raises:
        WorkloadError: Targets are no labels of these outputs.
    """
    logits, labels = class_labels(workload, outputs, targets)
    is_asked = labels != ignored_label(workload)
    return (logits.argmax(dim=1) == labels) & is_asked, is_asked


def class_labels(workload: Workload, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Returns logits, (B, classes, ...), and their labels, (B, ...), which a mapping has by name.

    Logits that are named may have their classes on the last axis, as Hugging Face's models do.

    Raises:
        WorkloadError: Targets are no labels of these outputs.
    """
    logits: Any = logits_of(outputs)
    labels: Any = labels_of(targets)
    if (
        logits is not outputs
        and isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and labels.shape == logits.shape[:-1]
    ):
        logits = logits.movedim(-1, 1)
    is_fit = (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.ndim >= 2
        and logits.shape[1] > 1
        and labels.shape == logits.shape[:1] + logits.shape[2:]
        and not labels.is_complex()
        and not (labels.is_floating_point() and bool((labels != labels.round()).any()))
    )
    if not is_fit:
        raise WorkloadError(
            f"workload.count_correct: the built-in count compares outputs.argmax(1) with labels, "
            f"but outputs are {kind_of(logits)} and targets {kind_of(labels)}, which are no class "
            "numbers of them; give a count_correct that says how many of the examples are right, "
            "such as lambda outputs, targets: ((outputs > 0) == targets).all(1).sum(), or name "
            "workload.metrics that suit them, such as ['rmse'], ['f1'] or ['perplexity']"
        )
    return logits, labels


def check_share(split: str, right: int, asked: int, shapes: str) -> None:
    """Raises WorkloadError for more right answers than examples; `shapes` says where, in words."""
    if not 0 <= right <= asked:
        raise WorkloadError(
            f"workload.count_correct: counts {right} right answers among {asked} examples of "
            f"workload.{split} ({shapes}); it must return how many of the examples are right, 0 to "
            f"{asked}; where each position has a label, leave it out, and labels are counted"
        )
