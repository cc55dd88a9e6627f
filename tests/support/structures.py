"""Structures written by hand, for tests of what is done with them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.pruning.structure import Axis, Group, Product, Slice, Structure

Part = tuple[str, int, np.ndarray]
"""(tensor, axis, positions of each unit (G, K))."""


def blocks(num_units: int, per_unit: int = 1, start: int = 0) -> np.ndarray:
    """Returns positions of units that lie one after another, (G, K)."""
    return np.arange(start, start + num_units * per_unit).reshape(num_units, per_unit)


def repeated(num_units: int, times: int, per_unit: int = 1) -> np.ndarray:
    """Returns positions of units that lie in each of several stretches, as those of gates do."""
    stretch = num_units * per_unit
    return np.concatenate([blocks(num_units, per_unit, i * stretch) for i in range(times)], axis=1)


def structure_of(model: nn.Module, *groups: Sequence[Part], kind: str = "channel") -> Structure:
    """Makes the structure of a network; costs count each weight once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    made = []
    for parts in groups:
        slices = tuple(Slice(name, dim, at, "out" if dim == 0 else "in") for name, dim, at in parts)
        made.append(Group(parts[0][0], kind, len(parts[0][2]), slices))  # type: ignore[arg-type]
    products = []
    for name, parameter in model.named_parameters():
        axes = []
        for dim, length in enumerate(parameter.shape):
            each = [
                (number, part.positions.shape[1])
                for number, group in enumerate(made)
                for part in group.slices
                if (part.name, part.dim) == (name, dim)
            ]
            fixed = length - sum(n * made[number].num_units for number, n in each)
            axes.append(Axis(fixed, tuple(each)))
        products.append(Product(1, tuple(axes), name))
    return Structure(
        groups=tuple(made),
        macs=tuple(product for product in products if len(product.axes) > 1),
        weights=tuple(products),
        bytes_per_weight={n: p.element_size() for n, p in model.named_parameters()},
        shapes={part.name: tuple(tensors[part.name].shape) for g in made for part in g.slices},
    )


def kept(structure: Structure, *removed: Sequence[int]) -> np.ndarray:
    """Keeps all units but these, which are numbered within each group."""
    parts = []
    for group, gone in zip(structure.groups, removed, strict=True):
        parts.append(np.ones(group.num_units, dtype=bool))
        parts[-1][list(gone)] = False
    return np.concatenate(parts)


@torch.no_grad()
def mask(model: nn.Module, structure: Structure, kept_U: np.ndarray) -> dict[str, Tensor]:
    """Zeroes the removed units of a network; returns the masks of its parameters."""
    parameters = dict(model.named_parameters())
    masks = structure.masks(kept_U, parameters)
    for name, own in masks.items():
        parameters[name].masked_fill_(~own, 0)
    return masks
