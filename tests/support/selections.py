"""What tests of selection share: scores with many ties, and the lowest of them by sorting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from small_networks import prune_config
from torch import Tensor

from gbp_ray.pruning.masks import MaskSet, Removal
from gbp_ray.pruning.selection import select_masks

Scores = Mapping[str, Tensor]


def dense(scores: Scores) -> MaskSet:
    return MaskSet(
        {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    )


def select(scores: Scores, sparsity: float, masks: MaskSet | None = None, **fields: Any) -> Removal:
    config = prune_config(sparsity=fields.pop("final", sparsity), **fields)
    return select_masks(scores, masks or dense(scores), config, sparsity)


def pruned_N(masks: MaskSet) -> list[int]:
    """Lists the flat indices of removed weights."""
    return (~masks.flat()).nonzero().flatten().tolist()


def lowest(values: list[float], count: int) -> set[int]:
    """Sorts by (value, position), as the module promises, and takes the first ones."""
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def removed_by_layer(masks: MaskSet) -> dict[str, set[int]]:
    return {n: set((~m.flatten()).nonzero().flatten().tolist()) for n, m in masks.items()}


# Few values make many ties; layer names whose order is not that of their making.
tied_values = st.integers(-3, 3).map(float)


@st.composite
def layered_scores(
    draw_from: st.DrawFn,
    values: st.SearchStrategy[float] = tied_values,
    max_layers: int = 4,
    max_size: int = 9,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    names = draw_from(st.permutations(["b.weight", "a.weight", "c10.weight", "c9.weight"]))
    count = draw_from(st.integers(1, max_layers))
    return {
        name: torch.tensor(draw_from(st.lists(values, min_size=2, max_size=max_size)), dtype=dtype)
        for name in names[:count]
    }


def flat(scores: Scores) -> list[float]:
    return [float(x) for name in sorted(scores) for x in scores[name].flatten()]
