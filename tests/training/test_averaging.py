from __future__ import annotations

import copy

import pytest
import torch
from small_networks import ConvNet, built, images
from small_trainings import recipe_of, steps, train
from torch import Tensor, nn

from gbp_ray.pruning.masks import MaskSet
from gbp_ray.training.loop import Span
from gbp_ray.training.optimizer import MovingAverage, make_optimizer


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
