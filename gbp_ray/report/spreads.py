"""Means with their spread over seeds, and how they are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from gbp_ray.config.metrics import MetricSpec
from gbp_ray.results.scores import write_share

__all__ = [
    "Spread",
    "write_change",
    "write_percent",
    "write_score",
    "write_spread",
]


class Spread(NamedTuple):
    """A mean with its sample standard deviation, None for a single value."""

    mean: float
    deviation: float | None
    num: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Average the known values; None without any. Of an infinite one or NaN so is the mean."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        if not all(map(math.isfinite, known)):
            return cls(sum(known) / len(known), None, len(known))
        # Not in fractions, as statistics.stdev is: there are thousands of these to take.
        deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
        return cls(statistics.fmean(known), deviation, len(known))


def write_percent(spread: Spread | None) -> str:
    """Writes a share as a percentage with its deviation, and what cannot be one as a word."""
    if spread is not None and not 0 <= spread.mean <= 1:
        return write_share(spread.mean)
    return write_spread(spread, lambda value: f"{100 * value:.2f}", 100) + (" %" if spread else "")


def write_score(spread: Spread | None, metric: MetricSpec) -> str:
    """Writes a score with its deviation: a share as a percentage, another value in its unit."""
    if metric.unit == "%" or spread is None:
        return write_percent(spread)
    if spread.deviation is None:
        return metric.write(spread.mean)
    return f"{spread.mean:.4g} ± {spread.deviation:.2g}" + f" {metric.unit}".rstrip()


def write_change(spread: Spread | None, metric: MetricSpec) -> str:
    """Writes a difference of scores with its deviation: of shares in percentage points."""
    if metric.unit == "%" or spread is None:
        return write_spread(spread, lambda value: f"{100 * value:+.2f}", 100)
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.2g}"
    return f"{spread.mean:+.4g}{deviation}"


def write_spread(
    spread: Spread | None, write: Callable[[float], str], scale: float, *, is_quiet: bool = False
) -> str:
    """Writes a mean and its deviation; a quiet one is left out where it would read as zero."""
    if spread is None:
        return ""
    if spread.deviation is None:
        return write(spread.mean)
    digits = len(write(spread.mean).rstrip("x").rpartition(".")[2])
    deviation = f"{scale * spread.deviation:.{digits}f}"
    if is_quiet and not float(deviation):
        return write(spread.mean)
    return f"{write(spread.mean)} ± {deviation}"
