"""The items that a loss is a mean over, and right answers, so that sums over batches are exact.

A loss is a mean over items. Most often each example is one; under class weights it counts as its
class weighs, and where positions are labelled, as many times as it has labels that are not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import WorkloadError
from gbp_ray.workloads.contract import Workload, count_top1
from gbp_ray.workloads.data import kind_of

__all__ = [
    "check_share",
    "count_items",
    "count_right",
    "cross_entropy_options",
    "loss_of",
    "mark_right",
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


def count_items(workload: Workload, targets: Tensor) -> Tensor | None:
    """Counts the items of each example that the workload's loss is a mean over.

    Returns:
        (B,) float64, on the targets' device; None where each example is one item.

    Raises:
        WorkloadError: The workload's own count is negative or no number.
    """
    if workload.count is len:
        return None
    if workload.count is not None:
        # One by one: a sum over the batch may round fractions otherwise.
        counts = [_count_own(workload, targets[row : row + 1]) for row in range(len(targets))]
        return torch.tensor(counts, dtype=torch.float64, device=targets.device)
    options = cross_entropy_options(workload.loss)
    if options is None or targets.is_floating_point():
        return None
    weight, ignored = options.get("weight"), options.get("ignore_index", _IGNORED)
    if targets.ndim == 1 and weight is None and ignored == _IGNORED:
        return None
    is_labelled = targets != ignored
    items = is_labelled.double()
    if weight is not None:
        items *= weight.double().to(targets.device)[targets.long().where(is_labelled, 0)]
    return items.reshape(len(targets), -1).sum(dim=1)


def _count_own(workload: Workload, targets: Tensor) -> float:
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


def loss_of(workload: Workload, outputs: Any, targets: Tensor) -> Tensor:
    """Computes the loss of a batch; 0 for one without any item, of which a mean would be NaN."""
    counts = count_items(workload, targets)
    if counts is not None and not counts.any():
        return zero_loss(outputs)
    return workload.loss(outputs, targets)


def zero_loss(outputs: Any) -> Tensor:
    """Makes a loss of 0 whose gradients are 0, for any outputs."""
    tensors = [t for t in _tensors_in(outputs) if t.is_floating_point()]
    zeros = [t.masked_fill(torch.ones_like(t, dtype=torch.bool), 0).sum() for t in tensors]
    return torch.stack(zeros).sum()


def _tensors_in(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
        return
    if not isinstance(nest, tuple | list):
        nest = (nest if isinstance(nest, Mapping) else getattr(nest, "__dict__", {})).values()
    for value in nest:
        yield from _tensors_in(value)


def count_right(
    workload: Workload, split: str, outputs: Any, targets: Tensor
) -> tuple[Tensor | int, Tensor | int]:
    """Counts the right answers of a batch, and the examples, or labels, that they are a share of.

    `check_share` checks the share, since on a GPU each look at a count waits for it.

    Raises:
        WorkloadError: The built-in count does not suit the shapes, or an own count is no integer.
    """
    if workload.count_correct is count_top1:
        is_right, is_asked = mark_right(workload, split, outputs, targets)
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
    return correct, len(targets)


def mark_right(
    workload: Workload, split: str, outputs: Any, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Marks the targets that the built-in count finds right, and those that are not ignored.

    Raises:
        WorkloadError: Targets are no labels of these outputs.
    """
    is_fit = (
        isinstance(outputs, Tensor)
        and outputs.ndim >= 2
        and outputs.shape[1] > 1
        and targets.shape == outputs.shape[:1] + outputs.shape[2:]
        and not targets.is_complex()
        and not (targets.is_floating_point() and bool((targets != targets.round()).any()))
    )
    if not is_fit:
        raise WorkloadError(
            f"workload.count_correct: the built-in count compares outputs.argmax(1) with labels, "
            f"but in workload.{split} outputs are {kind_of(outputs)} and targets "
            f"{kind_of(targets)}, which are no class numbers of them; give a count_correct that "
            "says how many of the examples are right, such as lambda outputs, targets: ((outputs > "
            "0) == targets).all(1).sum(), or lambda outputs, targets: 0 where only the loss counts"
        )
    options = cross_entropy_options(workload.loss) or {}
    is_asked = targets != options.get("ignore_index", _IGNORED)
    return (outputs.argmax(dim=1) == targets) & is_asked, is_asked


def check_share(split: str, right: int, asked: int, shapes: str) -> None:
    """Raises WorkloadError for more right answers than examples; `shapes` says where, in words."""
    if not 0 <= right <= asked:
        raise WorkloadError(
            f"workload.count_correct: counts {right} right answers among {asked} examples of "
            f"workload.{split} ({shapes}); it must return how many of the examples are right, 0 to "
            f"{asked}; where each position has a label, leave it out, and labels are counted"
        )
