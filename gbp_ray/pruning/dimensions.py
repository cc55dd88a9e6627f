"""Dimensions of a network: groups of whole units that a configuration gives one number for.

The hidden units of the feed-forward layers of all blocks are one dimension, the key-value groups of
all blocks another. Groups are of one dimension where they are of one kind and have equally many
units in tensors of the same names but for the numbers in them, along the same axes:
"layers.0.fc.weight" and "layers.11.fc.weight" are alike. A network whose groups of a dimension all
have one width is one that its own class can make.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from gbp_ray.errors import ConfigError
from gbp_ray.pruning.structure import Axis, Group, Product, Structure

__all__ = ["alike", "check_alike", "check_uniform", "join"]

_NUMBER = re.compile(r"[0-9]+")
_FIELD = "prune.target.uniform = true"


def alike(structure: Structure, is_uniform: bool = True) -> list[tuple[int, ...]]:
    """Returns the dimensions by the numbers of their groups, in order of the first one.

    Args:
        is_uniform: Without, each group is a dimension of its own.
    """
    if not is_uniform:
        return [(number,) for number in range(len(structure.groups))]
    found: dict[Hashable, list[int]] = {}
    for number, group in enumerate(structure.groups):
        found.setdefault(_key_of(group), []).append(number)
    return [tuple(numbers) for numbers in found.values()]


def join(products: Sequence[Product], dimensions: Sequence[tuple[int, ...]]) -> list[Product]:
    """Returns products of the widths of dimensions in place of those of groups."""
    place = {number: d for d, numbers in enumerate(dimensions) for number in numbers}

    def joined(axis: Axis) -> Axis:
        counts: Counter[int] = Counter()
        for group, number in axis.per_unit:
            counts[place[group]] += number
        return Axis(axis.fixed, tuple(counts.items()))

    return [Product(p.factor, tuple(map(joined, p.axes)), p.name) for p in products]


def check_alike(names: Sequence[str], widths: Sequence[int]) -> None:
    """Checks that the groups of a dimension keep equally many units before a decision.

    Raises:
        ConfigError: They do not; names two.
    """
    for name, width in zip(names, widths, strict=True):
        if width != widths[0]:
            raise ConfigError(
                f"{_FIELD}: '{names[0]}' has {widths[0]} units left and '{name}' {width}, as "
                "prune.initial_masks or earlier rounds left them; start from masks of equal "
                "widths, or set it to false"
            )


def check_uniform(structure: Structure, shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks that each dimension has all of its layers: one that keeps its width hinders the rest.

    Args:
        shapes: Of all parameters, dense.

    Raises:
        ConfigError: A layer like others has no units that can go; names it, and why.
    """
    ends = {
        (_plain(part.name), part.dim, structure.shapes[part.name][part.dim]): part.name
        for _, part in structure.slices()
        if part.role == "out"
    }
    for axis, why in structure.frozen.items():
        name, _, place = axis.rstrip("]").rpartition("[")
        if name not in shapes:
            continue
        like = ends.get((_plain(name), int(place), shapes[name][int(place)]))
        if like is not None:
            raise ConfigError(
                f"{_FIELD}: '{name}' keeps its width ({why}), and '{like}', which is like it, "
                "would lose units; name all such layers in prune.exclude or none, or set it to "
                "false"
            )


def _key_of(group: Group) -> Hashable:
    parts = sorted((_plain(p.name), p.dim, p.role, p.positions.shape[1]) for p in group.slices)
    return group.kind, group.num_units, tuple(parts)


def _plain(name: str) -> str:
    """Returns a name without the numbers in it."""
    return _NUMBER.sub("*", name)
