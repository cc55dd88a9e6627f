"""The algebra of reconstruction against numpy, one output and one weight at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refitting import lstsq, surgeon
from small_networks import draw
from torch import Tensor

from gbp_ray.errors import PruneError
from gbp_ray.pruning.refit import least_squares, solve_whole, sparsegpt


@pytest.mark.parametrize("damping", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("is_from_whole", [False, True])
@pytest.mark.parametrize("pruned", [[1, 4], [0], [], [0, 2, 3, 5]])
def test_a_solution_is_that_of_numpy(
    damping: float, is_from_whole: bool, pruned: list[int]
) -> None:
    x, y, everything = (draw(*shape, seed=3).double() for shape in ((40, 6), (40, 5), (5, 6)))
    support = torch.ones(6, dtype=torch.bool)
    support[pruned] = False
    sums, columns = (x.T @ x, x.T @ y), torch.tensor([1, 4])
    whole = solve_whole(*sums, everything, damping) if is_from_whole else None
    start = everything[columns]
    found = least_squares(*sums, columns, support, start, damping, whole)
    assert not found[:, pruned].any()
    for row, column in enumerate((1, 4)):
        wanted = lstsq(
            *(x.numpy(), y[:, column].numpy(), support.numpy(), start[row].numpy(), damping)
        )
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 1e-16, 1e-14, 1e-10, 1e-6])
def test_nearly_dependent_inputs_lose_no_digits_by_the_other_way(damping: float) -> None:
    x, y = draw(60, 3, seed=1).double(), draw(60, 2, seed=2).double()
    inputs = torch.cat([x @ draw(3, 10, seed=3).double(), draw(60, 14, seed=4).double()], dim=1)
    sums, start = (inputs.T @ inputs, inputs.T @ y), draw(2, 24, seed=5).double()
    support, columns = torch.ones(24, dtype=torch.bool), torch.tensor([0, 1])
    support[:8] = False
    whole = solve_whole(*sums, start, damping)
    assert (whole is not None) == (damping >= 1e-6)
    one, other = (least_squares(*sums, columns, support, start, damping, w) for w in (None, whole))
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)


def test_inputs_that_decide_nothing() -> None:
    x = draw(10, 3).double()
    twice = torch.cat([x, x], dim=1)
    moments, support = (twice.T @ twice, twice.T @ draw(10, 1).double()), torch.ones(6).bool()
    start, only = draw(1, 6), torch.tensor([0])
    with pytest.raises(PruneError, match=r"reconstruct_damping: .* linearly dependent"):
        least_squares(moments[0], moments[1], only, support, start, 0.0)
    assert torch.isfinite(least_squares(moments[0], moments[1], only, support, start, 1e-6)).all()
    nothing = (torch.zeros(6, 6).double(), torch.zeros(6, 1).double())
    assert torch.equal(least_squares(*nothing, only, support, start, 0.1).float(), start)
    assert not least_squares(*moments, only, ~support, start, 0.1).any()

    with pytest.raises(PruneError, match=r"reconstruct_damping: .* linearly dependent"):
        sparsegpt(moments[0], start, support[None], 2, 0.0)
    assert torch.isfinite(sparsegpt(moments[0], start, support[None], 2, 1e-6)[0]).all()
    weights, kept = sparsegpt(nothing[0], start, support[None], 2, 0.1)
    smallest = start[0].abs().argsort()[:2]
    assert torch.equal(weights.float(), start.index_fill(1, smallest, 0))
    assert torch.equal(kept, start.new_ones(1, 6).index_fill(1, smallest, 0).bool())


NOTHING: list[int] = []
BEFORE = [0, 1, 2, 3, 10, 11, 12, 13, 25]  # flat; eight of nine are of the first four inputs
PATTERNED = [0, 3, 9, 14, 17]


@pytest.mark.parametrize(
    ("num_inputs", "before", "num_pruned", "pattern", "block", "quotas"),
    [
        (10, NOTHING, 15, None, 4, [6, 6, 3]),
        (10, NOTHING, 15, None, 128, [15]),
        (10, NOTHING, 4, None, 4, [2, 1, 1]),
        (10, NOTHING, 0, None, 4, [0, 0, 0]),
        (10, NOTHING, 30, None, 4, [12, 12, 6]),
        # Of six more, the first block may lose none: it has lost more than its share.
        (10, BEFORE, 15, None, 4, [8, 5, 2]),
        (10, BEFORE, 9, None, 4, [8, 1, 0]),
        (8, NOTHING, 12, (2, 4), 128, [6, 6]),
        (8, NOTHING, 12, (2, 4), 1, [6, 6]),
        (8, NOTHING, 5, (2, 4), 128, [3, 2]),
        (8, NOTHING, 18, (1, 4), 4, [9, 9]),
        (9, NOTHING, 9, (2, 3), 7, [3, 3, 3]),
        (8, PATTERNED, 12, (2, 4), 128, [6, 6]),
        (8, PATTERNED, 8, (2, 4), 128, [4, 4]),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_turned", [False, True])
def test_weights_go_as_one_by_one(
    num_inputs: int,
    before: list[int],
    num_pruned: int,
    pattern: tuple[int, int] | None,
    block: int,
    quotas: list[int],
    is_turned: bool,
) -> None:
    x, y, start = (draw(*n, seed=5).double() for n in ((40, num_inputs), (40, 3), (3, num_inputs)))
    x = x @ draw(num_inputs, num_inputs, seed=6).double()  # correlated
    kept = torch.ones(3, num_inputs).bool()
    kept.view(-1)[before] = False
    wanted = surgeon(
        *(x.numpy(), y.numpy(), kept.numpy(), start.numpy(), 0.03, quotas),
        pattern[1] if pattern else block,
        pattern[1] - pattern[0] if pattern else None,
    )
    # The same inputs, laid out otherwise.
    turned = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(1))
    layout = turned if is_turned else torch.arange(num_inputs)
    moments = (x.T @ x, x.T @ y)
    begun = [
        least_squares(*moments, torch.tensor([r]), kept[r], start[[r]], 0.03) for r in range(3)
    ]
    weights, stays = sparsegpt(
        *(moments[0][layout][:, layout], torch.cat(begun)[:, layout], kept[:, layout]),
        *(num_pruned, 0.03),
        pattern=pattern,
        order=layout.argsort() if is_turned else None,
        block=block,
    )
    np.testing.assert_allclose(weights.numpy(), wanted[:, layout], atol=1e-8)
    assert torch.equal(stays, torch.from_numpy(wanted[:, layout] != 0))
    assert int((~stays).sum()) == num_pruned == sum(quotas)
    assert not (stays & ~kept[:, layout]).any()


def test_weights_of_strong_inputs_stay() -> None:
    """What magnitude keeps is no match, not even refitted exactly."""
    strengths = draw(40, seed=4).double().exp()
    x = (draw(200, 40, seed=1) + 0.3 * draw(200, 1, seed=2)).double() * strengths
    start = draw(20, 40, seed=3).double()
    moments = (x.T @ x, x.T @ x @ start.T)
    # They are their own solution.
    weights, kept = sparsegpt(moments[0], start, torch.ones(20, 40).bool(), 400, 0.01)
    assert int(kept.sum()) == 400
    largest = start.abs() > start.abs().flatten().kthvalue(400).values
    refitted = [
        least_squares(*moments, torch.tensor([r]), largest[r], start[[r]], 0.01) for r in range(20)
    ]

    def cost(found: Tensor) -> float:
        return float((x @ (found - start).T).square().sum())

    assert cost(weights) < 0.5 * cost(torch.cat(refitted)) < 0.5 * cost(start * largest)
