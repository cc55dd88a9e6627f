"""Whole units in a training loop of one's own: zeros while it trains, out of it at the end."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from pruner_program import UNIT_CASES, UnitNet, batch_of, optimizer_of
from small_networks import built
from torch import Tensor, nn
from torch.nn import functional

import gbp_ray
from gbp_ray.errors import GbpError
from gbp_ray.training.passes import count_macs

HALF = {"granularity": "channel", "target": {"macs": 0.5}}


def train_step(model: nn.Module, optimizer: Any, pruner: gbp_ray.Pruner, step: int) -> None:
    batch = batch_of(step, 0)
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    pruner.step(batch)
    optimizer.zero_grad()


@pytest.mark.parametrize("criterion", ["taylor", "taylor_squared", "fisher", "magnitude"])
def test_a_decision_is_that_of_pruning_at_once_on_the_batch(criterion: str) -> None:
    model, twin = built(UnitNet), built(UnitNet)
    batch = batch_of(1, 0)
    pruner = gbp_ray.Pruner(model, end=1, criterion=criterion, **HALF)
    assert repr(pruner).endswith(
        "to macs = 0.5 at step 1, now at step 0: units are found at the first step>"
    )
    assert pruner.step(batch)
    assert pruner.masks == gbp_ray.prune_model(twin, batch, criterion=criterion, **HALF)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    gone = sum(
        int((~pruner.masks[name].flatten(1).any(dim=1)).sum())
        for name in ("conv.weight", "body.0.weight")
    )
    assert pruner.sparsity == gone / 20
    assert repr(pruner).endswith(f"now at step 1: {pruner.sparsity:.2%} of 20 units>")


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("is_given", [True, False])
def test_units_stay_zero_in_training_and_leave_at_the_end(kind: str, is_given: bool) -> None:
    """With sigmoids, where columns that read a channel of zeros have gradients."""
    model = built(UnitNet)
    model.body[1] = nn.Sigmoid()
    optimizer = optimizer_of(model, kind)
    pruner = gbp_ray.Pruner(
        model, end=4, every=2, optimizer=optimizer if is_given else None, **HALF
    )
    parts = []
    for step in range(1, 7):
        train_step(model, optimizer, pruner, step)
        assert pruner.masks.find_revived(model) is None
        parts.append(pruner.sparsity)
        for name, p in model.named_parameters() if is_given and pruner.masks.round else ():
            gone = ~pruner.masks.get(name, torch.ones_like(p, dtype=torch.bool))
            state = [v for v in optimizer.state[p].values() if v.shape == p.shape]
            assert state
            assert all((value[gone] == 0).all() for value in state)
    assert parts == sorted(parts)
    assert 0 < parts[1] < parts[-1]
    twin, inputs = copy.deepcopy(model), batch_of(9, 0)[0]
    result = pruner.compact(inputs)
    assert result.macs == count_macs(model, inputs[:1]).total
    assert result.macs <= 0.5 * count_macs(twin, inputs[:1]).total
    torch.testing.assert_close(model(inputs), twin(inputs), rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer, pruner, 7)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    # Without the optimizer it goes on with the parameters that were there.
    assert all(moved) == is_given
    assert pruner.num_steps == 7


@pytest.mark.parametrize("case", ["gate", "moved"])
def test_a_training_that_goes_on_elsewhere_ends_in_the_same_bits(case: str) -> None:
    def make() -> tuple[nn.Module, Any, gbp_ray.Pruner]:
        model = built(UnitNet)
        optimizer = optimizer_of(model)
        fields = {"granularity": "channel", "end": 4, "every": 2, **UNIT_CASES[case]}
        return model, optimizer, gbp_ray.Pruner(model, optimizer=optimizer, **fields)

    whole = make()
    for step in range(1, 6):
        train_step(*whole, step)
    for stop in (0, 1, 2, 4):
        first, second = make(), make()
        for step in range(1, stop + 1):
            train_step(*first, step)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        for number in (2, 0, 1) if stop % 2 else (0, 1, 2):
            second[number].load_state_dict(states[number])
        assert second[2].sparsity == first[2].sparsity
        for step in range(stop + 1, 6):
            train_step(*second, step)
        for one, other in zip(second[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(one, other)
        assert second[2].masks == whole[2].masks
        assert second[2].masks.parent == whole[2].masks.parent
        assert repr(second[2]) == repr(whole[2])
    # Without another step.
    resumed = make()
    for number in range(3):
        resumed[number].load_state_dict(whole[number].state_dict())
    batch = batch_of(6, 0)
    assert resumed[2].compact(batch) == whole[2].compact(batch)


def test_more_rounds_than_a_job_may_have() -> None:
    model = built(UnitNet)
    pruner = gbp_ray.Pruner(model, end=2000, criterion="magnitude", schedule="linear", **HALF)
    batch = batch_of(1, 0)
    for _ in range(1000):
        pruner.step(batch)
    masks, everything = pruner.masks, copy.deepcopy(model)
    result = gbp_ray.compact(everything, masks, batch)
    assert 0.6 * result.macs_before < result.macs <= 0.75 * result.macs_before


class Stiff(UnitNet):
    """Its code knows the number of channels."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.conv(inputs)
        assert hidden.shape[1] == 8
        return self.head(self.body(hidden.flatten(1)))


MAKE: dict[str, tuple[dict[str, Any], str]] = {
    "no granularity": ({"granularity": "weight"}, "target.macs = 0.5: is met by removing whole "),
    "no sparsity": ({"target": None}, "sparsity: "),
    "kind": ({"granularity": "neuron"}, "granularity = 'neuron': must be "),
    "movement": ({"criterion": "movement"}, "optimizer: criterion = movement gathers its scores "),
    "idle": (
        {"granularity": "weight", "target": None, "sparsity": 0.5, "min_width": 2},
        "min_width: is of whole units, and granularity = 'weight' has none; ",
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_arguments_that_cannot_be_right_are_refused(name: str) -> None:
    fields, text = MAKE[name]
    with pytest.raises(GbpError) as caught:
        gbp_ray.Pruner(built(UnitNet), **{"end": 4, **HALF, **fields})
    assert str(caught.value).startswith(text), str(caught.value)


STEP: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no batch": (
        (),
        {"criterion": "magnitude"},
        "batch: granularity = 'channel' finds units by passing an example through the network; ",
    ),
    "no heads": ((batch_of(1, 0),), {"granularity": "head"}, "granularity = 'head': the network "),
    "shapes": (((batch_of(1, 0)[0][:, :1], batch_of(1, 0)[1]),), {}, "batch: a pass of 6 "),
    "labels": (((batch_of(1, 0)[0], batch_of(1, 0)[1] + 3),), {}, "batch: example "),
    "too little": ((batch_of(1, 0),), {"target": {"macs": 1e-4}}, "target.macs: allows "),
}


@pytest.mark.parametrize("name", STEP)
def test_what_does_not_suit_is_refused_at_the_first_step(name: str) -> None:
    batches, fields, text = STEP[name]
    model = built(fields.get("model", UnitNet))
    before = copy.deepcopy(model.state_dict())
    fields = {"end": 100, "every": 50, **HALF, **{k: v for k, v in fields.items() if k != "model"}}
    pruner = gbp_ray.Pruner(model, **fields)
    with pytest.raises(GbpError) as caught:
        pruner.step(*batches)
    assert str(caught.value).startswith(text), str(caught.value)
    assert pruner.num_steps == 0
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_units_that_the_code_of_a_network_cannot_go_without_stay() -> None:
    pruner = gbp_ray.Pruner(built(Stiff), end=1, **{**HALF, "target": None, "sparsity": 0.5})
    pruner.step(batch_of(1, 0))
    assert pruner.masks.num_pruned > 0
    assert "conv.weight" not in pruner.masks


def test_units_leave_only_after_the_last_round_and_single_weights_never() -> None:
    batch = batch_of(1, 0)
    pruner = gbp_ray.Pruner(built(UnitNet), end=2, **HALF)
    pruner.step(batch)
    with pytest.raises(GbpError, match=r"^compact: the last round is after step 2, now at step 1"):
        pruner.compact(batch)
    of_weights = gbp_ray.Pruner(built(UnitNet), end=1, sparsity=0.5)
    of_weights.step(batch)
    with pytest.raises(GbpError, match=r"^granularity = 'weight': removes single weights, which "):
        of_weights.compact(batch)


def test_states_of_other_networks_and_arguments_are_refused() -> None:
    pruner = gbp_ray.Pruner(built(UnitNet), end=1, **HALF)
    pruner.step(batch_of(1, 0))
    state = pruner.state_dict()
    other = gbp_ray.Pruner(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), end=1, **HALF)
    with pytest.raises(GbpError, match=r"^target: has no '"):
        other.load_state_dict(state)
    other = gbp_ray.Pruner(built(UnitNet), end=1, granularity="channel", target={"macs": 0.6})
    with pytest.raises(GbpError, match=r"^target = .*: the state was saved with target = "):
        other.load_state_dict(state)
