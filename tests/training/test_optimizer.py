"""Gradients that are clipped, averages of weights, and parts that are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import (
    ConvNet,
    SharedWeightNet,
    TanhNet,
    built,
    draw,
    images,
    in_float64,
    job_config,
)
from small_trainings import first_batch, recipe_of, steps, tanh_workload, train
from torch import Tensor, nn

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.loop import Span
from gbp_ray.training.optimizer import (
    MovingAverage,
    _sum_pairwise,
    check_freeze,
    clip_gradients,
    gradient_norm,
    make_optimizer,
    trainable_parameters,
)

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


def floating(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.double() for n, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_a_training_ends_with_the_average_of_what_each_step_made(decay: float) -> None:
    """By the recursion of the definition, over a training that takes the same steps unaveraged."""
    workload, plain, model = images(), built(ConvNet), built(ConvNet)
    optimizer = make_optimizer(plain, recipe_of())
    expected = floating(plain)
    for step in range(6):
        span = Span("finetune", range(step, step + 1), range(6))
        train(plain, workload, recipe_of(), span, optimizer)
        keeps = min(decay, (2 + step) / (11 + step))
        after = floating(plain)
        expected = {n: keeps * v + (1 - keeps) * after[n] for n, v in expected.items()}
    train(model, workload, recipe_of(ema_decay=decay), steps(6))
    torch.testing.assert_close(floating(model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.head.weight, plain.head.weight)
    assert model.norm1.num_batches_tracked == 6


def test_a_training_that_is_judged_on_the_way_goes_on_from_its_weights() -> None:
    """The average is in their place outside the parts, and at the end as without them."""
    workload, whole, parts = images(), built(ConvNet), built(ConvNet)
    recipe = recipe_of(ema_decay=0.9)
    train(whole, workload, recipe, steps(6))
    optimizer, average = make_optimizer(parts, recipe), MovingAverage(parts, 0.9)
    seen = []
    for part in (range(2), range(2, 5), range(5, 6)):
        span = Span("finetune", part, range(6))
        with average.set_aside():
            train(parts, workload, recipe, span, optimizer, average=average)
        seen.append(parts.head.weight.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value)


def test_pruned_weights_are_exactly_zero_in_the_average() -> None:
    workload, model = images(), built(ConvNet)
    masks = MaskSet({"conv2.weight": model.conv2.weight.detach().abs() > 0.05})
    masks.apply_(model)
    train(model, workload, recipe_of(ema_decay=0.9), steps(5), masks=masks)
    assert masks.find_revived(model) is None
    assert torch.count_nonzero(model.conv2.weight) == masks["conv2.weight"].sum()


def test_what_does_not_change_keeps_its_bits_and_what_is_frozen_is_left_alone() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("causal", torch.tensor([0.1, -torch.inf, torch.nan, 0.0, -0.0]))
    model.register_buffer("table", torch.arange(3))
    model.bias.requires_grad_(False)
    kept = copy.deepcopy(model.state_dict())
    average = MovingAverage(model, 0.7)
    with torch.no_grad():
        model.bias += 1
    for _ in range(3):
        average.update()
    average.swap()
    assert model.causal.numpy().tobytes()[:8] == kept["causal"].numpy().tobytes()[:8]
    torch.testing.assert_close(model.causal, kept["causal"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(model.weight, kept["weight"])
    assert torch.equal(model.bias, kept["bias"] + 1)
    assert torch.equal(model.table, kept["table"])


def changed(before: dict[str, Any], model: torch.nn.Module) -> set[str]:
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def test_what_is_frozen_keeps_its_bits_and_the_rest_moves() -> None:
    model = built(ConvNet)
    before = copy.deepcopy(model.state_dict())
    train(model, images(), recipe_of(freeze=("conv1.*", "norm1.*")), steps(3))
    moved = changed(before, model)
    assert moved == {n for n in before if not n.startswith(("conv1.", "norm1."))}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_running_statistics_move_unless_they_are_named() -> None:
    model = built(ConvNet)
    before = copy.deepcopy(model.state_dict())
    train(model, images(), recipe_of(freeze=("norm1.weight", "norm1.bias")), steps(3))
    moved = changed(before, model)
    assert {"norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked"} <= moved
    assert not {"norm1.weight", "norm1.bias"} & moved


def test_a_frozen_part_is_as_one_without_gradients() -> None:
    """The head learns as it would if plain torch had frozen the body in eval mode."""
    frozen, reference = built(ConvNet), built(ConvNet)
    body = ("conv*", "norm*")
    for model in (frozen, reference):
        model.dropout.p = 0.0
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name.startswith("head."))

    for norm in (reference.norm1, reference.norm2):
        norm.train = lambda mode=True: None  # stays as it is whatever it is told
        norm.training = False
    train(frozen, images(), recipe_of(freeze=body), steps(4))
    train(reference, images(), recipe_of(), steps(4))
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_a_tied_weight_is_frozen_by_any_of_its_names() -> None:
    model = built(SharedWeightNet)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    first = [name for name, _ in model.named_parameters()]
    (tied,) = set(names) - set(first)
    assert len(trainable_parameters(model, (tied,))) == len(first) - 1


def test_the_optimizer_holds_what_is_trained_alone() -> None:
    model = built(ConvNet)
    optimizer = make_optimizer(model, recipe_of(freeze=("conv*", "norm*")))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(model.head.weight), id(model.head.bias)}


def test_frozen_layers_are_scored_and_pruned_and_never_trained() -> None:
    freeze = ("conv*", "norm*")
    job = job_config(
        pretrain={"epochs": 1, "batch_size": 12},
        finetune={"epochs": 1, "batch_size": 12, "freeze": freeze},
        prune={"rounds": 2, "calibration_examples": 24, "batchnorm_examples": 0},
    )
    states = []
    for state in run_rounds(job, images(), Ranks()):
        weights = {n: t.clone() for n, t in state.model.state_dict().items()}
        states.append((weights, state.masks))
    dense = states[0][0]
    for weights, masks in states[1:]:
        assert not masks["conv1.weight"].all()
        for name, value in weights.items():
            expected = dense[name]
            if name in masks:
                expected = expected * masks[name]
            is_same = torch.equal(value, expected)
            assert is_same == name.startswith(("conv", "norm")), name


def test_globs_that_freeze_nothing_or_everything_are_refused() -> None:
    model = built(ConvNet)
    with pytest.raises(ConfigError, match=r"finetune\.freeze = 'conv9\.\*': matches no .*conv"):
        check_freeze(model, ("conv9.*",), "finetune")
    with pytest.raises(ConfigError, match=r"pretrain\.freeze: leaves nothing to train"):
        check_freeze(model, ("*",), "pretrain")
    job = job_config(finetune={"epochs": 1, "freeze": ["nothing"]})
    with pytest.raises(ConfigError, match=r"finetune\.freeze = 'nothing'"):
        check_job(job, images())


def test_movement_needs_weights_that_move() -> None:
    job = job_config(prune={"criterion": "movement"}, finetune={"epochs": 1, "freeze": ["conv1.*"]})
    with pytest.raises(ConfigError, match=r"'conv1\.weight' is frozen \(finetune\.freeze\)"):
        check_job(job, images())
