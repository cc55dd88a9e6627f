"""Units of whole channels and heads: the slices of many tensors that go together or not at all.

A convolution's output channel is one row of its weight, one entry of the BatchNorm behind it, and
one column of every layer that reads it; on a residual stream it is a row of every layer that adds
to the stream, too. Such slices are coupled: a network without all of them is a smaller network, and
it computes the same function as one where they are zero. `graph` finds them.

A group holds the units of the same tensors and axes, and of the same side where zeros are padded
in. Units are numbered through all groups, in order: that number is the place of a unit in every
vector of shape (U,).

Shape suffixes: U = units of the network, G = units of one group, K = positions of one unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gbp_ray.errors import PruneError

__all__ = ["Axis", "Group", "Product", "Slice", "Structure"]

Kind = Literal["channel", "head"]
Role = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class Slice:
    """What a group's units are in one tensor.

    Attributes:
        name: First name of a parameter or buffer.
        dim: Its axis.
        positions: (G, K) int64: where each unit lies along the axis.
        role: "in" where a weight reads the units, "out" where it makes them or goes along with
            them, as the weights of norms and biases do.
    """

    name: str
    dim: int
    positions: np.ndarray
    role: Role


@dataclass(frozen=True, eq=False)
class Group:
    """Units that lie in the same tensors along the same axes.

    Attributes:
        name: First name of the first weight that makes them, with a number from its second group
            on, as "conv.weight (2)".
        kind: "head" where a product of attention joins channels to units.
        num_units: G.
    """

    name: str
    kind: Kind
    num_units: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Axis:
    """The length of an axis as units go: `fixed + sum(n * kept units of group g)`.

    Attributes:
        per_unit: (group, n) pairs.
    """

    fixed: int
    per_unit: tuple[tuple[int, int], ...] = ()

    def length(self, kept: Sequence[int]) -> int:
        """Returns its length where each group keeps so many units."""
        return self.fixed + sum(number * int(kept[group]) for group, number in self.per_unit)


@dataclass(frozen=True)
class Product:
    """A cost that is a product of lengths: multiply-adds of an operation, or weights of a tensor.

    Attributes:
        factor: What does not change, such as positions in an image, or bytes of a weight.
        name: Of the weight that takes part, "" for none.
    """

    factor: int
    axes: tuple[Axis, ...]
    name: str = ""

    def value(self, kept: Sequence[int]) -> int:
        """Returns the cost where each group keeps so many units."""
        return self.factor * math.prod(axis.length(kept) for axis in self.axes)


@dataclass(frozen=True, eq=False)
class Structure:
    """The groups of a network and what they cost.

    Attributes:
        groups: In the order in which the network makes them.
        macs: Products that add up to the multiply-adds of one example.
        weights: One product for each parameter: its number of weights.
        bytes_per_weight: Bytes of one weight by parameter name.
        shapes: Of every tensor that a slice lies in, dense.
        frozen: Axis of a tensor, such as "fc.weight[0]", to why its positions are no units.
    """

    groups: tuple[Group, ...]
    macs: tuple[Product, ...]
    weights: tuple[Product, ...]
    bytes_per_weight: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    frozen: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_units(self) -> int:
        """Returns U."""
        return sum(group.num_units for group in self.groups)

    @property
    def everything(self) -> np.ndarray:
        """Returns the units of the dense network: True (U,)."""
        return np.ones(self.num_units, dtype=bool)

    @cached_property
    def bounds(self) -> list[int]:
        """Returns where each group begins in a vector of all units, and U."""
        return [0, *np.cumsum([group.num_units for group in self.groups]).tolist()]

    def split(self, values_U: np.ndarray) -> list[np.ndarray]:
        """Splits a vector of all units by group."""
        return np.split(values_U, self.bounds[1:-1])[: len(self.groups)]

    def widths(self, kept_U: np.ndarray) -> list[int]:
        """Counts the kept units of each group."""
        return [int(np.count_nonzero(kept_G)) for kept_G in self.split(kept_U)]

    def slices(self) -> Iterable[tuple[int, Slice]]:
        """Yields every slice with the number of its group."""
        for number, group in enumerate(self.groups):
            for part in group.slices:
                yield number, part

    def kept_positions(self, kept_U: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
        """Returns by tensor name and axis which positions stay, bool; untouched axes are absent."""
        by_group = self.split(kept_U)
        stays: dict[str, dict[int, np.ndarray]] = {}
        for number, part in self.slices():
            axes = stays.setdefault(part.name, {})
            if part.dim not in axes:
                axes[part.dim] = np.ones(self.shapes[part.name][part.dim], dtype=bool)
            axes[part.dim][part.positions[~by_group[number]].reshape(-1)] = False
        return stays

    def masks(self, kept_U: np.ndarray, names: Iterable[str]) -> dict[str, Tensor]:
        """Makes the masks of some parameters: a weight is pruned with any unit that it lies in.

        Returns:
            Bool tensors (True = kept) by name, of those of `names` that a slice lies in.
        """
        stays = self.kept_positions(kept_U)
        masks = {}
        for name in names:
            if name not in stays:
                continue
            shape = self.shapes[name]
            mask = torch.ones(shape, dtype=torch.bool)
            for dim, kept in stays[name].items():
                spread = [-1 if axis == dim else 1 for axis in range(len(shape))]
                mask &= torch.from_numpy(kept).view(spread)
            masks[name] = mask
        return masks

    def units_in(self, masks: Mapping[str, Tensor]) -> np.ndarray:
        """Returns which units such masks keep, bool (U,); the inverse of `masks`.

        Raises:
            PruneError: They remove a part of a unit, or weights in which no unit lies.
        """
        kept = []
        for group in self.groups:
            part = next((part for part in group.slices if part.name in masks), None)
            if part is None:
                kept.append(np.ones(group.num_units, dtype=bool))
                continue
            mask = masks[part.name].movedim(part.dim, 0)
            rows = mask.reshape(len(mask), -1).any(dim=1).numpy()
            kept.append(rows[part.positions].any(axis=1))
        kept_U = np.concatenate(kept) if kept else np.ones(0, dtype=bool)
        # A unit that goes takes its part of every parameter that it lies in.
        expected = self.masks(kept_U, self.bytes_per_weight)
        for name in {**masks, **expected}:
            pair = [of[name] for of in (masks, expected) if name in of]
            is_same = torch.equal(*pair) if len(pair) == 2 else bool(pair[0].all())
            if not is_same:
                raise PruneError(
                    f"mask of '{name}': removes weights, but no whole units of this network"
                )
        return kept_U

    def count_macs(self, kept_U: np.ndarray) -> int:
        """Counts the multiply-adds of one example."""
        widths = self.widths(kept_U)
        return sum(product.value(widths) for product in self.macs)

    def count_weights(self, kept_U: np.ndarray) -> int:
        """Counts the weights of all parameters."""
        widths = self.widths(kept_U)
        return sum(product.value(widths) for product in self.weights)
