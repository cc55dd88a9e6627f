"""Finds the numbers in modules that must follow a cut, such as of heads, and sizes of a split.

Nothing says which attribute of a module is a width. So candidates are tried, and what they do is
seen in a pass through the network: an attribute near the first layer that differs, whose value is a
length, or a number of units, that a cut has changed. The first set of changes with which the whole
network agrees with the masked one is taken; where there is none, nothing is changed.

All modules of a class follow the same rule, such as "num_heads is the number of units of
qkv.weight[0]".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from gbp_ray.pruning.removal.comparison import Fault
from gbp_ray.pruning.structure import Structure

__all__ = ["Search", "Spot", "apply_widths"]

Outcome = float | Fault
Widths = Mapping["Spot", int]

_MOST_PASSES = 500
_MOST_STEPS = 3
"""Changes at a fault that only show effect, before one that mends it."""

_MOST_RULES = 4
_LONGEST_TUPLE = 8


@dataclass(frozen=True)
class Spot:
    """An integer attribute of a module, or an element of a tuple or list that is one.

    Attributes:
        index: Of the element; None for the attribute itself.
    """

    path: str
    name: str
    index: int | None = None

    @property
    def key(self) -> str:
        """Returns its dotted path."""
        place = f"{self.path}.{self.name}".lstrip(".")
        return place if self.index is None else f"{place}[{self.index}]"


@dataclass(frozen=True)
class _Rule:
    """What an attribute follows: a length of a tensor, or a number made of units along its axis.

    Attributes:
        up: How many levels above the module the tensor's path begins.
        name: The tensor's path from there.
        part: Number of the slice along the axis; None for the axis as a whole.
    """

    up: int
    name: str
    dim: int
    part: int | None


@dataclass(frozen=True)
class _Part:
    """Units along an axis: how many, positions of each, and how many are kept."""

    num_units: int
    per_unit: int
    num_kept: int


@dataclass
class _CutAxis:
    old: int
    new: int
    parts: list[_Part] = field(default_factory=list)

    def follow(self, value: int, part: int | None) -> int | None:
        """Returns what a value becomes that follows the axis or a part of it; None if it does not.

        A part may be counted in units (heads), positions (channels), or anything between, as heads
        of queries are where a unit is a key with its queries.
        """
        if part is None:
            return self.new if value == self.old else None
        if part >= len(self.parts):
            return None
        units = self.parts[part]
        each, rest = divmod(value, units.num_units)
        if rest or each == 0 or units.per_unit % each:
            return None
        return each * units.num_kept


class Search:
    """Searches for the widths with which a cut network agrees with the masked one.

    Args:
        model: The network, cut.
        structure: Before the cut.
        kept_U: The kept units.
        settled: Attributes that are set already, as (path of the module, name).
        attempt: (widths, is_strict) -> the difference of outputs with these widths, or the fault.

    Attributes:
        furthest: The fault of the widths that got furthest.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        kept_U: np.ndarray,
        settled: Collection[tuple[str, str]],
        attempt: Callable[[Widths, bool], Outcome],
    ) -> None:
        self._modules = dict(model.named_modules())
        self._axes = _cut_axes(structure, kept_U)
        self._settled = settled
        self._attempt = attempt
        self._passes_left = 0
        self._tried: set[frozenset[tuple[Spot, int]]] = set()
        self._is_spoilt = False
        self.furthest = Fault(-1, None, "", "", ())

    def find(self) -> tuple[dict[Spot, int], float] | None:
        """Returns the first widths that agree, with the difference of outputs; None without any.

        Then `furthest` is the last fault that could not be mended.
        """
        for is_class_wide, is_strict in itertools.product((True, False), (True, False)):
            if not is_strict and not self.furthest.is_soft:
                continue
            if not is_class_wide and not self._is_spoilt:
                break
            self._passes_left = _MOST_PASSES
            self._tried.clear()
            start = self._attempt({}, is_strict)
            if isinstance(start, float):
                return {}, start
            if self.furthest.num_agreed < 0:
                self.furthest = start
            found = self._extend({}, start, _MOST_STEPS, is_class_wide, is_strict)
            if found is not None:
                return found
        return None

    def _extend(
        self,
        widths: dict[Spot, int],
        fault: Fault,
        steps: int,
        is_class_wide: bool,
        is_strict: bool,
    ) -> tuple[dict[Spot, int], float] | None:
        """Adds changes that mend a fault; then, if another comes later, changes that mend it.

        A change that only makes the same layers compute something else may be one of several that
        are needed together, so further ones are added to it.

        Args:
            steps: How many such changes may still be made.
        """
        others: list[tuple[dict[Spot, int], Fault]] = []
        for change in self._changes(widths, fault, is_class_wide):
            more = widths | change
            key = frozenset(more.items())
            if key in self._tried:
                continue
            if self._passes_left == 0:
                return None
            self._tried.add(key)
            self._passes_left -= 1
            outcome = self._attempt(more, is_strict)
            if isinstance(outcome, float):
                return more, outcome
            if fault.is_before(outcome):
                if is_strict and is_class_wide and self.furthest.is_before(outcome):
                    self.furthest = outcome
                found = self._extend(more, outcome, _MOST_STEPS, is_class_wide, is_strict)
                if found is not None:
                    return found
                # The fault that is left may be what the change has done to another module.
                self._is_spoilt |= len(change) > 1
            elif outcome.num_agreed < fault.num_agreed:
                # It harms another module of the class.
                self._is_spoilt = True
            elif outcome.is_another(fault):
                others.append((more, outcome))
        for more, outcome in others if steps else ():
            found = self._extend(more, outcome, steps - 1, is_class_wide, is_strict)
            if found is not None:
                return found
        return None

    def _changes(
        self, widths: Mapping[Spot, int], fault: Fault, is_class_wide: bool
    ) -> list[dict[Spot, int]]:
        """Lists changes of one attribute each, nearest to the fault first."""
        found: list[dict[Spot, int]] = []
        seen: set[tuple[type, str, int | None]] = set()
        for path in fault.nearby:
            module = self._modules.get(path)
            if module is None:
                continue
            for spot, value in self._spots_of(path, module):
                kind = (type(module), spot.name, spot.index)
                if spot in widths or (is_class_wide and kind in seen):
                    continue
                changes = self._follow(spot, value, fault.nearby, widths, is_class_wide)
                if changes:
                    seen.add(kind)
                found.extend(changes)
        return found

    def _follow(
        self,
        spot: Spot,
        value: int,
        nearby: Sequence[str],
        widths: Mapping[Spot, int],
        is_class_wide: bool,
    ) -> list[dict[Spot, int]]:
        """Lists what may become of an attribute, and of the same one in modules of its class."""
        changes: list[dict[Spot, int]] = []
        for rule in self._rules(spot.path, nearby):
            width = self._resolve(rule, spot.path, value)
            if width is None or width == value:
                continue
            change = self._everywhere(rule, spot) if is_class_wide else {spot: width}
            change = {other: width for other, width in change.items() if other not in widths}
            if change not in changes:
                changes.append(change)
            if len(changes) == _MOST_RULES:
                break
        return changes

    def _everywhere(self, rule: _Rule, spot: Spot) -> dict[Spot, int]:
        kind = type(self._modules[spot.path])
        change = {}
        for path, module in self._modules.items():
            if type(module) is not kind:
                continue
            for other, value in self._spots_of(path, module):
                if (other.name, other.index) != (spot.name, spot.index):
                    continue
                width = self._resolve(rule, path, value)
                if width is not None and width != value:
                    change[other] = width
        return change

    def _spots_of(self, path: str, module: nn.Module) -> Iterator[tuple[Spot, int]]:
        """Yields the integer attributes of a module that may change, private ones last."""
        has_weights = any(parameter is not None for parameter in module._parameters.values())
        if has_weights and type(module).__module__.startswith("torch.nn.modules."):
            return
        for name, value in sorted(vars(module).items(), key=lambda item: item[0].startswith("_")):
            if (path, name) in self._settled:
                continue
            if type(value) is int:
                yield Spot(path, name), value
            elif isinstance(value, tuple | list) and not hasattr(value, "_fields"):
                for index, element in enumerate(value[:_LONGEST_TUPLE]):
                    if type(element) is int:
                        yield Spot(path, name, index), element

    def _rules(self, path: str, nearby: Sequence[str]) -> Iterator[_Rule]:
        """Yields what attributes of a module may follow: cut tensors in it or right around it."""
        up = 0
        base = path
        while not (inside := self._inside(base)) and base:
            base = base.rpartition(".")[0]
            up += 1
        near = set(nearby)
        inside.sort(key=lambda item: (item[0].rpartition(".")[0] not in near, item[0].count(".")))
        start = len(base) + 1 if base else 0
        for (name, dim), axis in ((item, self._axes[item]) for item in inside):
            for part in range(len(axis.parts)):
                yield _Rule(up, name[start:], dim, part)
            yield _Rule(up, name[start:], dim, None)

    def _inside(self, base: str) -> list[tuple[str, int]]:
        return [item for item in self._axes if not base or item[0].startswith(f"{base}.")]

    def _resolve(self, rule: _Rule, path: str, value: int) -> int | None:
        parts = path.split(".") if path else []
        if rule.up > len(parts):
            return None
        name = ".".join([*parts[: len(parts) - rule.up], rule.name])
        axis = self._axes.get((name, rule.dim))
        return None if axis is None else axis.follow(value, rule.part)


def apply_widths(model: nn.Module, widths: Widths) -> Callable[[], None]:
    """Sets attributes; returns what sets them back."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for spot, width in widths.items():
        own = vars(model.get_submodule(spot.path))
        value = own[spot.name]
        before.append((own, spot.name, value))
        if spot.index is None:
            own[spot.name] = width
            continue
        elements = list(value)
        elements[spot.index] = width
        own[spot.name] = elements if isinstance(value, list) else type(value)(elements)

    def undo() -> None:
        for own, name, value in reversed(before):
            own[name] = value

    return undo


def _cut_axes(structure: Structure, kept_U: np.ndarray) -> dict[tuple[str, int], _CutAxis]:
    stays = structure.kept_positions(kept_U)
    widths = structure.widths(kept_U)
    axes: dict[tuple[str, int], _CutAxis] = {}
    for number, part in structure.slices():
        kept = stays[part.name][part.dim]
        if kept.all():
            continue
        axis = axes.setdefault((part.name, part.dim), _CutAxis(len(kept), int(kept.sum())))
        num_units, per_unit = part.positions.shape
        axis.parts.append(_Part(num_units, per_unit, widths[number]))
    return axes
