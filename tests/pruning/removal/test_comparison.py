"""Passes are compared a part at a time, to what whole tensors give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gbp_ray.pruning.removal import comparison
from gbp_ray.pruning.removal.comparison import Passed, compare


@pytest.fixture(autouse=True)
def _in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_PART", 7)


def compared(one: Tensor, other: Tensor) -> float | str:
    found = compare(Passed([one]), Passed([other]))
    return found if isinstance(found, float) else found.what


@pytest.mark.parametrize("shape", [(5, 9), (7,), (), (2, 0)])
def test_the_difference_is_relative_to_the_greatest_of_all_parts(shape: tuple[int, ...]) -> None:
    one = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = one * (1 + 1e-12)
    wanted = 1e-12 if one.numel() else 0.0
    assert compared(one, other) == pytest.approx(wanted, rel=1e-3)
    assert compared(one, one.clone()) == 0.0


@pytest.mark.parametrize("place", [0, 6, 7, 44])
def test_one_element_is_found_in_every_part(place: int) -> None:
    one = torch.ones(5, 9)
    other = one.clone()
    other.view(-1)[place] = 1.5
    assert "outputs differ by 0.5 of" in str(compared(one, other))
    other.view(-1)[place] = math.inf
    assert "outputs differ by inf of" in str(compared(one, other))
    assert compared(other, other.clone()) == 0.0
    assert "outputs differ by inf of" in str(compared(other, -other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64])
def test_sums_of_outputs_of_another_shape_are_compared(dtype: torch.dtype) -> None:
    one = torch.arange(45, dtype=torch.float32).view(5, 9).to(dtype)
    narrower = torch.cat([one, torch.zeros(5, 1, dtype=dtype)], dim=1)
    same = torch.ones(3)
    found = compare(Passed([same, one]), Passed([same.clone(), narrower]))
    assert found == 0.0
    narrower[4, 8] = 0
    found = compare(Passed([same, one]), Passed([same.clone(), narrower]))
    assert not isinstance(found, float)
    assert found.what == "outputs of shape (5, 9) differ"
