"""Finds the groups of a structure whose units a network's own code cannot go without.

A graph may allow what the code does not: attention that computes the channels of a head as its
width over the number of heads works for one number of heads only. That shows when units are
removed. So some of each group are removed on trial, before anything is trained, and a group that
cannot be cut is named rather than met in the middle of a job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from gbp_ray.errors import PruneError
from gbp_ray.pruning.removal.caches import Run
from gbp_ray.pruning.removal.remove import try_removal
from gbp_ray.pruning.structure import Axis, Product, Structure

__all__ = ["find_fixed_groups", "without_groups"]


def find_fixed_groups(
    model: nn.Module,
    structure: Structure,
    run: Run,
) -> dict[int, str]:
    """Removes units of all groups on trial; returns the groups that cannot be cut, with the reason.

    Where that fails, the groups in the layer that is named are tried apart. Groups that lie in the
    same axes in other modules of that class share what is found. The network ends as it was.

    Args:
        model: Dense, or masked.
        structure: Of the network as it is.
        run: As of `remove_units`.
    """
    trial = _Trial(model, structure, run)
    numbers = [n for n, group in enumerate(structure.groups) if group.num_units > 1]
    return trial.find(numbers)


def without_groups(structure: Structure, fixed: Mapping[int, str]) -> Structure:
    """Drops groups, whose units then stay; costs count them as fixed.

    Args:
        fixed: Why, by number of the group.
    """
    numbers = {
        old: new
        for new, old in enumerate(n for n in range(len(structure.groups)) if n not in fixed)
    }

    def drop(product: Product) -> Product:
        return replace(
            product, axes=tuple(_drop(axis, structure, numbers) for axis in product.axes)
        )

    groups = tuple(group for n, group in enumerate(structure.groups) if n in numbers)
    held = {part.name for group in groups for part in group.slices}
    reasons = {
        f"{part.name}[{part.dim}]": fixed[number]
        for number, part in structure.slices()
        if number in fixed
    }
    return replace(
        structure,
        groups=groups,
        macs=tuple(drop(product) for product in structure.macs),
        weights=tuple(drop(product) for product in structure.weights),
        shapes={name: shape for name, shape in structure.shapes.items() if name in held},
        frozen={**structure.frozen, **reasons},
    )


def _drop(axis: Axis, structure: Structure, numbers: Mapping[int, int]) -> Axis:
    fixed = axis.fixed + sum(
        each * structure.groups[group].num_units
        for group, each in axis.per_unit
        if group not in numbers
    )
    left = tuple((numbers[group], each) for group, each in axis.per_unit if group in numbers)
    return Axis(fixed, left)


class _Trial:
    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        run: Run,
    ) -> None:
        self._model, self._structure, self._run = model, structure, run
        self._modules = dict(model.named_modules())

    def find(self, numbers: Sequence[int]) -> dict[int, str]:
        """Returns which of some groups cannot be cut, with the reason."""
        failure = self._try(numbers)
        if failure is None:
            return {}
        if len(numbers) == 1:
            return {numbers[0]: str(failure)}
        path = str(getattr(failure, "path", ""))
        inside = self._inside(path, numbers)
        if inside and len(inside) < len(numbers):
            fixed = self.find(inside) or dict.fromkeys(inside, str(failure))
            fixed |= self._alike(path, fixed, [n for n in numbers if n not in inside])
        else:
            half = len(numbers) // 2
            fixed = self.find(numbers[:half]) | self.find(numbers[half:])
            # Each half can be cut, and both together cannot.
            fixed = fixed or dict.fromkeys(numbers[half:], str(failure))
        return fixed | self.find([number for number in numbers if number not in fixed])

    def _try(self, numbers: Sequence[int]) -> PruneError | None:
        """Removes a few units of each group, and puts them back; returns the error, if any."""
        structure = self._structure
        kept_U = structure.everything
        for number in numbers:
            # Different numbers: groups that must go together would pass with the same one, and
            # sides that code computes as halves of a sum with one more or less.
            size = structure.groups[number].num_units
            few, more = (1, 2) if size < 6 else (3, 5)
            most = min(more if number % 2 else few, size - 1)
            start = structure.bounds[number]
            kept_U[start : start + most] = False
        with self._masked(kept_U):
            try:
                try_removal(self._model, structure, kept_U, self._run)
            except PruneError as error:
                return error
        return None

    @contextmanager
    def _masked(self, kept_U: np.ndarray) -> Iterator[None]:
        parameters = dict(self._model.named_parameters())
        masks = self._structure.masks(kept_U, parameters)
        before = {name: parameters[name].detach().clone() for name in masks}
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, values in before.items():
                    parameters[name].copy_(values)

    def _inside(self, path: str, numbers: Sequence[int]) -> list[int]:
        """Lists the groups that lie in tensors of a module."""
        if not path:
            return []
        found = {n for n, part in self._structure.slices() if part.name.startswith(f"{path}.")}
        return [number for number in numbers if number in found]

    def _alike(self, path: str, fixed: Mapping[int, str], numbers: Sequence[int]) -> dict[int, str]:
        """Finds groups that lie in other modules of a module's class as fixed ones lie in it."""
        kind = type(self._modules[path])
        if kind.__module__.startswith("torch.nn."):
            return {}
        places = {self._places(path, number): why for number, why in fixed.items()}
        places.pop(frozenset(), None)
        return {
            number: places[found]
            for number in numbers
            for other in self._around(number)
            if type(self._modules[other]) is kind
            if (found := self._places(other, number)) in places
        }

    def _around(self, number: int) -> list[str]:
        """Lists the paths of the modules that hold a group's tensors, from within outwards."""
        paths: dict[str, None] = {}
        for part in self._structure.groups[number].slices:
            path = part.name
            while path := path.rpartition(".")[0]:
                paths[path] = None
        return list(paths)

    def _places(self, path: str, number: int) -> frozenset[tuple[str, int]]:
        """Returns where a group lies in a module: names of tensors from there, with the axis."""
        return frozenset(
            (part.name.removeprefix(f"{path}."), part.dim)
            for part in self._structure.groups[number].slices
            if part.name.startswith(f"{path}.")
        )
