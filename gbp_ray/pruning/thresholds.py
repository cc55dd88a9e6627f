"""Where the lowest scores end, found by counting, while every rank keeps its own scores.

Scores become integers of the same order, their keys, and the wanted value is found digit by digit:
each rank counts its keys by the next 8 bits, the counts are all-reduced (int64, so exact in any
order), and the digit is the first at which enough are counted. Four such rounds suffice for
float32, eight for float64, at 2 KB per layer and round, whatever the number of weights. `counting`
counts where the scores lie, on the host or on a GPU.

Where scores are many, a sample first brackets the value, and one pass over the scores counts what
lies outside the bracket and keeps the percent or two inside. The sample decides how much is kept,
never the result: a bracket that misses shows in its counts, and all scores are counted. One score
is drawn from each interval of equal length, so no period in the scores misleads it. A rank that
would have to keep more than a sixteenth of its scores keeps none, and reads them again.

Scores are float16, float32 or float64, the same on all ranks, and compared as they are. bfloat16,
which NumPy does not have, is widened to float32 by the caller, which keeps its order. Counts are
int64 throughout: 2^31 weights are no limit.

Shape suffixes: L = a rank's scores of one layer, flat.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.counting import DIGIT_BITS, Scan, ScoreView, as_score_view, from_key

__all__ = ["Cut", "Pool", "exact_threshold", "find_cuts"]

_SAMPLE = 2**17
_LEAST_STRIDE = 64
_MANY = 2**18  # counting fewer scores than this takes milliseconds, without a bracket
_DEVIATIONS = 5.0
_MOST_KEPT = 1 / 16  # of a rank's scores, inside the bracket
_NUM_DIGITS = 2**DIGIT_BITS


@dataclass(frozen=True)
class Pool:
    """Layers, by position, that lose `target` weights together, each from `low` to `high`."""

    layers: tuple[int, ...]
    target: int
    low: tuple[int, ...]
    high: tuple[int, ...]

    def reaches(self, counts: Sequence[int]) -> bool:
        """Returns True if removing so many of each layer, within its bounds, makes the target."""
        bounded = zip(counts, self.low, self.high, strict=True)
        return sum(min(max(int(n), lo), hi) for n, lo, hi in bounded) >= self.target


@dataclass(frozen=True)
class Cut:
    """Where a pool's removals end: a layer's scores below and equal to it, over all ranks."""

    threshold: float
    below: int
    equal: int


def exact_threshold(
    scores_L: np.ndarray | Tensor, k: int, ranks: Ranks | None = None
) -> tuple[float, int]:
    """Finds where the k lowest scores end. Communicates.

    Args:
        scores_L: This rank's scores, without NaN.
        k: 1 <= k <= number of scores over all ranks.

    Returns:
        The k-th lowest score, and how many scores equal to it belong to the k.
    """
    pool = Pool((0,), k, (0,), (2**62,))
    (cut,) = find_cuts([as_score_view(scores_L)], [pool], ranks or Ranks())
    return cut.threshold, k - cut.below


def find_cuts(values: Sequence[ScoreView], pools: Sequence[Pool], ranks: Ranks) -> list[Cut]:
    """Finds the lowest value at which each pool reaches its target. Communicates.

    Args:
        values: This rank's scores by layer, of one dtype, without NaN.
        pools: Each layer in at most one of them; a pool's layers hold enough for its target.

    Returns:
        A cut for each layer of each pool, in the order of the pools.
    """
    searches = [_Search(pool, [values[layer] for layer in pool.layers]) for pool in pools]
    _bracket(searches, ranks)
    _count_digits([search for search in searches if not search.is_done], values, ranks)
    return [cut for search in searches for cut in search.cuts()]


class _Search:
    """The state of one pool: counts below, and the scores among which the value lies."""

    def __init__(self, pool: Pool, values: list[ScoreView]) -> None:
        self.pool, self.values = pool, values
        self.below = np.zeros(len(values), dtype=np.int64)
        self.equal = np.zeros(len(values), dtype=np.int64)
        self.ends: tuple[float, float] | None = None  # the bracket, where one was found
        self.inside: list[Any] = [None] * len(values)  # keys; None: read the scores again
        self.threshold = math.nan
        self.prefix = 0
        self.is_done = False

    def cuts(self) -> list[Cut]:
        counts = zip(self.below.tolist(), self.equal.tolist(), strict=True)
        return [Cut(self.threshold, below, equal) for below, equal in counts]

    def settle(self, threshold: float, below: np.ndarray, equal: np.ndarray) -> None:
        self.threshold, self.below, self.equal, self.is_done = threshold, below, equal, True


# -- the bracket -----------------------------------------------------------------------------------


def _bracket(searches: list[_Search], ranks: Ranks) -> None:
    """Narrows the searches of many scores to those inside a bracket, or settles them outright."""
    sizes = ranks.all_reduce_counts(
        torch.tensor([sum(v.size for v in s.values) for s in searches], dtype=torch.int64)
    )
    many = [
        (search, int(size))
        for search, size in zip(searches, sizes.tolist(), strict=True)
        if size >= _MANY
    ]
    if not many:
        return
    samples = ranks.all_gather_objects([_sample(search, size) for search, size in many])
    found = []
    for number, (search, size) in enumerate(many):
        sample = np.sort(np.concatenate([of_rank[number] for of_rank in samples]))
        low, high = _bracket_ends(sample, search.pool.target / size)
        found.append((search, low, high, _scan_all(search.values, low, high)))
    counts = torch.tensor([scan.counts for *_, scans in found for scan in scans], dtype=torch.int64)
    everywhere = ranks.all_reduce_counts(counts).numpy()
    for search, low, high, scans in found:
        below_low, to_low, below_high, to_high = everywhere[: len(scans)].T
        everywhere = everywhere[len(scans) :]
        reaches = search.pool.reaches
        if reaches(below_low) or not reaches(to_high):
            continue
        if reaches(to_low):
            search.settle(low, below_low, to_low - below_low)
        elif reaches(below_high):
            search.below, search.ends = to_low, (low, high)
            search.inside = [scan.inside for scan in scans]
        else:
            search.settle(high, below_high, to_high - below_high)


def _sample(search: _Search, size: int) -> np.ndarray:
    """Draws a score from each interval of equal length, the same ones in every run."""
    stride = max(_LEAST_STRIDE, size // _SAMPLE)
    random = np.random.default_rng(stride)
    drawn = []
    for values in search.values:
        places = np.arange(0, values.size, stride)
        places += random.integers(stride, size=places.size)
        # The last interval may be short; a draw past its end is dropped, which keeps it fair.
        is_behind = places.size > 0 and places[-1] >= values.size
        drawn.append(values.draw(places[:-1] if is_behind else places))
    return np.concatenate(drawn)


def _bracket_ends(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Picks two values between which the given share of all scores very likely ends."""
    middle = share * sample.size
    slack = _DEVIATIONS * math.sqrt(sample.size * share * max(0.0, 1 - share)) + 2
    first, last = math.floor(middle - slack), math.ceil(middle + slack)
    low = float(sample[first]) if first >= 0 else -math.inf
    return low, float(sample[last]) if last < sample.size else math.inf


def _scan_all(values: list[ScoreView], low: float, high: float) -> list[Scan]:
    room = int(_MOST_KEPT * sum(layer.size for layer in values))
    scans = []
    for layer in values:
        scans.append(layer.scan(low, high, room))
        kept = scans[-1].inside
        room -= 0 if kept is None else len(kept)
    return scans


# -- counting digit by digit -----------------------------------------------------------------------


def _count_digits(searches: list[_Search], values: Sequence[ScoreView], ranks: Ranks) -> None:
    if not searches:
        return
    num_bits = values[0].dtype.itemsize * 8
    for shift in range(num_bits - DIGIT_BITS, -1, -DIGIT_BITS):
        mine = np.stack(
            [
                values.count_digits(search.prefix, shift, inside, search.ends)
                for search in searches
                for values, inside in zip(search.values, search.inside, strict=True)
            ]
        )
        everywhere = ranks.all_reduce_counts(torch.from_numpy(mine)).numpy()
        for search in searches:
            counts = everywhere[: len(search.values)]
            everywhere = everywhere[len(search.values) :]
            up_to = search.below[:, None] + np.cumsum(counts, axis=1)
            # Counts grow with the digit, so bisection finds the first that reaches the target.
            digit = bisect_left(range(_NUM_DIGITS), True, key=partial(_reaches, search.pool, up_to))
            search.prefix = search.prefix << DIGIT_BITS | digit
            search.equal = counts[:, digit].copy()
            search.below = up_to[:, digit] - search.equal
    for search in searches:
        search.threshold = from_key(search.prefix, values[0].dtype)
        search.is_done = True


def _reaches(pool: Pool, up_to: np.ndarray, digit: int) -> bool:
    return pool.reaches(up_to[:, digit].tolist())
