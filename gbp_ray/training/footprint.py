"""How many bytes of tensors a pass over a batch holds at its peak, told from two small passes.

A pass is run on two and on four examples while every tensor that torch makes is counted, operation
by operation. What lives after the t-th operation is g_t + a_t * examples: gradients do not grow
with the batch, activations do. Both are known from the two runs, and the peak for any batch is the
greatest of these sums. Where the two runs do not take the same operations, the peaks alone are
drawn out.

Counted are the tensors of the pass itself, on whatever device, and the copy of its input that a
convolution on a CPU makes in a layout of its own (oneDNN); not the model, which was there before,
nor what other kernels need for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "Footprint",
    "count_live_bytes",
    "measure_footprint",
]

_SIZES = (2, 4)


@dataclass(frozen=True)
class Footprint:
    """The bytes of a pass after each of its operations, as lines over the batch size.

    Attributes:
        fixed: What does not grow with the batch.
        by_example: What does, for each example.
    """

    fixed: tuple[float, ...]
    by_example: tuple[float, ...]

    def peak_bytes(self, batch_size: int) -> int:
        """Computes the greatest sum for a batch of this size."""
        sums = (g + a * batch_size for g, a in zip(self.fixed, self.by_example, strict=True))
        return max(0, round(max(sums, default=0)))


def measure_footprint(run: Callable[[int], object]) -> Footprint:
    """Measures a pass.

    Args:
        run: Runs it over so many examples; what it returns is alive to the end of it.
    """
    run(_SIZES[0])  # what is made once and kept, such as a library's own plans, is not the pass's
    few, more = (count_live_bytes(partial(run, size)) for size in _SIZES)
    if len(few) != len(more):
        few, more = [max(few)], [max(more)]
    step = _SIZES[1] - _SIZES[0]
    by_example = [(after - before) / step for before, after in zip(few, more, strict=True)]
    fixed = [before - _SIZES[0] * a for before, a in zip(few, by_example, strict=True)]
    return Footprint(tuple(fixed), tuple(by_example))


def count_live_bytes(action: Callable[[], object]) -> list[int]:
    """Counts, after each operation of an action, the bytes of tensors it made that still live."""
    with _Counter() as counter:
        action()
    return counter.live_after or [0]


class _Counter(TorchDispatchMode):
    """Counts the bytes of storages made inside the block that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live_after: list[int] = []
        self._live = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._note(value, is_new=False)
        outputs = func(*args, **(kwargs or {}))
        for value in tree_leaves(outputs):
            self._note(value, is_new=True)
        self.live_after.append(self._live + _copied_inside(func, args))
        return outputs

    def _note(self, value: object, *, is_new: bool) -> None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        num_bytes = storage.nbytes() if is_new else 0
        self._live += num_bytes

        def forget(_: object) -> None:
            self._live -= num_bytes
            del self._known[key]

        # torch keeps the Python object of a storage for as long as the storage itself.
        self._known[key] = weakref.ref(storage, forget)


def _copied_inside(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    if func is not torch.ops.aten.convolution.default:
        return 0
    inputs: Tensor = args[0]
    return inputs.numel() * inputs.element_size() if inputs.device.type == "cpu" else 0
