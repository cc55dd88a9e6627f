from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import (
    UNEVEN,
    ConvNet,
    TanhNet,
    built,
    draw,
    images,
    in_float64,
    prune_config,
    uneven,
)
from small_trainings import first_batch, recipe_of, steps, tanh_workload, train
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from gbp_ray.config.training import DistillationConfig
from gbp_ray.errors import PruneError, WorkloadError
from gbp_ray.pruning.masks import MaskSet, check_pruned_zero, forget_pruned
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.distillation import Teacher
from gbp_ray.training.loop import Span
from gbp_ray.training.optimizer import learning_rate, make_optimizer, num_steps
from gbp_ray.training.progress import Progress

OPTIMIZERS = ("sgd", "adam", "adamw")


def half_of(model: nn.Module) -> MaskSet:
    """Keeps the greater half of the weights."""
    units = prunable_parameters(model)
    scores = {u.name: u.parameter.detach().abs() for u in units}
    return select_masks(scores, MaskSet.dense(units), prune_config("magnitude"), 0.5).masks


def states_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


# -- pruned weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_their_state_stay_exactly_zero(name: str) -> None:
    workload, model = images(), built(ConvNet)
    recipe = recipe_of(optimizer=name, momentum=0.9, weight_decay=0.1, learning_rate=0.01)
    optimizer = make_optimizer(model, recipe)
    # Dense steps first: the optimizer then remembers something about every weight.
    train(model, workload, recipe, steps(3), optimizer)
    masks = half_of(model)
    masks.apply_(model)
    forget_pruned(model, optimizer, masks)
    before = copy.deepcopy(model.state_dict())
    train(model, workload, recipe, steps(9, start=3), optimizer, masks=masks)
    parameters = dict(model.named_parameters())
    for weight_name, mask in masks.items():
        weight = parameters[weight_name]
        assert torch.count_nonzero(weight[~mask]) == 0
        assert not torch.equal(weight[mask], before[weight_name][mask])
        states = states_of(optimizer, weight)
        assert len(states) == (1 if name == "sgd" else 2)
        for state in states.values():
            assert torch.count_nonzero(state[~mask]) == 0
            assert torch.count_nonzero(state[mask]) > 0
    check_pruned_zero(model, optimizer, masks)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forgetting_touches_pruned_weights_alone(name: str) -> None:
    workload, model = images(), built(ConvNet)
    recipe = recipe_of(optimizer=name)
    optimizer = make_optimizer(model, recipe)
    train(model, workload, recipe, steps(2), optimizer)
    masks = half_of(model)
    before = copy.deepcopy(optimizer.state_dict())["state"]
    forget_pruned(model, optimizer, masks)
    after = optimizer.state_dict()["state"]
    for number, (weight_name, parameter) in enumerate(model.named_parameters()):
        for key, value in before[number].items():
            expected = value
            if weight_name in masks and torch.is_tensor(value) and value.shape == parameter.shape:
                expected = torch.where(masks[weight_name], value, 0)
            torch.testing.assert_close(after[number][key], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_planted_revivals_are_caught(name: str) -> None:
    workload, model = images(), built(ConvNet)
    recipe = recipe_of(optimizer=name)
    optimizer = make_optimizer(model, recipe)
    masks = half_of(model)
    masks.apply_(model)
    train(model, workload, recipe, steps(2), optimizer, masks=masks)
    check_pruned_zero(model, optimizer, masks)
    weight = model.get_parameter("conv2.weight")
    place = tuple((~masks["conv2.weight"]).nonzero()[3].tolist())
    for tensor, key in [
        (weight.data, None),
        *((state, key) for key, state in states_of(optimizer, weight).items()),
    ]:
        for planted in (1e-45, math.nan):
            tensor[place] = planted
            wanted = rf"'conv2\.weight'.*{key or 'came back to life'}"
            with pytest.raises(PruneError, match=wanted):
                check_pruned_zero(model, optimizer, masks)
        tensor[place] = 0
        check_pruned_zero(model, optimizer, masks)
    check_pruned_zero(model, None, masks)


def test_movement_sees_gradients_of_pruned_weights_before_the_step() -> None:
    workload, model = tanh_workload(), in_float64(TanhNet)
    masks = half_of(model)
    masks.apply_(model)
    batch = first_batch(workload, 16)
    twin = copy.deepcopy(model)
    workload.loss(twin(workload.train[0][batch]), workload.train[1][batch]).backward()
    seen: list[dict[str, Tensor]] = []

    def note(gradients: dict[str, Tensor]) -> None:
        seen.append({name: g.clone() for name, g in gradients.items()})
        for name, value in model.named_parameters():
            assert torch.equal(value, twin.get_parameter(name))

    train(model, workload, recipe_of(), steps(1), masks=masks, movement=note)
    expected = {name: p.grad for name, p in twin.named_parameters()}
    torch.testing.assert_close(seen, [expected])
    assert all(torch.count_nonzero(seen[0][n][~m]) > 0 for n, m in masks.items())


# -- against plain torch ---------------------------------------------------------------------------


def test_sgd_with_one_part_equals_plain_torch() -> None:
    workload, model = images(), built(lambda: ConvNet(dropout=0))
    workload = dataclasses.replace(workload, augment=None)
    twin = copy.deepcopy(model)
    recipe = recipe_of(microbatches=1, weight_decay=0.01, momentum=0.8)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.8, weight_decay=0.01)
    twin.train()
    optimizer = make_optimizer(model, recipe)
    order = first_batch(workload, 32)
    for step in range(2):
        batch = order[16 * step : 16 * (step + 1)]
        expected = functional.cross_entropy(
            twin(workload.train[0][batch]), workload.train[1][batch]
        )
        plain.zero_grad()
        expected.backward()
        plain.step()
        loss = train(
            model, workload, recipe, Span("finetune", range(step, step + 1), range(2)), optimizer
        )
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        if step == 0:
            for name, value in twin.named_parameters():
                assert torch.equal(model.get_parameter(name), value)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_with_its_schedule_equals_plain_torch(name: str) -> None:
    """Several steps, float64, a cosine by torch's own scheduler."""
    workload, model = tanh_workload(), in_float64(TanhNet)
    twin = copy.deepcopy(model)
    recipe = recipe_of(
        optimizer=name, lr_schedule="cosine", microbatches=1, batch_size=23, weight_decay=0.1
    )
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    plain = kinds[name](twin.parameters(), lr=0.05, weight_decay=0.1, **momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, T_max=6)
    for _ in range(6):
        plain.zero_grad()
        workload.loss(twin(workload.train[0]), workload.train[1]).backward()
        plain.step()
        schedule.step()
    train(model, workload, recipe, steps(6))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)


class PartlyUsed(TanhNet):
    """`spare` is in no pass; `odd` is in those of inputs that are positive somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.odd = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self[2](self[1](self[0](inputs)))
        return outputs + self.odd(inputs) if inputs.sum() > 0 else outputs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_gets_no_gradient_is_left_alone_as_by_plain_torch(name: str) -> None:
    """Neither weight decay nor momentum moves it."""
    workload, model = tanh_workload(total=20), in_float64(PartlyUsed)
    twin = copy.deepcopy(model)
    recipe = recipe_of(optimizer=name, microbatches=1, batch_size=5, weight_decay=0.1)
    plain = make_optimizer(twin, recipe)
    order, used = first_batch(workload, 20), 0
    for batch in order.split(5):
        plain.zero_grad()
        used += bool(workload.train[0][batch].sum() > 0)
        workload.loss(twin(workload.train[0][batch]), workload.train[1][batch]).backward()
        plain.step()
    before = {key: value.clone() for key, value in model.spare.state_dict().items()}
    optimizer = make_optimizer(model, recipe)
    train(model, workload, recipe, steps(4), optimizer, masks=half_of(model))
    assert 0 < used < 4
    assert all(torch.equal(value, before[key]) for key, value in model.spare.state_dict().items())
    assert model.spare.weight not in optimizer.state
    model = in_float64(PartlyUsed)
    train(model, workload, recipe, steps(4))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_change_nothing_without_batchnorm(name: str) -> None:
    workload = tanh_workload()
    results = []
    for parts in (1, 2, 3, 7, 10):
        model = in_float64(TanhNet)
        masks = half_of(model)
        masks.apply_(model)
        recipe = recipe_of(optimizer=name, batch_size=10, microbatches=parts)
        loss = train(model, workload, recipe, steps(7), masks=masks)
        results.append((loss, model.state_dict()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", UNEVEN)
def test_parts_of_an_uneven_loss_are_joined_by_what_they_count(kind: str) -> None:
    """Against plain torch over the whole batch."""
    workload, model = uneven(kind), in_float64(UNEVEN[kind].build)
    inputs, targets = workload.train
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05)
    for step in range(2):
        batch = first_batch(workload, 32)[16 * step : 16 * (step + 1)]
        plain.zero_grad()
        expected = UNEVEN[kind].loss(twin(inputs[batch]), targets[batch])
        expected.backward()
        plain.step()
    # Parts of one and of two examples, of which some have no label at all.
    recipe = recipe_of(microbatches=13, momentum=0.0, weight_decay=0.0)
    items = dataclasses.replace(workload, train=TensorDataset(inputs, targets))
    for data in (workload, items):
        learner = copy.deepcopy(model)
        loss = train(learner, data, recipe, steps(2))
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        torch.testing.assert_close(learner.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)


def test_what_a_teacher_says_counts_by_example_and_a_batch_without_labels_teaches_nothing() -> None:
    workload, model = uneven("positions"), in_float64(UNEVEN["positions"].build)
    teacher = Teacher(in_float64(UNEVEN["positions"].build, 1), DistillationConfig(weight=0.5))
    found = []
    for parts in (1, 13):
        learner = copy.deepcopy(model)
        loss = train(learner, workload, recipe_of(microbatches=parts), steps(2), teacher=teacher)
        found.append((loss, learner.state_dict()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    inputs, targets = workload.train
    bare = dataclasses.replace(workload, train=(inputs, torch.full_like(targets, -100)))
    learner = copy.deepcopy(model)
    assert math.isnan(train(learner, bare, recipe_of(weight_decay=0.0), steps(1)))
    torch.testing.assert_close(learner.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_batchnorm_moves_by_the_mean_of_what_the_parts_do() -> None:
    model = built(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    workload = tanh_workload(torch.float32)
    train(model, workload, recipe_of(batch_size=10, microbatches=3), steps(1))
    parts = workload.train[0][first_batch(workload, 10)].tensor_split(3)
    assert [len(part) for part in parts] == [4, 3, 3]
    mean = sum(len(part) / 10 * part.mean(0) for part in parts)
    variance = sum(len(part) / 10 * part.var(0) for part in parts)
    norm = model[0]
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
    assert norm.num_batches_tracked == 1


def test_spans_join_into_one_training() -> None:
    workload = images()
    recipe = recipe_of(lr_schedule="cosine", warmup_epochs=1)
    planned = range(0, 7)
    whole, pieces = built(ConvNet), built(ConvNet)
    train(whole, workload, recipe, Span("finetune", planned, planned))
    optimizer = make_optimizer(pieces, recipe)
    for piece in (range(0, 3), range(3, 4), range(4, 7)):
        train(pieces, workload, recipe, Span("finetune", piece, planned), optimizer)
    torch.testing.assert_close(pieces.state_dict(), whole.state_dict(), rtol=0, atol=0)


class Constants(nn.Module):
    """A network with buffers that no forward pass changes, infinite ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", draw(3, seed=8) * 1e-3)
        self.register_buffer("wide", draw(4, seed=9, dtype=torch.float64))
        self.register_buffer("causal", torch.full((3, 3), -math.inf).triu(1))
        self.register_buffer("signed", torch.tensor([0.0, -0.0]))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("flags", torch.tensor([True, False, True]))

    def forward(self, inputs: Tensor) -> Tensor:
        weights = torch.softmax(self.causal, dim=1)
        return self.fc(self.norm(inputs) @ weights * (1 + self.scale))


CONSTANTS = ("scale", "wide", "causal", "signed", "table", "flags")


def bytes_of(value: Tensor) -> bytes:
    return value.numpy().tobytes()


@pytest.mark.parametrize("parts", [1, 3])
def test_constant_buffers_keep_their_bits(parts: int) -> None:
    model = built(Constants)
    before = {name: bytes_of(model.get_buffer(name)) for name in CONSTANTS}
    running = model.norm.running_mean.clone()
    recipe = recipe_of(microbatches=parts, batch_size=10)
    train(model, tanh_workload(torch.float32), recipe, steps(5))
    assert {name: bytes_of(model.get_buffer(name)) for name in CONSTANTS} == before
    assert not torch.equal(model.norm.running_mean, running)
    assert model.norm.num_batches_tracked == 5


# -- steps and learning rates ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "batch_size", "expected"),
    # 46 examples make 2 whole batches of 16.
    [(0, 16, 0), (0.01, 16, 1), (0.5, 16, 1), (1, 16, 2), (2.5, 16, 5), (3, 100, 3), (1, 46, 1)],
)
def test_num_steps(epochs: float, batch_size: int, expected: int) -> None:
    assert num_steps(recipe_of(batch_size=batch_size), images(), epochs) == expected


def test_cosine_runs_from_the_peak_down_to_nearly_zero() -> None:
    recipe = recipe_of(lr_schedule="cosine", learning_rate=0.4)
    rates = [learning_rate(recipe, step, 100, 0) for step in range(100)]
    assert rates[0] == 0.4
    assert rates[50] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.4 * math.sin(math.pi / 200) ** 2)
    assert rates == sorted(rates, reverse=True)


def test_cosine_equals_torch() -> None:
    recipe = recipe_of(lr_schedule="cosine", learning_rate=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
    for step in range(17):
        ours = learning_rate(recipe, step, 17, 0)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warm_up_rises_in_a_line_to_the_full_rate(schedule: str) -> None:
    recipe = recipe_of(lr_schedule=schedule, learning_rate=0.8)
    rates = [learning_rate(recipe, step, 20, 4) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert max(rates) == 0.8
    if schedule == "constant":
        assert set(rates[3:]) == {0.8}


def test_step_drops_at_the_milestones_of_what_follows_the_warm_up() -> None:
    recipe = recipe_of(
        lr_schedule="step", learning_rate=1.0, lr_milestones=(0.5, 0.75), lr_gamma=0.1
    )
    rates = [learning_rate(recipe, step, 10, 2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@settings(max_examples=60)
@given(
    schedule=st.sampled_from(["constant", "cosine", "step"]),
    total=st.integers(1, 50),
    warmup=st.integers(0, 60),
)
def test_rates_are_positive_and_never_above_the_peak(
    schedule: str, total: int, warmup: int
) -> None:
    recipe = recipe_of(lr_schedule=schedule, learning_rate=0.7)
    rates = [learning_rate(recipe, step, total, warmup) for step in range(total)]
    assert all(0 < rate <= 0.7 for rate in rates)
    after = rates[warmup:]
    assert after == sorted(after, reverse=True)


def test_training_takes_the_planned_rate_and_reports_each_step() -> None:
    workload, model = tanh_workload(), in_float64(TanhNet)
    recipe = recipe_of(lr_schedule="cosine", warmup_epochs=2, batch_size=10)
    optimizer = make_optimizer(model, recipe)
    told: list[Progress] = []
    rates: list[float] = []

    def note(progress: Progress) -> None:
        told.append(progress)
        rates.append(optimizer.param_groups[0]["lr"])

    span = Span("finetune", range(13, 33), range(10, 40))
    mean = train(model, workload, recipe, span, optimizer, on_progress=note)
    # 23 examples make 2 whole batches of 10, so two epochs of warm-up are 4 steps.
    assert rates == [learning_rate(recipe, step - 10, 30, 4) for step in range(13, 33)]
    assert [(one.done, one.total) for one in told] == [(i, 20) for i in range(1, 21)]
    assert mean == pytest.approx((told[-1].loss + told[-2].loss) / 2)
    assert math.isnan(train(model, workload, recipe, steps(3, start=3), optimizer))


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_weights_move(phase: str, value: float) -> None:
    recipe = recipe_of(batch_size=8, microbatches=2, learning_rate=0.03)
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # The second part of the third step.
        return functional.mse_loss(outputs, targets) + (value if calls == 6 else 0.0)

    workload = tanh_workload()
    expected, model = in_float64(TanhNet), in_float64(TanhNet)
    train(expected, workload, recipe, Span(phase, range(4, 6), range(9)))
    broken = dataclasses.replace(workload, loss=loss)
    wanted = rf"^{phase}: loss is {value:g} at step 3 of 5; lower {phase}\.learning_rate = 0\.03"
    with pytest.raises(PruneError, match=wanted):
        train(model, broken, recipe, Span(phase, range(4, 9), range(9)))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_an_example_that_is_not_finite_is_named_where_its_loss_is_not() -> None:
    workload = tanh_workload()
    inputs, targets = workload.train
    holed = inputs.clone()
    holed[5] = math.nan
    broken = dataclasses.replace(workload, train=(holed, targets))
    with pytest.raises(WorkloadError, match=r"^workload\.train: the input of example 5, as"):
        train(in_float64(TanhNet), broken, recipe_of(batch_size=len(inputs)), steps(1))


def test_a_non_finite_gradient_names_its_parameter() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        # The square root of zero is finite; its slope is not.
        return torch.sqrt((outputs * 0).abs().sum() + 0 * targets.sum())

    model = nn.Sequential(nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    workload = dataclasses.replace(tanh_workload(torch.float32), loss=loss)
    with pytest.raises(PruneError, match=r"^finetune: gradient of '0\.weight' is not finite at"):
        train(model, workload, recipe_of(), steps(2))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
