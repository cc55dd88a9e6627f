"""A batch, which is any nest of tensors, and the one way to pass it through a network.

Where examples are pairs, a network is passed the inputs; loss, counts and metrics are given the
targets. Any other batch, such as a dict, is passed to all of them whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.errors import WorkloadError

if TYPE_CHECKING:
    from gbp_ray.workloads.contract import Workload

__all__ = [
    "Batch",
    "call_arguments",
    "forward",
    "kind_of",
    "labels_of",
    "logits_of",
    "map_tensors",
    "size_of",
    "take_part",
    "tensors_in",
    "with_logits",
]


class Batch(NamedTuple):
    """Examples of a split, joined.

    Attributes:
        inputs: What the network is passed; of a pair its first part, else the whole batch.
        targets: What loss, counts and metrics are given; of a pair its second part, else the whole
            batch, the very object in `inputs`.
    """

    inputs: Any
    targets: Any

    @classmethod
    def of(cls, nest: Any) -> Batch:
        """Wraps what a data set or a `collate` made; a tuple or list of two is a pair."""
        if isinstance(nest, (tuple, list)) and len(nest) == 2:
            return cls(nest[0], nest[1])
        return cls(nest, nest)

    @property
    def is_pair(self) -> bool:
        """Returns True if inputs and targets are two things."""
        return self.inputs is not self.targets

    @property
    def nest(self) -> Any:
        """The batch as a workload's own functions know it."""
        return (self.inputs, self.targets) if self.is_pair else self.inputs

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Applies a function to every tensor."""
        inputs = map_tensors(self.inputs, function)
        return Batch(inputs, map_tensors(self.targets, function) if self.is_pair else inputs)

    def part(self, rows: slice, size: int) -> Batch:
        """Takes some of `size` examples; see `take_part`."""
        part: Batch = take_part(self, rows, size)
        return part


def forward(model: nn.Module, workload: Workload, batch: Batch, precision: str = "float32") -> Any:
    """Passes a batch through a network, as the workload's `forward` or its default does.

    By default the network is called with the inputs of pairs, with the entries of a mapping as
    keyword arguments, and with any other batch as it is.

    Args:
        precision: "bfloat16" multiplies in it (torch.autocast); logits come back as float32.
    """
    if precision != "float32":
        device = next(tensors_in(batch.inputs)).device
        with torch.autocast(device.type, dtype=torch.bfloat16):
            outputs = forward(model, workload, batch)
        logits = logits_of(outputs)
        is_narrow = isinstance(logits, Tensor) and logits.dtype is torch.bfloat16
        return with_logits(outputs, logits.float()) if is_narrow else outputs
    if workload.forward is not None:
        return workload.forward(model, batch.nest)
    if not batch.is_pair and isinstance(batch.inputs, Mapping):
        return model(**batch.inputs)
    if not batch.is_pair and isinstance(batch.inputs, (tuple, list)):
        raise WorkloadError(
            f"workload.forward: a batch is {kind_of(batch.inputs)}, and only (inputs, targets) and "
            "dicts have a default; give forward(model, batch)"
        )
    return model(batch.inputs)


def call_arguments(
    model: nn.Module, workload: Workload, batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments that the network itself is called with for a batch.

    Raises:
        WorkloadError: The workload's `forward` never calls the network, or does so several times.
    """
    if workload.forward is None and (batch.is_pair or isinstance(batch.inputs, Tensor)):
        return (batch.inputs,), {}
    if workload.forward is None:
        return (), dict(batch.inputs)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    try:
        with torch.no_grad():
            workload.forward(model, batch.nest)
    finally:
        hook.remove()
    if len(calls) != 1:
        raise WorkloadError(
            f"workload.forward: calls the network itself {len(calls)} times for a batch; where its "
            "arguments are needed it must call model(...) once"
        )
    return calls[0]


def labels_of(targets: Any) -> Any:
    """Returns the tensor that targets are about: themselves, or what they name `labels`."""
    return targets.get("labels", targets) if isinstance(targets, Mapping) else targets


def logits_of(outputs: Any) -> Any:
    """Returns the tensor that outputs are about: themselves, or what they name `logits`."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """Puts other logits in the place of those that `logits_of` finds."""
    if isinstance(outputs, Tensor):
        return logits
    changed = copy.copy(outputs)
    if isinstance(outputs, Mapping):
        changed["logits"] = logits
    else:
        changed.logits = logits
    return changed


def map_tensors(nest: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to every tensor of a nest of tuples, lists and mappings."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Batch):
        return nest.map(function)
    if isinstance(nest, Mapping):
        return {key: map_tensors(value, function) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        values = [map_tensors(value, function) for value in nest]
        return values if isinstance(nest, list) else tuple(values)
    return nest


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """Yields the tensors of tuples, lists, mappings and the attributes of other objects."""
    if isinstance(nest, Tensor):
        yield nest
        return
    if isinstance(nest, nn.Module):  # which may hold itself
        return
    if not isinstance(nest, (tuple, list)):
        nest = (nest if isinstance(nest, Mapping) else getattr(nest, "__dict__", {})).values()
    for value in nest:
        yield from tensors_in(value)


def size_of(nest: Any) -> int:
    """Returns the length of the first tensor's first axis: the number of examples; 0 without any.

    Where a `collate` packs several examples into one row, it is the number of rows.
    """
    return next((len(tensor) for tensor in tensors_in(nest) if tensor.ndim), 0)


def take_part(nest: Any, rows: slice, size: int) -> Any:
    """Takes some examples of a nest; what has no axis of examples stays whole.

    Args:
        size: Examples in the nest; tensors whose first axis is as long have one row for each.
    """

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.ndim and len(tensor) == size else tensor

    return map_tensors(nest, take)


def kind_of(value: object) -> str:
    """Describes a value for a message: dtype and shape of a tensor, else the type."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict with keys {', '.join(repr(key) for key in list(value)[:5])}"
    return type(value).__name__
