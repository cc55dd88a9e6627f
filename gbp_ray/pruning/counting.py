"""One layer's scores on this rank as they compete, read where they lie: on the host or on a GPU.

Weights pruned before compete as minus infinity, those that a pattern protects as plus infinity.
Both are filled in chunk by chunk as the scores are read, so that there is never a copy of them all.
On the host NumPy does the counting, several times as fast as torch there; on a GPU torch does, and
a few kilobytes of counts come back instead of all scores.

To be counted digit by digit, scores become integers of the same order, their keys: the bits of a
float, changed so that negative ones come first; both zeros become one.

Shape suffixes: L = a rank's scores of one layer, flat; K = those whose keys are in question.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DIGIT_BITS", "Scan", "ScoreView", "as_score_view", "from_key"]

DIGIT_BITS = 8
_NUM_DIGITS = 2**DIGIT_BITS
_CHUNK = 2**16  # stays in the cache of a core
_DEVICE_CHUNK = 2**25  # keeps a GPU busy, and temporary tensors small compared with the scores


@dataclass(frozen=True)
class Scan:
    """Counts of one pass over the scores around a low and a high value.

    Attributes:
        counts: Scores below the low value, up to it, below the high value, up to it.
        inside: Keys (K,) of those strictly between; None where they are too many to keep.
    """

    counts: tuple[int, int, int, int]
    inside: Any


class ScoreView(ABC):
    """The scores of a layer's slice, float16, float32 or float64, compared as they are.

    Attributes:
        size: How many there are.
        dtype: As NumPy names it.
        num_pruned: How many of them were pruned before.
        num_exempt: How many are protected.
    """

    _library: Any
    """NumPy or torch: the same functions under the same names."""

    def __init__(self, scores_L: Any, kept_L: Any = None, exempt_L: Any = None) -> None:
        count = self._library.count_nonzero
        self.size = len(scores_L)
        self.dtype = np.dtype(str(scores_L.dtype).removeprefix("torch."))
        self.num_pruned = 0 if kept_L is None else self.size - int(count(kept_L))
        self.num_exempt = 0 if exempt_L is None else int(count(exempt_L))
        self._scores_L, self._exempt_L = scores_L, exempt_L
        self._kept_L = kept_L if self.num_pruned else None

    def scan(self, low: float, high: float, room: int) -> Scan:
        """Counts around two values; keeps those strictly between, if there are at most `room`."""
        count = self._library.count_nonzero
        num_above = at_low = at_high = num_inside = 0
        kept = [self._to_keys(self._scores_L[:0])]
        for _, chunk in self._chunks():
            is_inside = chunk > low
            num_above += count(is_inside)
            at_low += count(chunk == low)
            at_high += count(chunk == high)
            is_inside &= chunk < high
            inside = chunk[is_inside]
            num_inside += len(inside)
            if num_inside <= room:
                kept.append(self._to_keys(inside))
            else:
                kept.clear()
        to_low = self.size - int(num_above)
        below_high = to_low + num_inside
        to_high = below_high + (int(at_high) if low < high else 0)
        keys = self._library.concatenate(kept) if num_inside <= room else None
        return Scan((to_low - int(at_low), to_low, below_high, to_high), keys)

    def count_digits(
        self, prefix: int, shift: int, inside: Any, ends: tuple[float, float] | None
    ) -> np.ndarray:
        """Counts the keys that begin with a prefix by their next digit, int64 (256,).

        Args:
            shift: Bits after that digit.
            inside: The keys as a scan left them; None to make them of all scores again.
            ends: Then, only those strictly between these two are counted.
        """
        counts = np.zeros(_NUM_DIGITS, dtype=np.int64)
        for keys in (inside,) if inside is not None else self._keys(ends):
            counts += self._histogram(keys >> shift, prefix, shift)
        return counts

    def count_finite(self) -> int:
        """Counts those that are neither NaN nor infinite."""
        return self._count(self._library.isfinite)

    def count_equal(self, value: float) -> int:
        """Counts those equal to a value."""
        return self._count(lambda chunk: chunk == value)

    def write_mask(self, threshold: float, num_equal: int | None, kept_L: Tensor) -> None:
        """Writes into `kept_L`, bool where the scores lie, which weights stay.

        Args:
            threshold: All scores below it go.
            num_equal: So many of those equal to it go, the first ones; None for all.
        """
        into, left = self._native(kept_L), num_equal
        for start, chunk in self._chunks():
            stays = into[start : start + len(chunk)]
            if left == 0:
                self._library.greater_equal(chunk, threshold, out=stays)
                continue
            self._library.greater(chunk, threshold, out=stays)
            if left is not None:
                equal = self._positions(chunk == threshold)
                stays[equal[left:]] = True
                left = max(left - len(equal), 0)

    def filled(self) -> Tensor:
        """Copies the scores as they compete, (L,)."""
        parts = [torch.as_tensor(chunk).clone() for _, chunk in self._chunks()]
        return torch.cat(parts or [torch.as_tensor(self._scores_L[:0])])

    def protect_top_n(self, n: int, m: int, shape: tuple[int, ...], dim: int) -> ScoreView:
        """Protects the n best of each m neighbours along an axis, but none that was pruned before.

        Args:
            shape: Of the layer; the slice holds whole rows of it.
        """
        exempt_L = self._library.zeros_like(self._scores_L, dtype=bool)
        for rows in _whole_rows(self.size, shape, dim, self._chunk_size):
            grouped = self._look(rows).reshape(-1, *shape[1:])
            grouped = self._library.moveaxis(grouped, dim, -1)
            # Pruned weights sort first, so they fill the m - n places a group has to lose.
            order = self._argsort(grouped.reshape(-1, m))
            is_best = self._argsort(order).reshape(grouped.shape) >= m - n
            exempt_L[rows] = self._library.moveaxis(is_best, -1, dim).reshape(-1)
        if self._kept_L is not None:
            exempt_L &= self._kept_L
        return type(self)(self._scores_L, self._kept_L, exempt_L)

    @abstractmethod
    def draw(self, places: np.ndarray) -> np.ndarray:
        """Returns the scores at some positions."""

    @property
    @abstractmethod
    def _chunk_size(self) -> int: ...

    @abstractmethod
    def _look(self, places: Any) -> Any: ...

    @abstractmethod
    def _to_keys(self, values: Any) -> Any: ...

    @abstractmethod
    def _histogram(self, keys: Any, prefix: int, shift: int) -> np.ndarray: ...

    @abstractmethod
    def _argsort(self, values: Any) -> Any: ...

    @abstractmethod
    def _positions(self, is_one: Any) -> Any: ...

    @abstractmethod
    def _native(self, tensor: Tensor) -> Any: ...

    def _chunks(self) -> Iterator[tuple[int, Any]]:
        for start in range(0, self.size, self._chunk_size):
            yield start, self._look(slice(start, start + self._chunk_size))

    def _keys(self, ends: tuple[float, float] | None) -> Iterator[Any]:
        for _, chunk in self._chunks():
            if ends is not None:
                chunk = chunk[(chunk > ends[0]) & (chunk < ends[1])]
            yield self._to_keys(chunk)

    def _count(self, test: Callable[[Any], Any]) -> int:
        return int(sum(self._library.count_nonzero(test(chunk)) for _, chunk in self._chunks()))


def as_score_view(scores_L: np.ndarray | Tensor, kept_L: Tensor | None = None) -> ScoreView:
    """Views a slice's scores where they lie.

    Args:
        kept_L: False where pruned before, on the same device; without it nothing was.
    """
    if isinstance(scores_L, np.ndarray):
        scores_L = torch.from_numpy(scores_L)
    if scores_L.device.type != "cpu":
        return _OnDevice(scores_L, kept_L)
    return _OnHost(scores_L.numpy(), None if kept_L is None else kept_L.numpy())


def from_key(key: int, dtype: np.dtype) -> float:
    """Converts an unsigned key, as its digits spell it, back to the float."""
    top = dtype.itemsize * 8 - 1
    bits = key ^ (1 << top) if key >> top else ~key & ((1 << (top + 1)) - 1)
    return float(np.array([bits], dtype=f"u{dtype.itemsize}").view(dtype)[0])


def _whole_rows(size: int, shape: tuple[int, ...], dim: int, chunk: int) -> Iterator[slice]:
    """Cuts a slice of a layer where rows end, or not at all if groups run through all rows."""
    row = math.prod(shape[1:])
    step = max(size, 1) if dim == 0 else max(chunk // row, 1) * row
    for start in range(0, size, step):
        yield slice(start, start + step)


# -- on the host -----------------------------------------------------------------------------------


class _OnHost(ScoreView):
    _library = np

    def draw(self, places: np.ndarray) -> np.ndarray:
        return self._look(places)

    @property
    def _chunk_size(self) -> int:
        return _CHUNK

    def _look(self, places: np.ndarray | slice) -> np.ndarray:
        seen: np.ndarray = self._scores_L[places]
        # Of a NaN and a number these two take the number.
        if self._kept_L is not None:
            seen = np.fmin(seen, _infinities(self._kept_L[places], self.dtype))
        if self._exempt_L is not None:
            seen = np.fmax(seen, _infinities(self._exempt_L[places], self.dtype))
        return seen

    def _to_keys(self, values: np.ndarray) -> np.ndarray:
        return _host_keys(values)

    def _histogram(self, keys: np.ndarray, prefix: int, shift: int) -> np.ndarray:
        matching = keys[keys >> DIGIT_BITS == prefix]
        digits = (matching & (_NUM_DIGITS - 1)).astype(np.intp)
        return np.bincount(digits, minlength=_NUM_DIGITS)

    def _argsort(self, values: np.ndarray) -> np.ndarray:
        return np.argsort(values, axis=1, kind="stable")

    def _positions(self, is_one: np.ndarray) -> np.ndarray:
        return np.flatnonzero(is_one)

    def _native(self, tensor: Tensor) -> np.ndarray:
        return tensor.numpy()


def _infinities(is_positive: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns plus infinity where true, minus infinity elsewhere.

    Made from bits: `np.where` takes nine times as long on random masks, which mislead the branch
    prediction.
    """
    unsigned = np.dtype(f"u{dtype.itemsize}")
    bits = is_positive.astype(unsigned)
    bits <<= unsigned.type(8 * dtype.itemsize - 1)
    bits ^= np.array(-np.inf, dtype).view(unsigned)
    return bits.view(dtype)


def _host_keys(values: np.ndarray) -> np.ndarray:
    """Converts floats to unsigned keys of their width."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    top = unsigned.itemsize * 8 - 1
    bits = (values + values.dtype.type(0)).view(unsigned)  # -0.0 + 0.0 is 0.0
    # Negative floats are ordered backwards: all their bits flip, of the others only the sign.
    return bits ^ ((unsigned.type(0) - (bits >> top)) | unsigned.type(1 << top))


# -- on a GPU --------------------------------------------------------------------------------------


class _OnDevice(ScoreView):
    _library = torch

    def draw(self, places: np.ndarray) -> np.ndarray:
        return self._look(torch.from_numpy(places).to(self._scores_L.device)).cpu().numpy()

    @property
    def _chunk_size(self) -> int:
        return _DEVICE_CHUNK

    def _look(self, places: Tensor | slice) -> Tensor:
        seen: Tensor = self._scores_L[places]
        if self._kept_L is not None:
            seen = seen.masked_fill(~self._kept_L[places], -torch.inf)
        if self._exempt_L is not None:
            seen = seen.masked_fill(self._exempt_L[places], torch.inf)
        return seen

    def _to_keys(self, values: Tensor) -> Tensor:
        # Signed keys in int64, half a range lower: torch counts no unsigned integers.
        top = 8 * values.element_size() - 1
        whole = {16: torch.int16, 32: torch.int32, 64: torch.int64}[top + 1]
        bits = (values + 0.0).view(whole).to(torch.int64)
        return bits ^ ((bits >> 63) & ((1 << top) - 1))

    def _histogram(self, keys: Tensor, prefix: int, shift: int) -> np.ndarray:
        num_bits = 8 * self.dtype.itemsize
        if shift == num_bits - DIGIT_BITS:
            keys = keys ^ (_NUM_DIGITS >> 1)  # signed keys, but unsigned digits
        else:
            offset = 1 << (num_bits - 1 - shift - DIGIT_BITS)
            keys = keys[keys >> DIGIT_BITS == prefix - offset]
        return torch.bincount(keys & (_NUM_DIGITS - 1), minlength=_NUM_DIGITS).cpu().numpy()

    def _argsort(self, values: Tensor) -> Tensor:
        return values.argsort(dim=1, stable=True)

    def _positions(self, is_one: Tensor) -> Tensor:
        return is_one.nonzero().flatten()

    def _native(self, tensor: Tensor) -> Tensor:
        return tensor
