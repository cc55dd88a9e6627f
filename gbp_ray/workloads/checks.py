"""Refuses data, losses and metrics that no job can use, and names the example at fault."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.errors import GbpError, WorkloadError, in_one_line, name_some
from gbp_ray.workloads.batch import (
    Batch,
    forward,
    kind_of,
    logits_of,
    size_of,
    tensors_in,
)
from gbp_ray.workloads.contract import Workload, count_rows, count_top1, in_mode, num_examples
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.losses import (
    check_share,
    count_batch,
    count_items,
    count_right,
    cross_entropy_options,
    mean_loss,
)
from gbp_ray.workloads.means import check_means
from gbp_ray.workloads.metrics import Metric, compute_metric, metrics_of, update_metric

__all__ = [
    "Checked",
    "blaming_batch",
    "blaming_labels",
    "check_finite",
    "check_labels",
    "check_scalar",
    "check_workload",
    "find_unreached",
]

_OPTIONAL = ("prepare", "augment", "count", "forward", "collate")


@dataclass(frozen=True, eq=False)
class Checked:
    """A workload that can be used, and the pass of its network that showed it.

    Attributes:
        model: The network, as it was built.
        first_batch: Training examples from all over the split, augmented.
        outputs: Of the network in eval mode, without a graph.
        unreached: Names of the parameters that their loss does not depend on.
    """

    workload: Workload
    model: nn.Module
    first_batch: Batch
    outputs: Any
    unreached: tuple[str, ...]

    def take_example(self) -> Batch:
        """Returns the first training example, augmented, as a batch of its own."""
        return take_batch(self.workload, self.workload.train, torch.tensor([0]), augment_seed=0)


def check_workload(workload: Workload, model: nn.Module, batch_size: int) -> Checked:
    """Passes one batch of each split through the network, and refuses what no job can use.

    Labels are checked as far as that needs no reading: all of a tuple's, one batch of a data set's.

    Raises:
        WorkloadError: A split is empty, labels are out of range, or the model, the loss or the
            metric does not accept a batch.
    """
    for name in ("build_model", "loss", "count_correct", *_OPTIONAL):
        function = getattr(workload, name)
        if not callable(function) and (function is not None or name not in _OPTIONAL):
            raise WorkloadError(f"workload.{name}: must be a function, not {kind_of(function)}")
    splits = ["train", "test", *(["validation"] if workload.validation is not None else [])]
    for split in splits:
        _check_size(split, getattr(workload, split))
    with in_mode(model, is_training=False):
        checked, *_ = [_check_split(workload, model, split, batch_size) for split in splits]
    return checked


def _check_size(split: str, data: Any) -> None:
    if isinstance(data, tuple) and len(data) != 2:
        raise WorkloadError(f"workload.{split}: a tuple must be (inputs, targets), not {len(data)}")
    columns = data if isinstance(data, tuple) else (data,)
    sizes = [count_rows(column, f"workload.{split}: its examples") for column in columns]
    if len(set(sizes)) > 1:
        raise WorkloadError(f"workload.{split}: has {sizes[0]} inputs but {sizes[1]} targets")
    if sizes[0] == 0:
        raise WorkloadError(f"workload.{split}: holds no examples; give at least one")


def _check_split(workload: Workload, model: nn.Module, split: str, batch_size: int) -> Checked:
    data, is_train = getattr(workload, split), split == "train"
    total = num_examples(data)
    indices = torch.arange(min(batch_size, total))
    if is_train:
        # Labels may lie in order, and a mean over one example shows nothing.
        indices = torch.linspace(0, total - 1, min(max(batch_size, 4), total)).long()
    metrics = metrics_of(workload)
    batch: Batch | None = None
    outputs: Any = None
    try:
        with torch.no_grad():
            # Only training examples are augmented.
            seed = 0 if is_train else None
            device = next((tensor.device for tensor in model.parameters()), None)
            batch = take_batch(workload, data, indices, device=device, augment_seed=seed)
            graph = _pass_with_graph(workload, model, batch) if is_train else None
            outputs = forward(model, workload, batch) if graph is None else graph.detach()
            targets = batch.targets
            _check_labels(workload, split, outputs, targets)
            _check_shares(workload, outputs, targets)
            _check_axis(workload, metrics, outputs, targets)
            loss = _checked_loss(workload, outputs, targets)
            _check_right(workload, split, outputs, targets)
            for metric in metrics:
                metric.describe(outputs)
                compute_metric(
                    metric, update_metric(metric, workload, split, outputs, targets), split
                )
            if not isinstance(data, tuple):
                _check_collate(workload, data, split, indices, batch, seed)
            if is_train and total > 1:

                def retake(rows: slice) -> Batch:
                    return take_batch(workload, data, indices[rows], augment_seed=seed)

                check_means(workload, model, batch, outputs, metrics, retake)
    except GbpError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"workload.{split}: one batch of {len(indices)} examples failed with "
            f"{in_one_line(error)}{_remedy(workload, model, batch, outputs, error)}"
        ) from error
    check_scalar(loss)

    def loss_of_graph() -> Tensor:
        seen = forward(model, workload, batch) if graph is None else graph
        return mean_loss(workload, seen, targets)

    unreached = find_unreached(model, loss_of_graph) if is_train else ()
    return Checked(workload, model, batch, outputs, unreached)


def check_scalar(loss: Any) -> None:
    """Raises WorkloadError for a loss that is no scalar tensor."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise WorkloadError(
            "workload.loss: must return the mean over the batch, a scalar tensor, not "
            f"{kind_of(loss)}"
        )


@contextmanager
def blaming_batch(batch: Batch) -> Iterator[None]:
    """Raises WorkloadError naming a batch that no data set gave, if its pass fails the block."""
    try:
        yield
    except (GbpError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise WorkloadError(
            f"workload.train: a pass of {size_of(batch.targets)} examples failed with "
            f"{in_one_line(error)}"
        ) from error


def _check_collate(
    workload: Workload, data: Any, split: str, indices: Tensor, batch: Batch, seed: int | None
) -> None:
    """Refuses a batch that has not the items of its examples together."""
    if count_items(workload, batch.targets) is None:
        return
    singles = [take_batch(workload, data, index, augment_seed=seed) for index in indices.split(1)]
    alone = sum(count_batch(workload, single.targets) for single in singles)
    together = count_batch(workload, batch.targets)
    if not math.isclose(alone, together):
        raise WorkloadError(
            f"workload.collate: {len(indices)} examples of workload.{split} have {together:g} "
            f"items in one batch, and {alone:g} one by one; let it keep all, correct "
            "workload.count, or draw labels at random in the data set only"
        )


def _pass_with_graph(workload: Workload, model: nn.Module, batch: Batch) -> Tensor | None:
    """Returns outputs to differentiate; None where they are no tensor, or only evaluation works."""
    with suppress(Exception), torch.enable_grad():
        outputs = forward(model, workload, batch)
        return outputs if isinstance(outputs, Tensor) else None
    return None


def find_unreached(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[str, ...]:
    """Names the trainable parameters that a loss does not depend on."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # What fails here fails in training too, which says why.
    with suppress(Exception), torch.enable_grad():
        value = loss()
        if not value.requires_grad:
            return tuple(name for name, _ in named)
        found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
        return tuple(name for (name, _), g in zip(named, found, strict=True) if g is None)
    return ()


def _shapes(outputs: Any, targets: Any) -> str:
    return f"outputs {kind_of(outputs)}, targets {kind_of(targets)}"


def _remedy(
    workload: Workload, model: nn.Module, batch: Batch | None, outputs: Any, error: Exception
) -> str:
    weights = next((p for p in model.parameters() if p.is_floating_point()), None)
    if outputs is not None or weights is None or batch is None:
        return ""
    inputs = batch.inputs
    if not isinstance(inputs, Tensor):
        if isinstance(error, KeyError) and isinstance(inputs, Mapping):
            return f"; a batch is {kind_of(inputs)}"
        if workload.forward is not None or batch.is_pair or not isinstance(error, TypeError):
            return ""
        return f"; a batch is {kind_of(inputs)}: give Workload a forward(model, batch)"
    if not inputs.is_floating_point() or inputs.dtype is weights.dtype:
        return ""
    return (
        f"; inputs are {inputs.dtype} and the network's weights {weights.dtype}: convert the "
        "inputs in the data or in workload.prepare"
    )


def _checked_loss(workload: Workload, outputs: Any, targets: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # Torch warns only, and goes on with every output against every target.
            warnings.filterwarnings("error", "Using a target size", UserWarning)
            return mean_loss(workload, outputs, targets)
    except UserWarning as error:
        raise WorkloadError(
            "workload.loss: outputs and targets are spread over each other "
            f"({_shapes(outputs, targets)}); give them one shape, as by targets.unsqueeze(1) in "
            "the data or outputs.squeeze(1) in the network"
        ) from error


def _check_right(workload: Workload, split: str, outputs: Any, targets: Any) -> None:
    """Refuses a count of right answers that is above the number of examples, or may become so."""
    if workload.count_correct is count_top1:
        return
    shapes = _shapes(outputs, targets)
    right, asked = count_right(workload, outputs, targets)
    check_share(split, int(right), int(asked), shapes)
    if (
        not isinstance(outputs, Tensor)
        or not isinstance(targets, Tensor)
        or outputs.ndim < 2
        or targets.is_floating_point()
        or targets.shape != outputs.shape[:1] + outputs.shape[2:]
    ):
        return
    labels = targets.long().clamp(0, outputs.shape[1] - 1).unsqueeze(1)
    perfect = torch.zeros_like(outputs).scatter_(1, labels, 1)
    try:
        right, asked = count_right(workload, perfect, targets)
    except Exception:  # noqa: BLE001 - it may want other outputs than these
        return
    check_share(split, int(right), int(asked), shapes)


def _check_labels(workload: Workload, split: str, outputs: Any, targets: Any) -> None:
    outputs = logits_of(outputs)
    if not _is_classifier(workload, outputs, targets):
        return
    options = cross_entropy_options(workload.loss) or {}
    if options.get("reduction", "mean") == "sum":
        raise WorkloadError(
            "workload.loss: is a sum over the batch; it must be a mean, so leave reduction out"
        )
    if targets.dtype not in (torch.int64, torch.uint8):
        raise WorkloadError(
            f"workload.{split}: labels are {targets.dtype}, and the loss takes torch.int64; "
            "convert them in the data"
        )
    data = getattr(workload, split)
    labels = data[1] if isinstance(data, tuple) else targets
    if bool(_are_out_of_range(workload, labels, outputs).any()):
        num_classes = outputs.shape[1]
        raise WorkloadError(
            f"workload.{split}: labels run from {int(labels.min())} to {int(labels.max())}, but "
            f"the model has {num_classes} outputs (allowed: 0 to {num_classes - 1})"
        )


def _is_classifier(workload: Workload, outputs: Any, targets: Any) -> bool:
    return (
        cross_entropy_options(workload.loss) is not None
        and isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim >= 2
        and not targets.is_floating_point()
    )


def _check_shares(workload: Workload, outputs: Any, targets: Any) -> None:
    """Refuses numbers that cross entropy would take for shares of classes."""
    outputs = logits_of(outputs)
    if cross_entropy_options(workload.loss) is None or not isinstance(outputs, Tensor):
        return
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return
    if targets.shape != outputs.shape or targets.ndim < 2:
        return
    sums = targets.double().sum(dim=1)
    are_shares = bool((targets >= 0).all()) and bool(((sums - 1).abs() <= 1e-2).all())
    if not are_shares or outputs.shape[1] == 1:
        raise WorkloadError(
            f"workload.loss: cross entropy takes targets of {kind_of(targets)} for shares of "
            "classes, and these are none; give a loss for numbers, such as "
            "torch.nn.functional.mse_loss with metrics=['rmse'], or for several labels, such as "
            "binary_cross_entropy_with_logits with metrics=['f1']"
        )


def _check_axis(workload: Workload, metrics: Sequence[Metric], outputs: Any, targets: Any) -> None:
    """Refuses outputs of positions whose axis of classes is not known, where labels are judged."""
    names = {metric.name for metric in metrics}
    is_judged = names & {"f1", "mIoU", "top5"} or (
        "accuracy" in names and workload.count_correct is count_top1
    )
    if not (is_judged and isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return
    if outputs.ndim < 3 or targets.shape != outputs.shape[:-1]:
        return
    is_second = targets.shape == outputs.shape[:1] + outputs.shape[2:]
    if is_second and cross_entropy_options(workload.loss) is not None:
        return  # torch's own reading
    raise WorkloadError(
        f"workload.metrics: outputs are {kind_of(outputs)} for labels {tuple(targets.shape)}, and "
        "classes are looked for on axis 1; move them there, as by forward=lambda model, batch: "
        "model(batch[0]).movedim(-1, 1), or return them as the `logits` of an object"
    )


def _are_out_of_range(workload: Workload, labels: Any, outputs: Tensor) -> Any:
    options = cross_entropy_options(workload.loss) or {}
    ignored = options.get("ignore_index", -100)
    is_strange = (labels < 0) | (labels >= outputs.shape[1])
    # Where each position has a label of its own, the loss leaves out those marked so; a whole
    # example is left out only where the loss was made for that.
    is_meant = outputs.ndim > 2 or ignored != -100 or options.get("weight") is not None
    return is_strange & (labels != ignored) if is_meant else is_strange


def check_labels(
    workload: Workload, split: str, indices: Tensor, outputs: Any, targets: Any
) -> None:
    """Raises WorkloadError for the first label of a batch that no output stands for.

    Checks only data sets: `check_workload` has seen all labels of tuples. On a GPU the loss itself
    would say nothing and leave the device unusable.
    """
    outputs, is_tuple = logits_of(outputs), isinstance(getattr(workload, split), tuple)
    if is_tuple or not _is_classifier(workload, outputs, targets):
        return
    is_strange = _are_out_of_range(workload, targets, outputs)
    if not bool(is_strange.any()):
        return
    # A `collate` may have packed several examples into a row.
    row = int(is_strange.reshape(len(targets), -1).any(dim=1).nonzero()[0])
    where = f"example {int(indices[row])}"
    if len(targets) != len(indices):
        where = f"one of examples {name_some([str(index) for index in indices.tolist()])}"
    num_classes = outputs.shape[1]
    raise WorkloadError(
        f"workload.{split}: {where} has label "
        f"{int(targets[row][is_strange[row]].flatten()[0])}, but the model has {num_classes} "
        f"outputs (allowed: 0 to {num_classes - 1})"
    )


def check_finite(workload: Workload, split: str, indices: Tensor) -> None:
    """Raises WorkloadError for the first example of a batch that holds NaN or infinity."""
    batch = take_batch(workload, getattr(workload, split), indices)
    names = ("input", "target") if batch.is_pair else ("batch",)
    for what, column in zip(names, batch, strict=False):
        for tensor in tensors_in(column):
            if not tensor.ndim or len(tensor) != len(indices):
                continue
            bad = (~torch.isfinite(tensor)).reshape(len(indices), -1).any(dim=1).nonzero()
            if len(bad):
                raise WorkloadError(
                    f"workload.{split}: the {what} of example {int(indices[int(bad[0])])}, as "
                    "prepared for the model, holds NaN or infinity, and so the loss is not finite; "
                    "mend the example or leave it out"
                )


@contextmanager
def blaming_labels(
    workload: Workload, model: nn.Module, split: str, indices: Tensor
) -> Iterator[None]:
    """Raises WorkloadError naming the target that the loss refuses, if that fails the block."""
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
    size = len(indices)
    with torch.no_grad(), in_mode(model, is_training=False):
        try:
            batch = take_batch(workload, getattr(workload, split), indices)
        except Exception:  # noqa: BLE001 - told of by what reads it
            return None
        outputs: Any = None
        with suppress(Exception):
            outputs = forward(model, workload, batch)
        if outputs is None and batch.is_pair:
            return None
        # Others may carry their own loss, which is computed on the way.
        what = (
            "the loss refuses the target" if batch.is_pair else "network or loss refuse the batch"
        )
        for row, index in enumerate(indices.tolist()):
            part = batch.part(slice(row, row + 1), size)
            try:
                if batch.is_pair and isinstance(outputs, Tensor):
                    seen: Any = outputs[row : row + 1]
                else:
                    seen = forward(model, workload, part)
                mean_loss(workload, seen, part.targets)
            except Exception as error:  # noqa: BLE001 - told by name
                own = part.targets
                is_one = batch.is_pair and isinstance(own, Tensor) and own.numel() == 1
                target = f" = {own.item()}" if is_one else ""
                return f"workload.{split}: {what}{target} of example {index}: {in_one_line(error)}"
    return None
