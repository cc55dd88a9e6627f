"""n:m patterns: which weights of each group stay, and on the way there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import dense, lowest, pruned_N
from small_networks import draw, prune_config
from torch import Tensor

from gbp_ray.errors import ConfigError
from gbp_ray.pruning.selection import check_selectable, select_masks
from gbp_ray.pruning.units import num_to_prune

pytestmark = pytest.mark.usefixtures("where_scores_lie")

LAYER_SHAPES = {
    "conv.weight": ((3, 8, 2, 3), 1),
    "fc.weight": ((5, 16), 1),
    "up.weight": ((8, 3, 2, 2), 0),
}
INPUT_DIMS = {name: axis for name, (_, axis) in LAYER_SHAPES.items()}


@cache
def places_of(name: str, m: int) -> list[list[int]]:
    """Cuts a layer into groups of m consecutive inputs, one index at a time; gives flat indices."""
    shape, axis = LAYER_SHAPES[name]
    flat = torch.arange(math.prod(shape)).view(shape)
    groups = []
    others = [range(size) for i, size in enumerate(shape) if i != axis]
    for place in itertools.product(*others):
        for start in range(0, shape[axis], m):
            group = []
            for i in range(start, start + m):
                index = list(place)
                index.insert(axis, i)
                group.append(int(flat[tuple(index)]))
            groups.append(group)
    return groups


def groups_of(tensors: Mapping[str, Tensor], m: int) -> list[list[Any]]:
    groups = []
    for name, tensor in tensors.items():
        values = tensor.flatten().tolist()
        groups += [[values[place] for place in group] for group in places_of(name, m)]
    return groups


def pattern_scores(seed: int, is_tied: bool) -> dict[str, Tensor]:
    scores = {name: draw(*shape, seed=seed) for name, (shape, _) in LAYER_SHAPES.items()}
    return {name: values.round() if is_tied else values for name, values in scores.items()}


PATTERNS = {"2:4": 0.5, "1:4": 0.75, "4:8": 0.5, "3:4": 0.25, "1:2": 0.5}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pattern", PATTERNS)
@given(seed=st.integers(0, 10**6), is_tied=st.booleans())
@settings(max_examples=8)
def test_every_group_keeps_its_n_highest(
    pattern: str, scope: str, seed: int, is_tied: bool
) -> None:
    n, m = map(int, pattern.split(":"))
    scores = pattern_scores(seed, is_tied)
    config = prune_config(sparsity=PATTERNS[pattern], scope=scope, granularity=pattern)
    masks = select_masks(scores, dense(scores), config, config.sparsity, INPUT_DIMS).masks
    for values, kept in zip(groups_of(scores, m), groups_of(masks, m), strict=True):
        assert {i for i in range(m) if not kept[i]} == lowest(values, m - n)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pattern", PATTERNS)
@given(
    seed=st.integers(0, 10**6),
    shares=st.lists(st.floats(0, 1), max_size=4).map(sorted),
    is_tied=st.booleans(),
)
@settings(max_examples=8)
def test_no_round_on_the_way_breaks_the_pattern(
    pattern: str, scope: str, seed: int, shares: list[float], is_tied: bool
) -> None:
    n, m = map(int, pattern.split(":"))
    config = prune_config(sparsity=PATTERNS[pattern], scope=scope, granularity=pattern)
    masks = dense(pattern_scores(seed, is_tied))
    for number, share in enumerate([*shares, 1.0]):
        sparsity = config.sparsity * share
        scores = pattern_scores(seed + number, is_tied)
        later = select_masks(scores, masks, config, sparsity, INPUT_DIMS).masks
        assert later.num_pruned == num_to_prune(sparsity, masks.num_units)
        assert later.intersection(masks) == later
        assert all(sum(kept) >= n for kept in groups_of(later, m))
        masks = later
    assert all(sum(kept) == n for kept in groups_of(masks, m))


def test_an_early_round_takes_the_lowest_of_what_the_pattern_lets_go() -> None:
    scores = {"fc.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0]])}
    config = prune_config(sparsity=0.5, granularity="2:4")
    masks = select_masks(scores, dense(scores), config, 3 / 8).masks
    # 3 is lower than 6, but its group keeps 3 and 4.
    assert pruned_N(masks) == [0, 1, 7]


@pytest.mark.parametrize(
    ("name", "shape", "axis", "size"),
    [
        ("fc.weight", (4, 6), 1, 6),
        ("conv.weight", (4, 3, 2, 2), 1, 3),
        ("depthwise.weight", (4, 1, 3, 3), 1, 1),
        ("up.weight", (6, 4, 2, 2), 0, 6),
    ],
)
def test_a_layer_that_the_pattern_does_not_divide_is_refused_by_name(
    name: str, shape: tuple[int, ...], axis: int, size: int
) -> None:
    shapes = {"fine.weight": (3, 8), name: shape}
    config = prune_config(granularity="2:4")
    with pytest.raises(ConfigError, match=rf"divisible by 4, but '{name}' has {size};"):
        check_selectable(shapes, config, {name: axis})
    scores = {key: draw(*value) for key, value in shapes.items()}
    with pytest.raises(ConfigError, match=name):
        select_masks(scores, dense(scores), config, 0.5, {name: axis})


def test_a_pattern_of_the_axis_that_divides_is_accepted() -> None:
    check_selectable({"up.weight": (8, 3, 2, 2)}, prune_config(granularity="2:4"), {"up.weight": 0})
