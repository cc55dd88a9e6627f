"""Costs of whole units: what a network costs at the widths of its groups, and what a step saves.

Costs are whole numbers of any size.

Shape suffixes: U = units of the network, P = products, A = axes of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gbp_ray.config.prune import Cost
from gbp_ray.pruning.structure import Axis, Product, Structure

__all__ = ["Costs", "count_cost", "products_of"]


def count_cost(structure: Structure, kind: Cost, kept_U: np.ndarray) -> int:
    """Counts the units, weights, multiply-adds or bytes of what stays."""
    widths = structure.widths(kept_U)
    return sum(product.value(widths) for product in products_of(structure, kind))


def products_of(structure: Structure, kind: Cost) -> Sequence[Product]:
    """Returns the products that add up to a cost."""
    if kind == "macs":
        return structure.macs
    if kind == "parameters":
        return structure.weights
    if kind == "bytes":
        sizes = structure.bytes_per_weight
        return [replace(p, factor=p.factor * sizes[p.name]) for p in structure.weights]
    return [Product(1, (Axis(0, ((number, 1),)),)) for number in range(len(structure.groups))]


class Costs:
    """A sum of products at the widths of the groups, and its change with one of them.

    Attributes:
        total: The cost now.
    """

    def __init__(self, products: Iterable[Product], widths: Sequence[int]) -> None:
        self.total, changing = 0, dict[tuple[Axis, ...], int]()
        for product in products:
            self.total += product.value(widths)
            axes = [axis for axis in product.axes if axis.per_unit]
            fixed = [axis.fixed for axis in product.axes if not axis.per_unit]
            # Products of the same lengths are one.
            key = tuple(sorted(axes, key=lambda axis: (axis.fixed, axis.per_unit)))
            if axes:
                changing[key] = changing.get(key, 0) + product.factor * math.prod(fixed)
        # No cost exceeds the first one, which decides if 64 bits hold all of them.
        kind = np.dtype(np.int64 if self.total < 2**62 else object)
        num_axes = max(map(len, changing), default=1)
        self._lengths_PA = np.ones((len(changing), num_axes), dtype=kind)
        self._factors_P = np.array(list(changing.values()), dtype=kind)
        uses: list[dict[int, np.ndarray]] = [{} for _ in widths]
        for row, axes_of_row in enumerate(changing):
            for column, axis in enumerate(axes_of_row):
                self._lengths_PA[row, column] = axis.length(widths)
                for group, number in axis.per_unit:
                    slopes = uses[group].setdefault(row, np.zeros(num_axes, dtype=kind))
                    slopes[column] += number
        self._values_P = self._factors_P * self._lengths_PA.prod(axis=1)
        self._uses: list[tuple[Any, Any, Any]] = []
        for of_group in uses:
            rows = np.array(list(of_group), dtype=np.intp)
            slopes = np.array(list(of_group.values()), dtype=kind).reshape(-1, num_axes)
            self._uses.append((rows, slopes, self._factors_P[rows]))

    def change(self, group: int, difference: int) -> int:
        """Returns what the cost would change by with so many more units of a group."""
        rows, slopes, factors = self._uses[group]
        after = factors * (self._lengths_PA[rows] + slopes * difference).prod(axis=1)
        return int((after - self._values_P[rows]).sum())

    def move(self, group: int, difference: int) -> None:
        """Changes the number of units of a group."""
        rows, slopes, factors = self._uses[group]
        self.total += self.change(group, difference)
        self._lengths_PA[rows] += slopes * difference
        self._values_P[rows] = factors * self._lengths_PA[rows].prod(axis=1)
