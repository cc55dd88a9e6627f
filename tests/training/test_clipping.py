from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import ConvNet, TanhNet, built, draw, images, in_float64
from small_trainings import first_batch, recipe_of, steps, tanh_workload, train

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.training.optimizer import _sum_pairwise, clip_gradients, gradient_norm

SHAPES = [(5, 3, 3, 3), (7,), (), (1, 9), (4, 1), (0, 3)]


def gradients(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [
        scale * draw(*shape, 1, seed=n, dtype=dtype).view(shape) for n, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_that_of_all_gradients_as_one_vector(dtype: torch.dtype) -> None:
    given_ = gradients(dtype=dtype)
    kept = copy.deepcopy(given_)
    expected = torch.cat([g.double().flatten() for g in given_]).norm().item()
    assert gradient_norm(given_, Ranks()) == pytest.approx(expected, rel=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(given_, kept, strict=True))
    assert gradient_norm([], Ranks()) == 0


def test_clipping_does_what_torch_does() -> None:
    for scale in (0.01, 1.0, 30.0):
        ours, theirs = gradients(scale), gradients(scale)
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in theirs]
        for parameter, gradient in zip(parameters, theirs, strict=True):
            parameter.grad = gradient
        expected = torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        assert clip_gradients(ours, 2.0, Ranks()) == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(ours, theirs)


def test_a_norm_within_bounds_leaves_the_bits() -> None:
    ours = gradients()
    clip_gradients(ours, 1e6, Ranks())
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(), strict=True))


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), cut=st.integers(0, 9), seed=st.integers(0)
)
def test_sums_of_rows_do_not_depend_on_the_rows_beside_them(
    rows: int, columns: int, cut: int, seed: int
) -> None:
    values = draw(rows, columns, seed=seed % 2**60, dtype=torch.float64).square()
    whole = _sum_pairwise(values.clone())
    parts = torch.cat([_sum_pairwise(values[:cut].clone()), _sum_pairwise(values[cut:].clone())])
    assert torch.equal(whole, parts)
    torch.testing.assert_close(whole, values.sum(dim=1))


def test_no_step_is_longer_than_the_bound() -> None:
    """Plain gradient descent with rate 1 moves the weights by the clipped gradient."""
    workload = images()
    plain = recipe_of(learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    for bound, is_reached in ((0.1, True), (100.0, False)):
        model = built(ConvNet)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        train(model, workload, plain.model_copy(update={"max_gradient_norm": bound}), steps(1))
        free = built(ConvNet)
        train(free, workload, plain, steps(1))
        moved, unbound = (
            torch.cat([p.detach().flatten() for p in m.parameters()]) - before
            for m in (model, free)
        )
        if is_reached:
            assert moved.norm().item() == pytest.approx(bound, rel=1e-4)
            torch.testing.assert_close(moved / bound, unbound / unbound.norm(), atol=1e-5, rtol=0)
        else:
            assert torch.equal(moved, unbound)


def test_gradients_of_pruned_weights_do_not_count() -> None:
    workload, model = tanh_workload(), in_float64(TanhNet)
    recipe = recipe_of(
        microbatches=1, learning_rate=1.0, momentum=0.0, weight_decay=0.0, max_gradient_norm=0.01
    )
    masks = MaskSet({"0.weight": torch.arange(12).view(4, 3) % 3 == 0})
    masks.apply_(model)
    batch = first_batch(workload, 16)
    workload.loss(model(workload.train[0][batch]), workload.train[1][batch]).backward()
    model[0].weight.grad[~masks["0.weight"]] = 0
    kept = torch.cat([p.grad.flatten() for p in model.parameters()])
    before = [p.detach().clone() for p in model.parameters()]
    train(model, workload, recipe, steps(1), masks=masks)
    moved = torch.cat(
        [(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)]
    )
    torch.testing.assert_close(moved, kept * 0.01 / kept.norm())
