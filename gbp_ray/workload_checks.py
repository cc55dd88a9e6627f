"""Refuses data, losses and metrics that no job can use, and names the example that is to blame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import GbpError, WorkloadError
from gbp_ray.workload import Workload, in_one_line, kind_of, num_examples, take_batch

__all__ = ["blaming_labels", "check_finite", "check_labels", "check_workload"]


def check_workload(workload: Workload, model: nn.Module, batch_size: int) -> None:
    """Refuses data that no job can use, before anything is trained.

    One batch of each split goes through the model, so a wrong shape shows here and not an hour
    later. Labels are checked as far as they can be seen without reading the data: all of a tuple's,
    one batch of a data set's.

    Raises:
        WorkloadError: A split is empty, labels are out of range, or the model, the loss or the
            metric does not accept a batch.
    """
    was_training = model.training
    model.eval()
    try:
        splits = ["train", "test"]
        if workload.validation is not None:
            splits.append("validation")
        for split in splits:
            _check_size(split, getattr(workload, split))
        for split in splits:
            _check_split(workload, model, split, batch_size)
    finally:
        model.train(was_training)


def _check_size(split: str, data: Any) -> None:
    if isinstance(data, tuple) and len(data) != 2:
        raise WorkloadError(f"workload.{split}: a tuple must be (inputs, targets), not {len(data)}")
    try:
        sizes = [len(column) for column in data] if isinstance(data, tuple) else [len(data)]
    except TypeError as error:
        raise WorkloadError(
            f"workload.{split}: its examples cannot be counted ({in_one_line(error)}); give "
            "(inputs, targets) or a map-style dataset"
        ) from error
    if len(set(sizes)) > 1:
        raise WorkloadError(f"workload.{split}: has {sizes[0]} inputs but {sizes[1]} targets")
    if sizes[0] == 0:
        raise WorkloadError(f"workload.{split}: holds no examples; give at least one")


def _check_split(workload: Workload, model: nn.Module, split: str, batch_size: int) -> None:
    data = getattr(workload, split)
    indices = torch.arange(min(batch_size, num_examples(data)))
    # Only training examples are augmented.
    seed = 0 if split == "train" else None
    try:
        with torch.no_grad():
            inputs, targets = take_batch(workload, data, indices, augment_seed=seed)
            outputs = model(inputs)
            _check_labels(workload, split, outputs, targets)
            loss = workload.loss(outputs, targets)
            correct = workload.count_correct(outputs, targets)
    except GbpError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"workload.{split}: one batch of {len(indices)} examples failed with "
            f"{in_one_line(error)}"
        ) from error
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise WorkloadError(
            "workload.loss: must return the mean over the batch, a scalar tensor, not "
            f"{kind_of(loss)}"
        )
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


def _check_labels(workload: Workload, split: str, outputs: Tensor, targets: Tensor) -> None:
    if not _is_classifier(workload, outputs, targets):
        return
    data = getattr(workload, split)
    labels = data[1] if isinstance(data, tuple) else targets
    if bool(_are_out_of_range(labels, outputs).any()):
        num_classes = outputs.shape[1]
        raise WorkloadError(
            f"workload.{split}: labels run from {int(labels.min())} to {int(labels.max())}, but "
            f"the model has {num_classes} outputs (allowed: 0 to {num_classes - 1})"
        )


def _is_classifier(workload: Workload, outputs: Tensor, targets: Tensor) -> bool:
    return (
        workload.loss is functional.cross_entropy
        and outputs.ndim >= 2
        and not targets.is_floating_point()
    )


def _are_out_of_range(labels: Any, outputs: Tensor) -> Any:
    is_strange = (labels < 0) | (labels >= outputs.shape[1])
    # Where each position has a label of its own, the loss leaves out those marked so.
    return is_strange & (labels != -100) if outputs.ndim > 2 else is_strange


def check_labels(
    workload: Workload, split: str, indices: Tensor, outputs: Tensor, targets: Tensor
) -> None:
    """Refuses labels of a batch that no output stands for.

    Checks data sets alone, whose labels nobody has seen as a whole; `check_workload` has seen those
    of tuples. On a GPU the loss itself would say nothing and leave the device unusable.

    Raises:
        WorkloadError: Naming the split and the first such example.
    """
    is_tuple = isinstance(getattr(workload, split), tuple)
    if is_tuple or not _is_classifier(workload, outputs, targets):
        return
    is_strange = _are_out_of_range(targets, outputs)
    if not bool(is_strange.any()):
        return
    row = int(is_strange.reshape(len(indices), -1).any(dim=1).nonzero()[0])
    num_classes = outputs.shape[1]
    raise WorkloadError(
        f"workload.{split}: example {int(indices[row])} has label "
        f"{int(targets[row][is_strange[row]].flatten()[0])}, but the model has {num_classes} "
        f"outputs (allowed: 0 to {num_classes - 1})"
    )


def check_finite(workload: Workload, split: str, indices: Tensor) -> None:
    """Looks for NaN and infinity in a batch whose loss is not finite.

    Raises:
        WorkloadError: Naming the split and the first example that holds one.
    """
    columns = take_batch(workload, getattr(workload, split), indices)
    for what, column in zip(("input", "target"), columns, strict=True):
        bad = (~torch.isfinite(column)).reshape(len(indices), -1).any(dim=1).nonzero()
        if len(bad):
            raise WorkloadError(
                f"workload.{split}: the {what} of example {int(indices[int(bad[0])])}, as prepared "
                "for the model, holds NaN or infinity, and so the loss is not finite; mend the "
                "example or leave it out"
            )


@contextmanager
def blaming_labels(
    workload: Workload, model: nn.Module, split: str, indices: Tensor
) -> Iterator[None]:
    """Names the example whose target the loss refuses, when that is why the block fails.

    Raises:
        WorkloadError: Naming the split, the example and what the loss said.
    """
    try:
        yield
    except GbpError:
        raise
    except Exception as error:
        if (fault := _find_refused_target(workload, model, split, indices)) is None:
            raise
        raise WorkloadError(fault) from error


def _find_refused_target(
    workload: Workload, model: nn.Module, split: str, indices: Tensor
) -> str | None:
    if next(model.parameters()).is_cuda:
        # A failed kernel has left the device unusable, or memory is short.
        return None
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            inputs, targets = take_batch(workload, getattr(workload, split), indices)
            outputs = model.eval()(inputs)
    except Exception:  # noqa: BLE001 - the loss is not to blame; the first failure is raised
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    for row, index in enumerate(indices.tolist()):
        try:
            with torch.no_grad():
                workload.loss(outputs[row : row + 1], targets[row : row + 1])
        except Exception as error:  # noqa: BLE001 - told by name
            target = f" = {targets[row].item()}" if targets[row].numel() == 1 else ""
            return (
                f"workload.{split}: the loss refuses the target{target} of example {index}: "
                f"{in_one_line(error)}"
            )
    return None
