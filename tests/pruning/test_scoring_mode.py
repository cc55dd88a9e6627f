"""Scoring sees the examples that it should, and leaves the model as it was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from oracles import (
    DATA_FREE_CRITERIA,
    GRADIENT_CRITERIA,
    LAYER_CRITERIA,
    NUM_EXAMPLES,
    assert_scores,
    config_of,
    flat,
    recorded,
    tiny,
)
from small_networks import ConvNet, TanhNet, built, images, in_float64, prune_config, scores_of
from torch import Tensor, nn

from gbp_ray.errors import PruneError

# -- the model is left as it was found -------------------------------------------------------------


def assert_mixed_modes(model: nn.Module) -> None:
    training = {name for name, module in model.named_modules() if module.training}
    assert training == {"", "conv1", "conv2", "norm2", "dropout", "head"}


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *LAYER_CRITERIA, *DATA_FREE_CRITERIA])
def test_scoring_leaves_modes_weights_gradients_and_random_state_alone(name: str) -> None:
    model = built(ConvNet).train()
    model.norm1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes_inside: set[bool] = set()
    hook = model.dropout.register_forward_hook(
        lambda module, args, output: modes_inside.add(module.training)
    )
    random_state = torch.get_rng_state()
    scores_of(model, images(), config_of(name, calibration_examples=NUM_EXAMPLES))
    hook.remove()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes_inside <= {False}
    assert bool(modes_inside) == (name not in ("magnitude", "random"))
    assert_mixed_modes(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modes_come_back_after_a_refusal() -> None:
    model = built(ConvNet).train()
    model.norm1.eval()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(PruneError):
        scores_of(model, images(), config_of("taylor"))
    assert_mixed_modes(model)


class CountingNet(nn.Module):
    """Writes its buffers in eval mode too, and computes with one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs) * self.level.clone()
        self.calls.add_(1)
        self.level.add_(0.5)
        return outputs


@pytest.mark.parametrize(
    # A functional gradient refuses to write a buffer, so fisher is no such model's criterion.
    "name",
    [n for n in [*GRADIENT_CRITERIA, *LAYER_CRITERIA, *DATA_FREE_CRITERIA] if n != "fisher"],
)
def test_buffers_are_put_back(name: str) -> None:
    model = in_float64(CountingNet)
    calls, level = model.calls, model.level
    scores_of(model, tiny(), config_of(name))
    assert model.calls is calls
    assert model.level is level
    assert (int(calls), float(level)) == (0, 1.0)


class DecidingNet(nn.Module):
    """Decides by a value, which a pass over many single examples at once cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("spread", torch.full((2,), torch.nan))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return outputs if outputs.sum() > 0 else -outputs


class BindingNet(nn.Module):
    """Binds a buffer anew and then writes another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CountingNet()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = self.mean + inputs.detach().mean(dim=0)
        return self.inner(inputs - self.mean)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (CountingNet, "it writes buffers 'calls', 'level' in eval mode; write such only while"),
        (BindingNet, "it writes buffers 'mean', 'inner.calls', 'inner.level' in eval mode;"),
    ],
    ids=["writes buffers", "binds a buffer"],
)
def test_fisher_says_why_single_examples_cannot_be_differentiated(
    build: Callable[[], nn.Module], reason: str
) -> None:
    model = in_float64(build)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    wanted = rf"^prune\.criterion = fisher: single examples .*{reason}.*, or choose taylor_squared$"
    with pytest.raises(PruneError, match=wanted) as caught:
        scores_of(model, tiny(), config_of("fisher"))
    assert len(str(caught.value)) < 400
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        torch.testing.assert_close(buffer, before[name][1], equal_nan=True, rtol=0, atol=0)


def test_fisher_takes_single_examples_where_torch_cannot_vectorise_them() -> None:
    model, workload = in_float64(DecidingNet), tiny()
    expected_N = torch.zeros(6, dtype=torch.float64)
    for inputs, targets in zip(*workload.train, strict=True):
        loss = workload.loss(model(inputs[None]), targets[None])
        (gradient,) = torch.autograd.grad(loss, [model.layer.weight])
        expected_N += gradient.reshape(-1).square() / NUM_EXAMPLES
    expected_N *= model.layer.weight.detach().reshape(-1).square()
    assert_scores(scores_of(model, workload, config_of("fisher")), expected_N)
    assert bool(model.spread.isnan().all())


def test_each_batch_sees_the_buffers_as_they_were_at_first() -> None:
    model = in_float64(CountingNet)
    workload = tiny()
    scores = scores_of(model, workload, config_of("taylor"))
    plain = in_float64(lambda: nn.Linear(3, 2))
    plain.load_state_dict(model.layer.state_dict())
    assert_scores(scores, flat(scores_of(plain, workload, config_of("taylor"))))


# -- augmentation ----------------------------------------------------------------------------------


def triple(inputs: Tensor) -> Tensor:
    return inputs * 3


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *LAYER_CRITERIA])
@pytest.mark.parametrize("is_augmented", [True, False])
def test_calibration_augment_decides_whether_examples_are_augmented(
    name: str, is_augmented: bool
) -> None:
    model = in_float64(TanhNet)
    plain = tiny()
    inputs, targets = plain.train
    seen = dataclasses.replace(plain, train=(triple(inputs) if is_augmented else inputs, targets))
    rule = config_of(name, calibration_augment=is_augmented)
    scores = scores_of(model, dataclasses.replace(plain, augment=triple), rule)
    assert torch.equal(flat(scores), flat(scores_of(model, seen, rule)))


def test_random_augmentation_repeats_with_the_seed_and_differs_between_batches() -> None:
    model = built(ConvNet)
    zeros = torch.zeros(NUM_EXAMPLES, 2, 6, 6)
    labels = torch.zeros(NUM_EXAMPLES, dtype=torch.long)

    def noise_of(seed: int, disturbance: int) -> Tensor:
        blank = dataclasses.replace(images(), train=(zeros, labels))
        workload, batches = recorded(blank)
        torch.manual_seed(disturbance)
        scores_of(model, workload, config_of("taylor"), seed=seed)
        return torch.cat(batches)

    noise = noise_of(0, 1)
    assert len({tuple(example.flatten().tolist()) for example in noise}) == NUM_EXAMPLES
    assert torch.equal(noise, noise_of(0, 2))
    assert not torch.equal(noise, noise_of(1, 1))


def test_both_passes_of_grasp_see_the_same_augmented_examples() -> None:
    workload, batches = recorded(images(num_train=NUM_EXAMPLES))
    scores_of(built(ConvNet), workload, config_of("grasp"))
    assert len(batches) == 6
    for first, second in zip(batches[:3], batches[3:], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rule", ["taylor", "fisher", "obd", "grasp", "synflow"])
def test_frozen_weights_are_scored_like_others_and_stay_frozen(rule: str) -> None:
    workload, config = images(), prune_config(rule, calibration_examples=16)
    model = built(ConvNet)
    expected = scores_of(model, workload, config)
    model.conv1.weight.requires_grad_(False)
    found = scores_of(model, workload, config)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not model.conv1.weight.requires_grad
