from __future__ import annotations

import torch
from small_networks import ConvNet, built, draw

from gbp_ray.training.footprint import count_live_bytes, measure_footprint


def test_what_grows_with_the_batch_is_told_from_what_does_not() -> None:
    def run(size: int) -> object:
        fixed = torch.zeros(1000, dtype=torch.float64)
        grown = torch.zeros(size, 50)
        return fixed, grown

    footprint = measure_footprint(run)
    for size in (1, 7, 100):
        assert footprint.peak_bytes(size) == 8000 + 200 * size


def test_the_peak_moves_to_where_it_is_for_that_size() -> None:
    """Few examples: the large fixed tensor is the peak; many: what grew before it was made."""

    def run(size: int) -> None:
        grown = torch.zeros(size, 100)
        del grown
        torch.zeros(1000)

    footprint = measure_footprint(run)
    assert [footprint.peak_bytes(size) for size in (1, 10, 11, 50)] == [4000, 4000, 4400, 20000]


def test_views_and_writing_in_place_take_nothing() -> None:
    before = torch.ones(300)

    def run(size: int) -> object:
        before.view(3, 100)[0].mul_(2)
        return before[: 10 * size].t()

    assert measure_footprint(run).peak_bytes(100) == 0


def test_a_pass_over_many_examples_is_told_from_two_small_ones() -> None:
    model = built(ConvNet).eval()

    def run(size: int) -> object:
        loss = model(draw(size, 2, 6, 6)).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = max(count_live_bytes(lambda: run(53)))
    assert measure_footprint(run).peak_bytes(53) == expected
    assert expected > 53 * 2 * 6 * 6 * 4


def test_runs_of_other_operations_are_told_by_their_peaks() -> None:
    def run(size: int) -> object:
        return [torch.zeros(100) for _ in range(size)]

    assert measure_footprint(run).peak_bytes(10) == 4000
