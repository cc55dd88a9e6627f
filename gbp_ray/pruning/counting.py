"""One layer's scores on this rank as they compete, read where they lie: on the host or on a GPU.

What was pruned before competes as minus infinity, what a pattern exempts as plus infinity. Both are
put in as the scores are looked at, stretch by stretch, so that there never is a copy of them all.
On the host NumPy does the counting, several times as fast as torch there; on a GPU torch does, and
a few kilobytes of counts come back instead of all scores.

To be counted digit by digit scores become integers of the same order, their keys: the bits of a
float, turned so that negative ones come first; both zeros become one.

Shape suffixes: L = a rank's scores of one layer, flat; K = those whose keys are in question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "DIGIT_BITS",
    "Scan",
    "ScoreView",
    "as_score_view",
    "from_key",
]

DIGIT_BITS = 8
_NUM_DIGITS = 2**DIGIT_BITS
_CHUNK = 2**16  # stays in the cache of a core
_DEVICE_CHUNK = 2**25  # keeps a GPU busy, and what is made on the way small beside the scores


@dataclass(frozen=True)
class Scan:
    """What one pass found: how many scores lie below each of two values, and who lies between.

    Attributes:
        counts: Scores below the low value, up to it, below the high value, up to it.
        inside: Keys (K,) of those strictly between; None where they are too many to keep.
    """

    counts: tuple[int, int, int, int]
    inside: Any


class ScoreView(Protocol):
    """The scores of a layer's slice, float16, float32 or float64, compared as they are.

    Attributes:
        size: How many there are.
        dtype: As NumPy names it.
        num_pruned: How many of them were pruned before.
        num_exempt: How many are exempt.
    """

    size: int
    dtype: np.dtype
    num_pruned: int
    num_exempt: int

    def draw(self, places: np.ndarray) -> np.ndarray:
        """Takes the scores at some places."""

    def scan(self, low: float, high: float, room: int) -> Scan:
        """Counts around two values; keeps those strictly between, if there are at most `room`."""

    def count_digits(
        self, prefix: int, shift: int, inside: Any, ends: tuple[float, float] | None
    ) -> np.ndarray:
        """Counts the keys that begin like a prefix by their next digit, int64 (256,).

        Args:
            shift: Bits behind that digit.
            inside: The keys as a scan left them; None to make them of all scores again.
            ends: Then, only those strictly between these two are looked at.
        """

    def count_finite(self) -> int:
        """Counts those that are neither NaN nor infinite."""

    def count_equal(self, value: float) -> int:
        """Counts those equal to a value."""

    def write_mask(self, threshold: float, num_equal: int | None, kept_L: Tensor) -> None:
        """Writes into `kept_L`, bool where the scores lie, who stays when the lowest go.

        Args:
            threshold: All scores below it go.
            num_equal: So many of those equal to it go, the first ones; None for all.
        """

    def protect_top_n(self, n: int, m: int, shape: tuple[int, ...], dim: int) -> ScoreView:
        """Exempts the n best of each m neighbours along an axis, but none that was pruned before.

        Args:
            shape: Of the layer's rows, of which the slice holds whole ones.
        """


def as_score_view(scores_L: np.ndarray | Tensor, kept_L: Tensor | None = None) -> ScoreView:
    """Lets a slice compete where it lies.

    Args:
        kept_L: False where pruned before, on the same device; without it nothing was.
    """
    if isinstance(scores_L, np.ndarray):
        scores_L = torch.from_numpy(scores_L)
    if scores_L.device.type != "cpu":
        return _OnDevice(scores_L, kept_L)
    return _OnHost(scores_L.numpy(), None if kept_L is None else kept_L.numpy())


def from_key(key: int, dtype: np.dtype) -> float:
    """Leads from an unsigned key, as its digits spell it, back to the float."""
    top = dtype.itemsize * 8 - 1
    bits = key ^ (1 << top) if key >> top else ~key & ((1 << (top + 1)) - 1)
    return float(np.array([bits], dtype=f"u{dtype.itemsize}").view(dtype)[0])


# -- on the host -----------------------------------------------------------------------------------


class _OnHost:
    def __init__(
        self,
        scores_L: np.ndarray,
        kept_L: np.ndarray | None = None,
        exempt_L: np.ndarray | None = None,
    ) -> None:
        self.size, self.dtype = scores_L.size, scores_L.dtype
        self.num_pruned = 0 if kept_L is None else self.size - int(np.count_nonzero(kept_L))
        self.num_exempt = 0 if exempt_L is None else int(np.count_nonzero(exempt_L))
        self._scores_L, self._exempt_L = scores_L, exempt_L
        self._kept_L = kept_L if self.num_pruned else None

    def draw(self, places: np.ndarray | slice) -> np.ndarray:
        seen: np.ndarray = self._scores_L[places]
        # Of a NaN and a number these two take the number.
        if self._kept_L is not None:
            seen = np.fmin(seen, _infinities(self._kept_L[places], self.dtype))
        if self._exempt_L is not None:
            seen = np.fmax(seen, _infinities(self._exempt_L[places], self.dtype))
        return seen

    def scan(self, low: float, high: float, room: int) -> Scan:
        low, high = self.dtype.type(low), self.dtype.type(high)
        below_low = to_low = num_inside = at_high = 0
        kept = [_host_keys(self._scores_L[:0])]
        for _, chunk in self._chunks():
            below_low += int(np.count_nonzero(chunk < low))
            is_inside = chunk > low
            to_low += chunk.size - int(np.count_nonzero(is_inside))
            is_inside &= chunk < high
            inside = chunk[is_inside]
            num_inside += inside.size
            if num_inside <= room:
                kept.append(_host_keys(inside))
            else:
                kept.clear()
            at_high += int(np.count_nonzero(chunk == high))
        keys = np.concatenate(kept) if num_inside <= room else None
        return Scan(_counts(below_low, to_low, num_inside, at_high, low < high), keys)

    def count_digits(
        self,
        prefix: int,
        shift: int,
        inside: np.ndarray | None,
        ends: tuple[float, float] | None,
    ) -> np.ndarray:
        counts = np.zeros(_NUM_DIGITS, dtype=np.int64)
        for keys in (inside,) if inside is not None else self._keys(ends):
            above = keys >> shift
            matching = above[above >> DIGIT_BITS == prefix]
            digits = (matching & (_NUM_DIGITS - 1)).astype(np.intp)
            counts += np.bincount(digits, minlength=_NUM_DIGITS)
        return counts

    def count_finite(self) -> int:
        return sum(int(np.count_nonzero(np.isfinite(chunk))) for _, chunk in self._chunks())

    def count_equal(self, value: float) -> int:
        return sum(int(np.count_nonzero(chunk == value)) for _, chunk in self._chunks())

    def write_mask(self, threshold: float, num_equal: int | None, kept_L: Tensor) -> None:
        into, left = kept_L.numpy(), num_equal
        for start, chunk in self._chunks():
            stays = into[start : start + chunk.size]
            if left == 0:
                np.greater_equal(chunk, threshold, out=stays)
                continue
            np.greater(chunk, threshold, out=stays)
            if left is not None:
                equal = np.flatnonzero(chunk == threshold)
                stays[equal[left:]] = True
                left = max(left - equal.size, 0)

    def protect_top_n(self, n: int, m: int, shape: tuple[int, ...], dim: int) -> _OnHost:
        exempt_L = np.empty(self.size, dtype=bool)
        for stretch in _whole_rows(self.size, shape, dim, _CHUNK):
            grouped = np.moveaxis(self.draw(stretch).reshape(-1, *shape[1:]), dim, -1)
            # Pruned weights sort first, so they fill the m - n places a group has to lose.
            order = np.argsort(grouped.reshape(-1, m), axis=1, kind="stable")
            rank_in_group = np.argsort(order, axis=1, kind="stable").reshape(grouped.shape)
            exempt_L[stretch] = np.moveaxis(rank_in_group >= m - n, -1, dim).reshape(-1)
        if self._kept_L is not None:
            exempt_L &= self._kept_L
        return _OnHost(self._scores_L, self._kept_L, exempt_L)

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.size, _CHUNK):
            yield start, self.draw(slice(start, start + _CHUNK))

    def _keys(self, ends: tuple[float, float] | None) -> Iterator[np.ndarray]:
        for _, chunk in self._chunks():
            if ends is not None:
                low, high = (self.dtype.type(end) for end in ends)
                chunk = chunk[(chunk > low) & (chunk < high)]
            yield _host_keys(chunk)


def _infinities(is_positive: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Makes plus infinity where true, minus infinity elsewhere.

    Made of bits, without choosing: `np.where` takes nine times as long, as what random masks will
    say next cannot be foreseen.
    """
    unsigned = np.dtype(f"u{dtype.itemsize}")
    bits = is_positive.astype(unsigned)
    bits <<= unsigned.type(8 * dtype.itemsize - 1)
    bits ^= np.array(-np.inf, dtype).view(unsigned)
    return bits.view(dtype)


def _host_keys(values: np.ndarray) -> np.ndarray:
    """Makes unsigned keys, as wide as the floats."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    top = unsigned.itemsize * 8 - 1
    bits = (values + values.dtype.type(0)).view(unsigned)  # -0.0 + 0.0 is 0.0
    # Negative floats are ordered backwards: all their bits turn, of the others the sign alone.
    return bits ^ ((unsigned.type(0) - (bits >> top)) | unsigned.type(1 << top))


# -- on a GPU --------------------------------------------------------------------------------------


class _OnDevice:
    """The same in torch; every number that comes back waits for the GPU, so they are few."""

    def __init__(
        self, scores_L: Tensor, kept_L: Tensor | None = None, exempt_L: Tensor | None = None
    ) -> None:
        self.size = scores_L.numel()
        self.dtype = np.dtype(str(scores_L.dtype).removeprefix("torch."))
        self.num_pruned = 0 if kept_L is None else self.size - int(torch.count_nonzero(kept_L))
        self.num_exempt = 0 if exempt_L is None else int(torch.count_nonzero(exempt_L))
        self._scores_L, self._exempt_L = scores_L, exempt_L
        self._kept_L = kept_L if self.num_pruned else None

    def draw(self, places: np.ndarray) -> np.ndarray:
        return self._look(torch.from_numpy(places).to(self._scores_L.device)).cpu().numpy()

    def scan(self, low: float, high: float, room: int) -> Scan:
        found = torch.zeros(3, dtype=torch.int64, device=self._scores_L.device)
        num_inside = 0
        kept = [self._scores_L[:0]]
        for _, chunk in self._chunks():
            is_inside = chunk > low
            found[0] += torch.count_nonzero(is_inside)
            found[1] += torch.count_nonzero(chunk == low)
            found[2] += torch.count_nonzero(chunk == high)
            is_inside &= chunk < high
            inside = chunk[is_inside]
            num_inside += inside.numel()
            if num_inside <= room:
                kept.append(inside)
            else:
                kept.clear()
        num_above, at_low, at_high = found.tolist()
        to_low = self.size - num_above
        keys = _device_keys(torch.cat(kept)) if num_inside <= room else None
        return Scan(_counts(to_low - at_low, to_low, num_inside, at_high, low < high), keys)

    def count_digits(
        self, prefix: int, shift: int, inside: Tensor | None, ends: tuple[float, float] | None
    ) -> np.ndarray:
        num_bits = 8 * self.dtype.itemsize
        is_first = shift == num_bits - DIGIT_BITS
        counts = torch.zeros(_NUM_DIGITS, dtype=torch.int64, device=self._scores_L.device)
        for keys in (inside,) if inside is not None else self._keys(ends):
            above = keys >> shift
            if is_first:
                above ^= _NUM_DIGITS >> 1  # signed keys, but unsigned digits
            else:
                offset = 1 << (num_bits - 1 - shift - DIGIT_BITS)
                above = above[above >> DIGIT_BITS == prefix - offset]
            counts += torch.bincount(above & (_NUM_DIGITS - 1), minlength=_NUM_DIGITS)
        return counts.cpu().numpy()

    def count_finite(self) -> int:
        return self._count(torch.isfinite)

    def count_equal(self, value: float) -> int:
        return self._count(lambda chunk: chunk == value)

    def write_mask(self, threshold: float, num_equal: int | None, kept_L: Tensor) -> None:
        left = num_equal
        for start, chunk in self._chunks():
            stays = kept_L[start : start + chunk.numel()]
            if left == 0:
                torch.ge(chunk, threshold, out=stays)
                continue
            torch.gt(chunk, threshold, out=stays)
            if left is not None:
                equal = (chunk == threshold).nonzero().flatten()
                stays[equal[left:]] = True
                left = max(left - equal.numel(), 0)

    def protect_top_n(self, n: int, m: int, shape: tuple[int, ...], dim: int) -> _OnDevice:
        exempt_L = torch.empty(self.size, dtype=torch.bool, device=self._scores_L.device)
        for stretch in _whole_rows(self.size, shape, dim, _DEVICE_CHUNK):
            grouped = self._look(stretch).view(-1, *shape[1:]).movedim(dim, -1)
            order = grouped.reshape(-1, m).argsort(dim=1, stable=True)
            rank_in_group = order.argsort(dim=1, stable=True).view(grouped.shape)
            exempt_L[stretch] = (rank_in_group >= m - n).movedim(-1, dim).reshape(-1)
        if self._kept_L is not None:
            exempt_L &= self._kept_L
        return _OnDevice(self._scores_L, self._kept_L, exempt_L)

    def _look(self, places: Tensor | slice) -> Tensor:
        seen = self._scores_L[places]
        if self._kept_L is not None:
            seen = seen.masked_fill(~self._kept_L[places], -torch.inf)
        if self._exempt_L is not None:
            seen = seen.masked_fill(self._exempt_L[places], torch.inf)
        return seen

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.size, _DEVICE_CHUNK):
            yield start, self._look(slice(start, start + _DEVICE_CHUNK))

    def _keys(self, ends: tuple[float, float] | None) -> Iterator[Tensor]:
        for _, chunk in self._chunks():
            if ends is not None:
                chunk = chunk[(chunk > ends[0]) & (chunk < ends[1])]
            yield _device_keys(chunk)

    def _count(self, is_one: Any) -> int:
        total = torch.zeros((), dtype=torch.int64, device=self._scores_L.device)
        for _, chunk in self._chunks():
            total += torch.count_nonzero(is_one(chunk))
        return int(total)


def _device_keys(values: Tensor) -> Tensor:
    """Makes signed keys in int64: torch counts no unsigned integers. They lack the offset."""
    top = 8 * values.element_size() - 1
    whole = {16: torch.int16, 32: torch.int32, 64: torch.int64}[top + 1]
    bits = (values + 0.0).view(whole).to(torch.int64)
    return bits ^ ((bits >> 63) & ((1 << top) - 1))


# -- both ------------------------------------------------------------------------------------------


def _whole_rows(size: int, shape: tuple[int, ...], dim: int, chunk: int) -> Iterator[slice]:
    """Cuts a slice of a layer where rows end, or not at all if groups run through all rows."""
    row = math.prod(shape[1:])
    step = max(size, 1) if dim == 0 else max(chunk // row, 1) * row
    for start in range(0, size, step):
        yield slice(start, start + step)


def _counts(
    below_low: int, to_low: int, num_inside: int, at_high: int, is_stretch: bool
) -> tuple[int, int, int, int]:
    below_high = to_low + num_inside
    return below_low, to_low, below_high, below_high + (at_high if is_stretch else 0)
