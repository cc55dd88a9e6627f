"""Tensors that modules keep beside weights and buffers: made by a pass, or set by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import run
from structures import channels, kept, largest_difference, mask, structure_of
from torch import Tensor, nn

from gbp_ray.errors import PruneError
from gbp_ray.pruning.graph.find import find_structure
from gbp_ray.pruning.removal.caches import Cache, drop_caches, find_caches
from gbp_ray.pruning.removal.remove import remove_units


class Keeping(nn.Module):
    """Keeps the squares of its scale, once made, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.way, self.kept = way, {"dict": {}, "list": [], "attribute": None}[way]
        self.seen: Tensor | None = None
        self.offset = torch.linspace(0, 1, 3)

    def square(self) -> Tensor:
        if self.way == "dict":
            if "cpu" not in self.kept:
                self.kept["cpu"] = self.scale.square()
            return self.kept["cpu"]
        if self.way == "list":
            if not self.kept:
                self.kept.append(self.scale.square())
            return self.kept[0]
        if self.kept is None:
            self.kept = self.scale.square()
        return self.kept

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.one(x).tanh() * self.square()
        return self.two(self.seen) + self.offset


WAYS = ["dict", "list", "attribute"]


def passed(way: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model, inputs = Keeping(way).eval(), torch.randn(5, 4)
    with torch.no_grad():
        model(inputs)
    return model, inputs


@pytest.mark.parametrize("way", WAYS)
def test_what_a_pass_makes_once_is_told_from_what_it_writes_and_what_is_set(way: str) -> None:
    model, inputs = passed(way)
    seen = model.seen
    assert find_caches(model, lambda network: network(inputs)) == (Cache("", "kept"),)
    assert not model.kept
    assert model.seen.shape == seen.shape
    assert torch.equal(model.offset, torch.linspace(0, 1, 3))
    expected = model(inputs)
    drop_caches(model, [Cache("", "kept")])
    torch.testing.assert_close(model(inputs), expected)


@pytest.mark.parametrize("way", WAYS)
def test_units_are_found_and_removed_whether_or_not_a_pass_came_before(way: str) -> None:
    model, inputs = passed(way)
    structure = find_structure(model, (inputs[:1],), run)
    assert [(group.num_units, len(group.slices)) for group in structure.groups] == [(6, 4)]
    keep = np.array([True, False, True, True, False, True])
    with torch.no_grad():
        mask(model, structure, keep)
        model.kept = {"dict": {}, "list": [], "attribute": None}[way]
        masked = model(inputs)
        assert (
            remove_units(model, structure, keep, lambda network: network(inputs)).difference <= 1e-6
        )
        assert largest_difference(masked, model(inputs)) <= 1e-6


def test_a_refused_removal_leaves_no_stale_tensor_behind() -> None:
    model, inputs = passed("dict")
    parts = [*channels("one", 6), ("two.weight", 1, np.arange(6)[:, None])]
    structure = structure_of(model, parts)  # without the scale
    keep = kept(structure, [1])
    with torch.no_grad():
        mask(model, structure, keep)
        masked = model(inputs)
        with pytest.raises(PruneError):
            remove_units(model, structure, keep, lambda network: network(inputs))
        torch.testing.assert_close(model(inputs), masked)
