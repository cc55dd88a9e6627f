"""Measure the peak memory of a pass on few examples, and predict it for any number.

A pass runs on two and on four examples while every tensor that torch makes is counted, operation by
operation. After the t-th operation g_t + a_t * examples bytes live: gradients do not grow with the
batch, activations do. Both follow from the two runs, and the peak for any batch is the greatest of
these sums. Where the runs differ in their operations, the line goes through their peaks.

Counted are the pass's own tensors, on any device, and the copy of its input that a convolution on a
CPU makes in a layout of its own (oneDNN); not the model, nor the workspace of other kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FEW_MEASURED",
    "MOST_MEASURED",
    "Footprint",
    "count_live_bytes",
    "measure_footprint",
    "measure_stretches",
]

FEW_MEASURED = 2
MOST_MEASURED = 4


@dataclass(frozen=True)
class Footprint:
    """The bytes that live after each operation of a pass.

    Attributes:
        lines: (fixed, for each example) of each operation.
    """

    lines: tuple[tuple[float, float], ...]

    def peak_bytes(self, batch_size: int, known: float = 0, share: float = 1) -> int:
        """Compute the greatest sum for a batch of this size.

        Args:
            known: Left out of what is fixed.
            share: Taken of the rest of it.
        """
        left = ((max(0.0, fixed - known) * share, each) for fixed, each in self.lines)
        return round(max(fixed + each * batch_size for fixed, each in left))

    def plus(self, num_bytes: int) -> Footprint:
        """Return it beside so many bytes that live all along."""
        return Footprint(tuple((fixed + num_bytes, each) for fixed, each in self.lines))


def measure_footprint(run: Callable[[int], object]) -> Footprint:
    """Measure a pass.

    Args:
        run: Runs it over so many examples; its result lives to the end of it. What it makes once
            and keeps should be there before.
    """
    few, more = (count_live_bytes(partial(run, size)) for size in (FEW_MEASURED, MOST_MEASURED))
    if len(few) != len(more):
        few, more = [max(few)], [max(more)]
    return _through(few, more)


def measure_stretches(run: Callable[[int, Callable[[], None]], object]) -> list[Footprint]:
    """Measure a pass as `measure_footprint` does, in stretches.

    Args:
        run: Runs it over so many examples, and calls its second argument where a stretch ends.

    Returns:
        Of each stretch, the last one up to the end of the pass; the first line is what lives where
        it begins, and the last line where it ends.
    """
    few, more = (_count_by_stretch(partial(run, size)) for size in (FEW_MEASURED, MOST_MEASURED))
    found = []
    for one, other in zip(few, more, strict=True):
        if len(one) != len(other):
            one, other = ([live[0], max(live), live[-1]] for live in (one, other))
        found.append(_through(one, other))
    return found


def _through(few: list[int], more: list[int]) -> Footprint:
    """Draw the line through both sizes for each operation."""
    each = [(b - a) / (MOST_MEASURED - FEW_MEASURED) for a, b in zip(few, more, strict=True)]
    return Footprint(tuple((a - FEW_MEASURED * e, e) for a, e in zip(few, each, strict=True)))


def _count_by_stretch(action: Callable[[Callable[[], None]], object]) -> list[list[int]]:
    ends: list[int] = []
    with _Counter() as counter:

        def mark() -> None:
            counter.note_now()
            ends.append(len(counter.live_after))

        counter.note_now()
        action(mark)
        mark()
    starts = [0, *(end - 1 for end in ends)]
    return [counter.live_after[a:b] for a, b in zip(starts, ends, strict=False)]


def count_live_bytes(action: Callable[[], object]) -> list[int]:
    """Count, after each operation of an action, the bytes of tensors it made that still live."""
    with _Counter() as counter:
        action()
    return counter.live_after or [0]


class _Counter(TorchDispatchMode):
    """Count the bytes of storages made inside the block that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live_after: list[int] = []
        self._live = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def note_now(self) -> None:
        """Count what lives between two operations."""
        self.live_after.append(self._live)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors_in((*args, *kwargs.values())):
            self._note(tensor, is_new=False)
        outputs = func(*args, **kwargs)
        for tensor in _tensors_in((outputs,)):
            self._note(tensor, is_new=True)
        self.live_after.append(self._live + _copied_inside(func, args))
        return outputs

    def _note(self, tensor: Tensor, *, is_new: bool) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
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


def _tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    # Operations take and give nothing deeper; a general walk would cost as much as they do.
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _copied_inside(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    is_copied = func is torch.ops.aten.convolution.default and args[0].device.type == "cpu"
    return args[0].nbytes if is_copied else 0
