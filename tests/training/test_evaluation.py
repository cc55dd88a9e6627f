"""Figures of the test split, statistics of BatchNorm, and the data that spoils them."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from small_networks import (
    ONE_RANK,
    UNEVEN,
    ConvNet,
    TanhNet,
    built,
    images,
    in_float64,
    prune_config,
    scores_of,
    uneven,
)
from small_trainings import SEED, recipe_of, steps, tanh_workload, train
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from gbp_ray.errors import WorkloadError
from gbp_ray.training.batchnorm import recalibrate_batchnorm
from gbp_ray.training.evaluation import evaluate
from gbp_ray.training.progress import Progress
from gbp_ray.workloads.contract import count_top1
from gbp_ray.workloads.data import derive_seed, seeded, shuffled_indices

# -- BatchNorm -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "batch_size"), [(40, 16), (46, 9), (1000, 46), (30, 10)])
def test_recalibration_equals_a_direct_computation(examples: int, batch_size: int) -> None:
    workload, model = images(), built(ConvNet)
    train(model, workload, recipe_of(), steps(2))
    model.norm1.momentum, model.norm2.momentum = 0.3, None
    twin = copy.deepcopy(model).double()
    before = copy.deepcopy(model.state_dict())
    used = recalibrate_batchnorm(
        model, workload, ONE_RANK, examples=examples, batch_size=batch_size, seed=SEED
    )

    # Each norm's input, with norms in training and the dropout off.
    twin.eval()
    norms = {"norm1": twin.norm1, "norm2": twin.norm2}
    arrived: dict[str, Tensor] = {}
    for name, norm in norms.items():
        norm.train()
        norm.register_forward_pre_hook(
            lambda _, inputs, name=name: arrived.__setitem__(name, inputs[0].detach())
        )
    chosen = shuffled_indices(46, derive_seed(SEED, "batchnorm"))[: min(examples, 46)]
    total, sums = 0, {name: [torch.zeros(8).double(), torch.zeros(8).double()] for name in norms}
    for number, batch in enumerate(chosen.split(batch_size)):
        if len(batch) == 1:
            continue
        with seeded(derive_seed(SEED, "batchnorm", number)):
            pixels = workload.augment(workload.train[0][batch])
        twin(pixels.double())
        total += len(batch)
        for name, value in arrived.items():
            sums[name][0] += len(batch) * value.mean(dim=(0, 2, 3))
            sums[name][1] += len(batch) * value.var(dim=(0, 2, 3))
    assert used == total
    after = model.state_dict()
    for name, (means, variances) in sums.items():
        for key, value in (("running_mean", means), ("running_var", variances)):
            torch.testing.assert_close(
                after[f"{name}.{key}"].double(), value / total, rtol=1e-5, atol=1e-6
            )
            del before[f"{name}.{key}"]
    # All else is as before.
    for key, value in before.items():
        assert torch.equal(after[key], value)
    assert (model.norm1.momentum, model.norm2.momentum) == (0.3, None)
    assert not any(module.training for module in model.modules())


class TwiceNormed(nn.Module):
    """Calls one norm three times, another once and a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.BatchNorm1d(3)
        self.idle = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(inputs)
        hidden = self.norm(torch.tanh(hidden + inputs) + 2)
        return self.head(self.last(self.norm(hidden.exp())))


def test_a_norm_of_several_calls_is_estimated_from_all_of_them() -> None:
    """By functional batch_norm, one call and one batch after another."""
    workload, model = tanh_workload(), in_float64(TwiceNormed)
    examples, size = 20, 8
    used = recalibrate_batchnorm(
        model, workload, ONE_RANK, examples=examples, batch_size=size, seed=SEED
    )
    assert used == examples

    def normed(inputs: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        return functional.batch_norm(
            inputs, None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )

    expected = {name: torch.zeros(2, 3, dtype=torch.float64) for name in ("norm", "last")}
    chosen = shuffled_indices(23, derive_seed(SEED, "batchnorm"))[:examples]
    for batch in chosen.split(size):
        inputs = workload.train[0][batch]
        first = inputs
        second = torch.tanh(normed(first, model.norm) + inputs) + 2
        third = normed(second, model.norm).exp()
        fourth = normed(third, model.norm)
        share = len(batch) / examples
        for call in (first, second, third):
            expected["norm"] += share / 3 * torch.stack([call.mean(0), call.var(0)]).detach()
        expected["last"] += share * torch.stack([fourth.mean(0), fourth.var(0)]).detach()
    for name, statistics in expected.items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(torch.stack([norm.running_mean, norm.running_var]), statistics)
    assert torch.equal(model.idle.running_mean, torch.zeros(3).double())
    assert torch.equal(model.idle.running_var, torch.ones(3).double())
    assert not any(module._forward_hooks for module in model.modules())


def test_recalibration_does_nothing_where_there_is_nothing_to_do() -> None:
    workload, model = images(), built(ConvNet)
    before = copy.deepcopy(model.state_dict())
    options = {"batch_size": 8, "seed": SEED}
    assert recalibrate_batchnorm(model, workload, ONE_RANK, examples=0, **options) == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    plain = tanh_workload()
    assert recalibrate_batchnorm(built(TanhNet), plain, ONE_RANK, examples=9, **options) == 0


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 29, 100])
def test_evaluation_equals_a_direct_computation(batch_size: int) -> None:
    workload, model = images(), built(ConvNet)
    train(model, workload, recipe_of(), steps(2))
    twin = copy.deepcopy(model).eval()
    before = copy.deepcopy(model.state_dict())
    told: list[Progress] = []
    accuracy, loss = evaluate(model, workload, ONE_RANK, batch_size, on_progress=told.append)[:2]
    pixels, labels = workload.test
    with torch.no_grad():
        outputs = twin(pixels)
    right = sum(int(row.argmax()) == int(label) for row, label in zip(outputs, labels, strict=True))
    log_shares = outputs.double().log_softmax(dim=1)
    assert accuracy == right / 29
    assert loss == pytest.approx(-log_shares[torch.arange(29), labels].mean().item(), rel=1e-5)
    num_batches = math.ceil(29 / batch_size)
    assert told == [Progress("evaluate", i, num_batches) for i in range(1, num_batches + 1)]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Pairs(Dataset):
    """The same examples as a tuple, but seen only one by one."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


@pytest.mark.parametrize("loss", [functional.cross_entropy, smoothed])
def test_a_label_out_of_range_is_named_where_it_is_met(loss: Any) -> None:
    workload = images()
    pixels, labels = (column.clone() for column in workload.train)
    labels[33] = 3
    strange = dataclasses.replace(workload, train=Pairs(pixels, labels), loss=loss)
    with pytest.raises(WorkloadError, match=r"^workload\.train: .*example 33\b"):
        train(built(ConvNet), strange, recipe_of(), steps(3))
    with pytest.raises(WorkloadError, match=r"^workload\.train: .*example 33\b"):
        scores_of(built(ConvNet), strange, prune_config())
    pixels, labels = (column.clone() for column in workload.test)
    labels[28] = 3
    strange = dataclasses.replace(workload, test=Pairs(pixels, labels), loss=loss)
    with pytest.raises(WorkloadError, match=r"^workload\.test: .*example 28\b"):
        evaluate(built(ConvNet), strange, ONE_RANK, 8)


def test_a_test_input_that_is_not_finite_is_named_and_not_the_learning_rate() -> None:
    workload = images()
    pixels, labels = (column.clone() for column in workload.test)
    pixels[17, 0, 3, 3] = math.nan
    strange = dataclasses.replace(workload, test=(pixels, labels))
    with pytest.raises(WorkloadError, match=r"^workload\.test: the input of example 17,"):
        evaluate(built(ConvNet), strange, ONE_RANK, 8)


def test_weights_that_are_not_finite_are_no_fault_of_the_data() -> None:
    model = built(ConvNet)
    torch.nn.init.constant_(model.head.bias, math.nan)
    assert math.isnan(evaluate(model, images(), ONE_RANK, 8)[1])


# -- means over other things than examples ---------------------------------------------------------


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("batch_size", [1, 7, 29])
def test_a_loss_is_that_of_the_whole_split_whatever_the_batch_size(
    kind: str, batch_size: int
) -> None:
    """Against torch's own loss over the split in one batch."""
    workload, model = uneven(kind), in_float64(UNEVEN[kind].build)
    inputs, targets = workload.test
    outputs = model(inputs)
    accuracy, loss = evaluate(model, workload, ONE_RANK, batch_size)[:2]
    assert loss == pytest.approx(UNEVEN[kind].loss(outputs, targets).item(), rel=1e-12)
    if workload.count_correct is count_top1:
        asked = targets != UNEVEN[kind].ignored
        right = ((outputs.argmax(1) == targets) & asked).sum().item()
        assert accuracy == right / asked.sum().item()


def test_a_split_without_any_label_is_refused() -> None:
    workload = uneven("positions")
    inputs, targets = workload.test
    bare = dataclasses.replace(workload, test=(inputs, torch.full_like(targets, -100)))
    with pytest.raises(WorkloadError, match=r"^workload\.test: none of its 29 examples has a lab"):
        evaluate(in_float64(UNEVEN["positions"].build), bare, ONE_RANK, 8)


def test_more_right_answers_than_examples_are_refused_wherever_they_come_up() -> None:
    def count(outputs: Tensor, targets: Tensor) -> int:
        return len(targets) + bool((targets == 2).any() and len(targets) == 5)

    workload = dataclasses.replace(images(), count_correct=count)
    assert evaluate(built(ConvNet), workload, ONE_RANK, 29)[0] == 1
    with pytest.raises(WorkloadError, match=r"^workload\.count_correct: counts 6 right answers am"):
        evaluate(built(ConvNet), workload, ONE_RANK, 8)
