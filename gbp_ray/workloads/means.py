"""Refuses losses that are no means over their items, and metrics that are no sums.

Their values would depend on how examples are cut into batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import GbpError, WorkloadError
from gbp_ray.workloads.batch import (
    Batch,
    forward,
    kind_of,
    labels_of,
    logits_of,
    size_of,
    take_part,
    with_logits,
)
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.losses import (
    count_items,
    cross_entropy_options,
    ignored_label,
    mean_loss,
)
from gbp_ray.workloads.metrics import Metric, is_share_of_right, update_metric

__all__ = ["check_means"]

# By chance a loss may be a mean over one draw.
_NUM_MADE_UP = 3


def check_means(
    workload: Workload,
    model: nn.Module,
    batch: Batch,
    outputs: Any,
    metrics: Sequence[Metric],
    retake: Callable[[slice], Batch],
) -> None:
    """Refuses a loss that is no mean over its items, and metrics that are no sums.

    Both are compared with those of two halves of the batch and, where they can be made up, once
    more with labels of all classes, and with outputs that differ more than those of an untrained
    network do.

    Args:
        outputs: Of the network for the batch, without a graph.
        retake: Reads some examples of the batch anew, where parts of it do not do.
    """
    size = size_of(batch.targets)
    if size < 2:
        return
    halves = (slice(0, size // 2), slice(size // 2, size))

    def check(outputs: Any, targets: Any, logits: Tensor | None = None) -> None:
        if logits is not None:
            pairs = [
                (with_logits(outputs, logits[half]), take_part(targets, half, size))
                for half in halves
            ]
        else:
            parts = [batch.part(half, size) for half in halves]
            try:
                found = [forward(model, workload, part) for part in parts]
            except Exception:  # noqa: BLE001 - rows of a padded batch may not do for a batch
                parts = [retake(half) for half in halves]
                found = [forward(model, workload, part) for part in parts]
            pairs = [(seen, part.targets) for seen, part in zip(found, parts, strict=True)]
        # The loss first, since perplexity is made of it.
        _check_halves(workload, outputs, targets, pairs, halves)
        for metric in metrics:
            _check_sums(workload, metric, outputs, targets, pairs, _shapes(outputs, targets))

    targets, logits = batch.targets, logits_of(outputs)
    check(outputs, targets, outputs if isinstance(outputs, Tensor) else None)
    if (made_up := _make_up_labels(workload, batch, outputs)) is not None:
        _check_made_up(workload, model, made_up, halves)
    is_carried = workload.loss is functional.cross_entropy and isinstance(targets, Mapping)
    if not isinstance(logits, Tensor) or is_carried:
        return
    are_tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if are_tensors and targets.ndim == 1 and outputs.ndim == 2 and not targets.is_floating_point():
        check(outputs, (torch.arange(size) % outputs.shape[1]).to(targets), outputs)
    if logits.is_floating_point() and logits.ndim:
        for number in range(_NUM_MADE_UP):
            drawn = _made_up_outputs(logits, number)
            try:
                check(with_logits(outputs, drawn), targets, drawn)
            except GbpError:
                raise
            except Exception:  # noqa: BLE001 - it may want other outputs than these
                return


def _make_up_labels(workload: Workload, batch: Batch, outputs: Any) -> Batch | None:
    """Leaves each example a few labels, those of the first half likely, the others unlikely.

    By chance, or where all are full, both halves of a batch may have as many items by any count,
    and the losses of an untrained network hardly differ.

    Returns:
        None where the loss is none that outputs carry for labels of positions.
    """
    labels, logits = labels_of(batch.targets), logits_of(outputs)
    if (
        workload.count is not None
        or workload.loss is not functional.cross_entropy
        or not isinstance(batch.targets, Mapping)
        or not isinstance(labels, Tensor)
        or not isinstance(logits, Tensor)
        or labels.is_floating_point()
        or labels.ndim < 2
        or labels.shape not in (logits.shape[:-1], logits.shape[:1] + logits.shape[2:])
    ):
        return None
    if labels.shape != logits.shape[:-1]:
        logits = logits.movedim(1, -1)
    means, half = logits.flatten(0, -2).mean(dim=0), len(labels) // 2
    ignored = ignored_label(workload)
    few = torch.full_like(labels, ignored)
    few[:half, :3], few[half:, :2] = means.argmax(), means.argmin()
    return Batch.of({**batch.targets, "labels": few.where(labels != ignored, ignored)})


def _check_made_up(
    workload: Workload, model: nn.Module, batch: Batch, halves: tuple[slice, slice]
) -> None:
    size = size_of(batch.targets)
    parts = [batch.part(half, size) for half in halves]
    try:
        outputs, *found = [forward(model, workload, part) for part in (batch, *parts)]
    except Exception:  # noqa: BLE001 - it may want other labels than these
        return
    pairs = [(seen, part.targets) for seen, part in zip(found, parts, strict=True)]
    _check_halves(workload, outputs, batch.targets, pairs, halves)


def _made_up_outputs(outputs: Tensor, seed: int) -> Tensor:
    """Draws outputs of the kind of these: shares, logarithms of shares, or any numbers."""
    own = torch.Generator().manual_seed(seed)
    draws = torch.randn(outputs.shape, generator=own)
    # Examples of many positions would be alike if each position were drawn by itself only.
    draws += 2 * torch.randn(outputs.shape[:2] + (1,) * (outputs.ndim - 2), generator=own)
    draws = draws.to(outputs)
    axis = min(1, outputs.ndim - 1)
    tolerance = torch.finfo(outputs.dtype).eps ** 0.5
    if bool((outputs >= 0).all()):
        are_shares = bool(((outputs.sum(dim=axis) - 1).abs() <= tolerance).all())
        if are_shares:
            return draws.softmax(dim=axis)
        return draws.sigmoid() if bool((outputs <= 1).all()) else draws.abs()
    if bool((outputs.logsumexp(dim=axis).abs() <= tolerance).all()):
        return draws.log_softmax(dim=axis)
    return draws


def _check_halves(
    workload: Workload,
    outputs: Any,
    targets: Any,
    pairs: list[tuple[Any, Any]],
    halves: tuple[slice, slice],
) -> None:
    size, shapes = size_of(targets), _shapes(outputs, targets)
    is_known = workload.count is None and cross_entropy_options(workload.loss) is not None
    if (is_known and isinstance(targets, Tensor)) or workload.count is len:
        return
    counts = count_items(workload, targets)
    counts = torch.ones(size) if counts is None else counts.cpu()
    if not all(counts[half].any() for half in halves):
        return
    found = mean_loss(workload, outputs, targets)
    if not isinstance(found, Tensor) or found.ndim:
        return
    loss, *own = (float(found), *(float(mean_loss(workload, *pair)) for pair in pairs))
    weights = [float(counts[half].sum() / counts.sum()) for half in halves]
    mean = sum(weight * value for weight, value in zip(weights, own, strict=True))
    # An untrained network says nearly the same of all examples, so a loose bound hides much.
    tolerance = torch.finfo(found.dtype).eps ** 0.7 * max(abs(loss), *map(abs, own))
    if math.isfinite(loss) and not abs(loss - mean) <= tolerance:
        if abs(loss - sum(own)) <= tolerance:
            raise WorkloadError(
                f"workload.loss: is a sum over the batch, {loss:.6g} over {size} examples and "
                f"{mean:.6g} over half of them ({shapes}); it must be a mean: divide it by the "
                "number of items, or leave reduction out"
            )
        raise WorkloadError(
            f"workload.{'loss' if workload.count is None else 'count'}: the loss is no mean over "
            f"{'examples' if workload.count is None else 'what it counts'}: {loss:.6g} over "
            f"{size} of them, but {mean:.6g} as the mean of their halves ({shapes}), so it "
            "would depend on the batch size; give Workload a count, targets -> number of items "
            "that their loss is a mean over, or count=len to let each example count alike"
            f"{_fitting_count(targets, loss, own, halves, tolerance)}"
        )


def _fitting_count(
    targets: Any,
    loss: float,
    own: list[float],
    halves: tuple[slice, slice],
    tolerance: float,
) -> str:
    """Names a count of labels that a loss for a mapping turns out to be a mean over."""
    labels = targets.get("labels") if isinstance(targets, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return ""
    for text, counted in (
        ("batch['labels'] != -100", labels != -100),
        ("batch['labels'][:, 1:] != -100", labels[:, 1:] != -100),
    ):
        weights = [float(counted[half].sum()) for half in halves]
        mean = sum(w * value for w, value in zip(weights, own, strict=True)) / sum(weights)
        if abs(loss - mean) <= tolerance:
            return f"; here count=lambda batch: ({text}).sum() fits"
    return ""


def _check_sums(
    workload: Workload,
    metric: Metric,
    outputs: Any,
    targets: Any,
    pairs: list[tuple[Any, Any]],
    shapes: str,
) -> None:
    whole, *split = (
        update_metric(metric, workload, "train", *pair) for pair in ((outputs, targets), *pairs)
    )
    total = split[0] + split[1] if split[0].shape == split[1].shape else split[0]
    if is_share_of_right(metric, workload):
        counts = [int(sums[0]) for sums in (whole, *split)]
        if counts[0] != counts[1] + counts[2]:
            raise WorkloadError(
                f"workload.count_correct: is no sum over examples: {counts[0]} over "
                f"{size_of(targets)} of them, but {counts[1]} and {counts[2]} over their halves "
                f"({shapes}); it must return how many of the examples are right"
            )
    elif whole.shape != total.shape or not torch.allclose(
        whole, total, rtol=1e-4, atol=1e-6 * float(whole.nan_to_num().abs().max()), equal_nan=True
    ):
        raise WorkloadError(
            f"workload.metrics: {metric.name}.update is no sum over examples: over "
            f"{size_of(targets)} of them it is not what it is over their halves together "
            f"({shapes}); it must return sums that batches add to"
        )


def _shapes(outputs: Any, targets: Any) -> str:
    return f"outputs {kind_of(outputs)}, targets {kind_of(targets)}"
