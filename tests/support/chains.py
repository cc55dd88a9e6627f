"""Structures of chains of linear layers, and their costs from the shapes of what is left."""

from __future__ import annotations

import math

import numpy as np

from gbp_ray.pruning.structure import Axis, Group, Product, Slice, Structure


def make_structure(widths: list[int], *, residual: bool = False) -> Structure:
    """Makes a chain of linear layers; with `residual` the last one adds to the first's outputs."""
    widths = [*widths, widths[0]] if residual else widths
    of = [*range(len(widths) - residual), *([0] if residual else [])]
    sizes, products = [3, *widths, 2], []
    shapes: dict[str, tuple[int, ...]] = {}
    slices: dict[int, list[Slice]] = {number: [] for number in of}
    for layer in range(len(sizes) - 1):
        name = f"l{layer}.weight"
        shapes[name] = (sizes[layer + 1], sizes[layer])
        axes = []
        for dim, index in ((0, layer), (1, layer - 1)):
            if 0 <= index < len(of):
                width = sizes[layer + 1 - dim]
                positions = np.arange(width)[:, None]
                role = "in" if dim else "out"
                slices[of[index]].append(Slice(name, dim, positions, role))
                axes.append(Axis(0, ((of[index], 1),)))
            else:
                axes.append(Axis(sizes[layer + 1 - dim]))
        products.append(Product(1, tuple(axes), name))
    groups = [
        Group(parts[0].name, "channel", len(parts[0].positions), tuple(parts))
        for parts in slices.values()
    ]
    positions = [layer % 3 + 1 for layer in range(len(products))]
    macs = [Product(n, p.axes, p.name) for n, p in zip(positions, products, strict=True)]
    sizes_of = {p.name: 2 if n % 2 else 4 for n, p in enumerate(products)}
    return Structure(tuple(groups), tuple(macs), tuple(products), sizes_of, shapes)


def count_from_shapes(structure: Structure, kind: str, kept_U: np.ndarray) -> int:
    """Counts a cost from the lengths of the tensors without the removed positions."""
    if kind == "sparsity":
        return int(kept_U.sum())
    stays = structure.kept_positions(kept_U)
    total = 0
    for number, (name, shape) in enumerate(structure.shapes.items()):
        left = [
            int(stays.get(name, {}).get(dim, np.ones(length)).sum())
            for dim, length in enumerate(shape)
        ]
        per_weight = {
            "parameters": 1,
            "macs": number % 3 + 1,
            "bytes": 2 if number % 2 else 4,
        }[kind]
        total += per_weight * math.prod(left)
    return total
