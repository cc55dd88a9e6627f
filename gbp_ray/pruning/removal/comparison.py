"""Compares a masked network with the one without its removed units, output by output.

Both get the same real batch. Outputs of the network are compared element by element. Every layer
that holds parameters is compared by the sum and the sum of squares of its outputs, which do not
depend on channels that are zero: so a fault is found where it arises, even if a later layer hides
it behind a small factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gbp_ray.distributed.ranks import isolated
from gbp_ray.errors import PruneError, in_one_line
from gbp_ray.pruning.removal.caches import Run
from gbp_ray.workloads.batch import logits_of, tensors_in
from gbp_ray.workloads.contract import in_mode

__all__ = [
    "Fault",
    "Passed",
    "check_same",
    "compare",
    "observe",
    "observe_training",
    "tolerance_of",
]

_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-10}
_DEFAULT_TOLERANCE = 1e-5
_MOST_TOLERATED = 0.05
_MOST_ROUNDING = 1e-3
"""So much may come of rounding in float32, where many layers pass it on."""
_PART = 2**20
"""Elements that are compared at a time."""


@dataclass(frozen=True)
class _Event:
    """One call of a layer that holds parameters.

    Attributes:
        moments: Of each tensor of its outputs: number of elements, sum, sum of squares.
        tolerance: As `tolerance_of`.
    """

    path: str
    shapes: tuple[tuple[int, ...], ...]
    moments: tuple[tuple[int, float, float], ...]
    tolerance: float

    def differs(self, other: _Event) -> bool:
        """Returns True if outputs of the other call differ by more than rounding."""
        if self.path != other.path or len(self.moments) != len(other.moments):
            return True
        # Layers inside may have more rounding than the outputs, and squares have twice as much.
        bound = min(20 * max(self.tolerance, other.tolerance), _MOST_TOLERATED)
        for (number, total, squares), (_, other_total, other_squares) in zip(
            self.moments, other.moments, strict=True
        ):
            if not (math.isfinite(squares) and math.isfinite(other_squares)):
                if math.isfinite(squares) != math.isfinite(other_squares):
                    return True
                continue
            scale = max(squares, other_squares)
            if abs(squares - other_squares) > bound * scale:
                return True
            if abs(total - other_total) > bound * math.sqrt(number * scale):
                return True
        return False


@dataclass
class Passed:
    """What a pass through a network showed.

    Attributes:
        outputs: The tensors of the logits, or of all outputs that have none.
        events: Calls of layers with parameters, in order of execution.
        entered: Paths of the modules that were called since the last event.
        open: Paths of the modules whose call has not returned.
        called: Paths of all modules that were called.
        error: What ended it before its end.
        least_tolerance: Taken instead of a data type's where that is smaller.
    """

    outputs: list[Tensor] = field(default_factory=list)
    events: list[_Event] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    error: Exception | None = None
    least_tolerance: float = 0.0


@dataclass(frozen=True)
class Fault:
    """Where a network without removed units first differs from the masked one.

    Attributes:
        num_agreed: Calls of layers with parameters before it that agree.
        num_entered: Calls of modules after those, where an exception ended the pass; else None.
        path: The layer, "" for the network as a whole.
        what: In words.
        nearby: Paths of the modules that may be at fault, the likeliest first.
        is_soft: A layer's outputs have other shapes, so only their sums were compared.
        may_be_rounding: No layer was seen to differ, and float32 outputs do by less than 1e-3.
        traces: What else shows a change in what the network computes up to the fault.
    """

    num_agreed: int
    num_entered: int | None
    path: str
    what: str
    nearby: tuple[str, ...]
    is_soft: bool = False
    may_be_rounding: bool = False
    traces: tuple[object, ...] = ()

    def is_before(self, other: Fault) -> bool:
        """Returns True if a pass with the other fault got further.

        To end in a difference where there was an exception is not further.
        """
        if self.num_agreed != other.num_agreed:
            return self.num_agreed < other.num_agreed
        if self.num_entered is None or other.num_entered is None:
            return False
        return self.num_entered < other.num_entered

    def is_another(self, other: Fault) -> bool:
        """Returns True if the network computed something else up to the other fault."""
        return (self.num_agreed, self.num_entered, self.what, self.traces) != (
            *(other.num_agreed, other.num_entered, other.what, other.traces),
        )


class _DivergedError(Exception):
    """Ends a pass whose outcome is known."""


def observe(
    model: nn.Module,
    run: Run,
    masked: Passed | None = None,
    *,
    is_strict: bool = False,
    least_tolerance: float = 0.0,
) -> Passed:
    """Passes the batch through a network in eval mode; leaves buffers and random numbers alone.

    Args:
        masked: What the masked network showed: the pass then ends at the first difference, and an
            exception in it is caught.
        is_strict: Compares layers whose outputs have other shapes, too.
        least_tolerance: Of `Passed`; `masked` brings its own along.
    """
    if masked is not None:
        least_tolerance = masked.least_tolerance
    watch = _Watch(model, masked, is_strict, least_tolerance)
    try:
        _pass(model, run, watch, is_training=False)
    except _DivergedError:
        pass
    except Exception as error:
        if masked is None:
            raise
        watch.passed.error = error
    return watch.passed


def observe_training(model: nn.Module, run: Run) -> Passed:
    """Passes the batch in training mode, and catches the exception that may end it."""
    watch = _Watch(model, None, is_strict=False)
    try:
        _pass(model, run, watch, is_training=True)
    except Exception as error:  # noqa: BLE001 - a network may raise anything
        watch.passed.error = error
    return watch.passed


def _pass(model: nn.Module, run: Run, watch: _Watch, *, is_training: bool) -> None:
    with in_mode(model, is_training=is_training), isolated(model, 0), torch.no_grad():
        with _in_full_precision(), watch.hooked():
            outputs = logits_of(run(model))
        # Outputs may be buffers of the network.
        watch.passed.outputs = [tensor.detach().clone() for tensor in tensors_in(outputs)]


def compare(masked: Passed, compacted: Passed, *, is_strict: bool = False) -> float | Fault:
    """Compares two passes.

    Args:
        is_strict: Layers whose outputs have other shapes must agree in sums and sums of squares,
            too. Few layers of correct networks do not: such as a layer that adds one to what a
            removed channel has.

    Returns:
        The largest difference of outputs over their greatest magnitude; or the first fault.
    """
    pairs = list(zip(masked.events, compacted.events, strict=False))
    for number, (one, other) in enumerate(pairs):
        if one.differs(other) and (is_strict or one.shapes == other.shapes):
            what = "its outputs differ from those of the masked network"
            fault = _fault(number, one.path, what, masked, compacted, [other.path])
            is_soft = one.shapes != other.shapes
            return replace(fault, is_soft=is_soft, traces=(other.path, other.shapes, other.moments))
    number = len(pairs)
    if compacted.error is not None:
        path = compacted.open[-1] if compacted.open else ""
        what = f"it fails with {in_one_line(compacted.error)}"
        return _fault(number, path, what, masked, compacted, [])
    if len(masked.events) != len(compacted.events):
        path = masked.events[number].path if number < len(masked.events) else ""
        return _fault(number, path, "it is not called as often as before", masked, compacted, [])
    found = _difference(masked.outputs, compacted.outputs, masked.least_tolerance)
    if isinstance(found, float):
        return found
    what, may_be_rounding = found
    fault = _fault(number, "", what, masked, compacted, [])
    return replace(fault, may_be_rounding=may_be_rounding)


def check_same(masked: Passed, compacted: Passed) -> float:
    """Compares two passes; returns the largest difference of outputs over their magnitude.

    Raises:
        PruneError: It is above the tolerance, or a layer differs; names the first such layer.
    """
    found = compare(masked, compacted)
    if isinstance(found, Fault):
        # A layer before it that differs in another shape is the likelier cause.
        strict = compare(masked, compacted, is_strict=True)
        found = strict if isinstance(strict, Fault) else found
        raise PruneError(f"'{found.path or 'the network'}': without its removed units {found.what}")
    return found


def tolerance_of(dtype: torch.dtype) -> float:
    """Returns the largest difference that counts as rounding, against the greatest magnitude."""
    return _TOLERANCES.get(dtype, _DEFAULT_TOLERANCE)


def _fault(
    number: int, path: str, what: str, masked: Passed, compacted: Passed, also: Sequence[str]
) -> Fault:
    """Lists modules near a fault: what ran since the last layer that agreed, and what calls it."""
    ran = [*compacted.open, *compacted.entered, *also]
    if number < len(masked.events):
        ran.append(masked.events[number].path)
    if number:
        ran.append(masked.events[number - 1].path)
    around = {
        place: None for name in [path, *reversed(ran)] for place in (name, *_ancestors_of(name))
    }
    deepest_first = sorted(around, key=lambda place: -_depth(place))
    num_entered = None if compacted.error is None else len(compacted.entered)
    return Fault(number, num_entered, path, what, tuple(deepest_first))


def _ancestors_of(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in reversed(range(len(parts)))]


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _difference(
    masked: Sequence[Tensor], compacted: Sequence[Tensor], least_tolerance: float
) -> float | tuple[str, bool]:
    """Compares outputs.

    Returns:
        The largest difference over the greatest magnitude; or why they differ, and whether it may
        be rounding in float32.
    """
    if len(masked) != len(compacted):
        return f"outputs are {len(compacted)} tensors, and {len(masked)} before", False
    worst = 0.0
    num_compared = 0
    for one, other in zip(masked, compacted, strict=True):
        if one.shape != other.shape:
            # Such as hidden states and caches, which have the removed units.
            if _event("", [one]).differs(_event("", [other])):
                return f"outputs of shape {tuple(one.shape)} differ", False
            continue
        num_compared += 1
        is_real = one.is_floating_point() or one.is_complex()
        bound = max(tolerance_of(one.dtype), least_tolerance) if is_real else 0.0
        found = _relative_difference(one, other)
        worst = max(worst, found)
        if found > bound:
            what = f"outputs differ by {found:.2g} of their greatest magnitude (at most {bound:g})"
            return what, one.dtype == torch.float32 and found < _MOST_ROUNDING
    if not num_compared:
        return "no output has the shape that it had before", False
    return worst


def _relative_difference(one: Tensor, other: Tensor) -> float:
    difference = magnitude = 0.0
    for part, other_part in zip(_wide_parts(one), _wide_parts(other), strict=True):
        finite = torch.isfinite(part)
        if not torch.equal(finite, torch.isfinite(other_part)):
            return math.inf
        if not torch.equal(part[~finite].nan_to_num(), other_part[~finite].nan_to_num()):
            return math.inf
        if finite.any():
            part, other_part = part[finite], other_part[finite]
            difference = max(difference, float((part - other_part).abs().max()))
            magnitude = max(magnitude, float(part.abs().max()))
    if difference == 0.0:
        return 0.0
    return difference / magnitude if magnitude else math.inf


def _wide_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the elements in float64, few at a time: logits may be many."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return (part.to(wide) for part in tensor.detach().flatten().split(_PART))


class _Watch:
    """Records the calls of a network's modules, through hooks."""

    def __init__(
        self,
        model: nn.Module,
        masked: Passed | None,
        is_strict: bool,
        least_tolerance: float = 0.0,
    ) -> None:
        self.passed = Passed(least_tolerance=least_tolerance)
        self._model = model
        self._masked = masked
        self._is_strict = is_strict

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for path, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path)))
            is_event = any(parameter is not None for parameter in module._parameters.values())
            handles.append(module.register_forward_hook(self._leave(path, is_event)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.passed.entered.append(path)
            self.passed.open.append(path)
            self.passed.called.add(path)

        return enter

    def _leave(self, path: str, is_event: bool) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self.passed.open.pop()
            if not is_event:
                return
            number = len(self.passed.events)
            event = _event(path, list(tensors_in(outputs)), self.passed.least_tolerance)
            self.passed.events.append(event)
            if self._masked is not None:
                known = self._masked.events
                if number >= len(known):
                    raise _DivergedError
                is_compared = self._is_strict or known[number].shapes == event.shapes
                if known[number].path != path or (is_compared and known[number].differs(event)):
                    raise _DivergedError
            self.passed.entered.clear()

        return leave


def _event(path: str, tensors: Sequence[Tensor], least_tolerance: float = 0.0) -> _Event:
    moments = []
    for tensor in tensors:
        total: float | complex = 0.0
        squares = 0.0
        for part in _wide_parts(tensor):
            total += complex(part.sum()) if tensor.is_complex() else float(part.sum())
            squares += float(part.abs().square().sum())
        size = abs(total) if isinstance(total, complex) else total
        moments.append((tensor.numel(), size, squares))
    tolerances = [tolerance_of(tensor.dtype) for tensor in tensors]
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    tolerance = max([*tolerances, least_tolerance] if tolerances else [_DEFAULT_TOLERANCE])
    return _Event(path, shapes, tuple(moments), tolerance)


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """Has a GPU compute float32 in float32: TF32 has three digits, and depends on shapes."""
    precision = torch.get_float32_matmul_precision()
    is_short = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = is_short
