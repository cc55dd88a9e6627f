"""Removing units for good: the smaller network is held against the masked one."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from structures import (
    Case,
    Named,
    blocks,
    channels,
    check_compacts,
    compacted_twin,
    kept,
    largest_difference,
    linear,
    mask,
    randomize,
    recurrent,
    repeated,
    structure_of,
    train,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from gbp_ray.errors import PruneError
from gbp_ray.pruning.removal.comparison import check_same, observe
from gbp_ray.pruning.removal.cutting import (
    cut_state,
    expand_optimizer,
    expand_state,
    shrink_structure,
)
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.training.network import distinct_state


def flattened() -> Case:
    model = Named(conv=nn.Conv2d(2, 6, 3), norm=nn.BatchNorm2d(6), fc=nn.Linear(6 * 4, 3))
    parts = [*channels("conv", 6, norm="norm", statistics=True), ("fc.weight", 1, blocks(6, 4))]
    structure = structure_of(model, parts)
    keep = kept(structure, [0, 5])
    expected = {"conv.out_channels": 4, "norm.num_features": 4, "fc.in_features": 16}
    return Case(model, torch.randn(4, 2, 4, 4), structure, keep, expected)


def depthwise() -> Case:
    model = Named(
        a=nn.Conv2d(2, 6, 1),
        norm=nn.BatchNorm2d(6),
        dw=nn.Conv2d(6, 12, 3, groups=6, bias=False),
        b=nn.Conv2d(12, 4, 1),
    )
    parts = channels("a", 6, norm="norm", statistics=True)
    parts += [("dw.weight", 0, blocks(6, 2)), ("b.weight", 1, blocks(6, 2))]
    structure = structure_of(model, parts)
    expected = {"dw.groups": 4, "dw.in_channels": 4, "dw.out_channels": 8, "b.in_channels": 8}
    return Case(model, torch.randn(4, 2, 5, 5), structure, kept(structure, [2, 3]), expected)


def whole_groups() -> Case:
    model = Named(
        a=nn.Conv2d(2, 8, 1), norm=nn.GroupNorm(4, 8), g=nn.Conv2d(8, 12, 3, groups=4),
        b=nn.Conv2d(12, 3, 1),
    )  # fmt: skip
    parts = [(f"{n}", 0, blocks(4, 2)) for n in ("a.weight", "a.bias", "norm.weight", "norm.bias")]
    parts += [("g.weight", 0, blocks(4, 3)), ("g.bias", 0, blocks(4, 3))]
    structure = structure_of(model, [*parts, ("b.weight", 1, blocks(4, 3))])
    expected = {"norm.num_groups": 3, "norm.num_channels": 6, "g.groups": 3, "g.out_channels": 9}
    return Case(model, torch.randn(4, 2, 5, 5), structure, kept(structure, [1]), expected)


def within_groups() -> Case:
    model = Named(a=nn.Conv1d(2, 8, 1), g=nn.Conv1d(8, 6, 3, groups=2), b=nn.Conv1d(6, 3, 1))
    read = [("a.weight", 0, repeated(4, 2)), ("a.bias", 0, repeated(4, 2))]
    made = [(name, 0, repeated(3, 2)) for name in ("g.weight", "g.bias")]
    structure = structure_of(
        model,
        [*read, ("g.weight", 1, blocks(4))],
        [*made, ("b.weight", 1, repeated(3, 2))],
    )
    expected = {"g.groups": 2, "g.in_channels": 4, "g.out_channels": 4, "b.in_channels": 4}
    return Case(model, torch.randn(4, 2, 9), structure, kept(structure, [0, 3], [1]), expected)


def transposed() -> Case:
    model = Named(
        a=nn.Conv2d(2, 6, 1), t=nn.ConvTranspose2d(6, 8, 2, groups=2), b=nn.ConvTranspose2d(8, 3, 2)
    )
    parts = [("a.weight", 0, blocks(2, 3)), ("a.bias", 0, blocks(2, 3))]
    parts += [("t.weight", 0, blocks(2, 3)), ("t.bias", 0, blocks(2, 4))]
    structure = structure_of(model, [*parts, ("b.weight", 0, blocks(2, 4))])
    expected = {"t.groups": 1, "t.in_channels": 3, "t.out_channels": 4, "b.in_channels": 4}
    return Case(model, torch.randn(4, 2, 4, 4), structure, kept(structure, [0]), expected)


def plain_transposed() -> Case:
    model = Named(a=nn.ConvTranspose1d(2, 6, 3), b=nn.Conv1d(6, 3, 1))
    parts = [("a.weight", 1, blocks(6)), ("a.bias", 0, blocks(6)), ("b.weight", 1, blocks(6))]
    structure = structure_of(model, parts)
    expected = {"a.out_channels": 4, "b.in_channels": 4}
    return Case(model, torch.randn(4, 2, 6), structure, kept(structure, [1, 2]), expected)


def volumes() -> Case:
    model = Named(
        a=nn.Conv3d(1, 5, 2),
        norm=nn.InstanceNorm3d(5, affine=True, track_running_stats=True),
        act=nn.PReLU(5),
        b=nn.Conv3d(5, 2, 1),
    )
    parts = channels("a", 5, norm="norm", statistics=True)
    parts += [("act.weight", 0, blocks(5)), ("b.weight", 1, blocks(5))]
    structure = structure_of(model, parts)
    expected = {"norm.num_features": 3, "act.num_parameters": 3}
    return Case(model, torch.randn(2, 1, 3, 4, 3), structure, kept(structure, [0, 4]), expected)


def embedded() -> Case:
    model = Named(table=nn.Embedding(9, 6), act=nn.Tanh(), head=nn.Linear(6, 9, bias=False))
    model.head.weight = model.table.weight
    structure = structure_of(model, [("table.weight", 1, blocks(6))])
    expected = {"table.embedding_dim": 4, "head.in_features": 4, "head.out_features": 9}
    inputs = torch.randint(9, (4, 3))
    return Case(model, inputs, structure, kept(structure, [2, 3]), expected)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc(state)


def cell() -> Case:
    model = Steps()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    parts = [(f"cell.{name}", 0, repeated(5, 3)) for name in names]
    parts += [("cell.weight_hh", 1, blocks(5)), ("fc.weight", 1, blocks(5))]
    structure = structure_of(model, parts)
    expected = {"cell.hidden_size": 3, "cell.input_size": 3}
    return Case(model, torch.randn(4, 6, 3), structure, kept(structure, [0, 1]), expected)


def turned() -> Case:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = Named(a=layer(8, 5), act=nn.GELU(), b=layer(3, 8))
    parts = [("a.weight", 1, blocks(8)), ("a.bias", 0, blocks(8)), ("b.weight", 0, blocks(8))]
    structure = structure_of(model, parts)
    expected = {"a.nf": 5, "b.nx": 5}
    return Case(model, torch.randn(4, 5), structure, kept(structure, [0, 1, 7]), expected)


CASES: dict[str, Callable[[], Case]] = {
    "linear": linear,
    "flattened": flattened,
    "depthwise": depthwise,
    "whole groups": whole_groups,
    "within groups": within_groups,
    "transposed": transposed,
    "plain transposed": plain_transposed,
    "volumes": volumes,
    "embedded": embedded,
    "lstm": lambda: recurrent(nn.LSTM, 4),
    "gru": lambda: recurrent(nn.GRU, 3),
    "rnn": lambda: recurrent(nn.RNN, 1),
    "cell": cell,
    "turned": turned,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    made = CASES[request.param]()
    randomize(made.model)
    return made


def attribute(model: nn.Module, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part)
    return model


def test_the_smaller_network_computes_the_same(case: Case) -> None:
    mask(case.model, case.structure, case.kept_U)
    small = compacted_twin(case)
    for path, value in case.expected.items():
        assert attribute(small, path) == value, path
    case.model.eval()
    assert largest_difference(case.model(case.inputs), small.eval()(case.inputs)) <= 1e-6
    counted = sum(parameter.numel() for parameter in small.parameters())
    assert counted == case.structure.count_weights(case.kept_U)
    assert counted < sum(parameter.numel() for parameter in case.model.parameters())


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_that_of_the_masked_network(case: Case, kind: str) -> None:
    # In float32, Adam would make steps of the rounding of gradients that are zero, before a norm.
    inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    case = case._replace(inputs=inputs, model=case.model.double())
    wide, keep = case.model, case.kept_U
    optimizer = OPTIMIZERS[kind](wide.parameters())
    train(wide, optimizer, case.inputs, {}, 1)
    masks = mask(wide, case.structure, keep)
    for name, parameter in wide.named_parameters():
        for value in optimizer.state[parameter].values():
            if name in masks and value.shape == parameter.shape:
                value.masked_fill_(~masks[name], 0)
    small, moments = copy.deepcopy((wide, optimizer))
    groups = moments.param_groups
    moments.param_groups[0]["params"] = list(small.parameters())
    run = lambda model: model(case.inputs)  # noqa: E731
    remove_units(small, case.structure, keep, run, optimizer=moments)
    assert moments.param_groups is groups
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in small.parameters()]
    assert {p: v.keys() for p, v in moments.state.items()}.keys() == set(small.parameters())
    train(wide, optimizer, case.inputs, masks, 2)
    train(small, moments, case.inputs, {}, 2)
    grown = expand_state(case.structure, keep, dict(small.named_parameters()))
    for name, parameter in wide.named_parameters():
        assert largest_difference(parameter, grown[name]) <= 1e-6, name
    for index, state in expand_optimizer(case.structure, keep, small, moments)["state"].items():
        own = list(wide.parameters())[index]
        for key, value in state.items():
            assert largest_difference(optimizer.state[own][key], value) <= 1e-6, key


def test_dense_shapes_come_back_and_are_cut_to_the_same_bits(case: Case) -> None:
    mask(case.model, case.structure, case.kept_U)
    small = compacted_twin(case)
    state = {name: tensor.detach().clone() for name, tensor in small.state_dict().items()}
    for name in set(state) - {n for n, _ in [*small.named_parameters(), *small.named_buffers()]}:
        del state[name]  # a second name of a tied weight
    grown = expand_state(case.structure, case.kept_U, state)
    again = cut_state(case.structure, case.kept_U, grown)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    # The network of full shape computes the same from them, whatever it was.
    wide = randomize(copy.deepcopy(case.model))
    wide.load_state_dict(grown, strict=False)
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter, dict(case.model.named_parameters())[name]), name
    outputs = wide.eval()(case.inputs)
    assert largest_difference(outputs, small.eval()(case.inputs)) <= 1e-6


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_network_is_cut_to_the_same_bits(case: Case, kind: str) -> None:
    """From files of dense shapes: weights, and the optimizer's state."""
    structure, keep, inputs = case.structure, case.kept_U, case.inputs
    mask(case.model, structure, keep)
    small = copy.deepcopy(case.model)
    optimizer = OPTIMIZERS[kind](small.parameters())
    remove_units(small, structure, keep, lambda model: model(inputs), optimizer=optimizer)
    train(small, optimizer, inputs, {}, 1)
    files = copy.deepcopy(expand_state(structure, keep, distinct_state(small)))
    moments = copy.deepcopy(expand_optimizer(structure, keep, small, optimizer))

    again = case.model
    again.load_state_dict(files, strict=False)
    resumed = OPTIMIZERS[kind](again.parameters())
    resumed.load_state_dict(moments)
    remove_units(again, structure, keep, lambda model: model(inputs), optimizer=resumed)
    for network, stepped in ((small, optimizer), (again, resumed)):
        train(network, stepped, inputs, {}, 1)
    for (name, one), other in zip(
        small.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_structure_shrinks_in_steps_as_at_once(case: Case) -> None:
    structure, keep = case.structure, case.kept_U
    first = keep.copy()
    first[np.flatnonzero(~keep)[0]] = True
    half = shrink_structure(structure, first)
    in_steps = shrink_structure(half, keep[first])
    at_once = shrink_structure(structure, keep)
    assert in_steps.shapes == at_once.shapes
    for one, other in zip(in_steps.slices(), at_once.slices(), strict=True):
        assert np.array_equal(one[1].positions, other[1].positions)
    everything = np.ones(at_once.num_units, dtype=bool)
    assert at_once.count_weights(everything) == structure.count_weights(keep)
    assert at_once.count_macs(everything) == structure.count_macs(keep)
    mask(case.model, structure, keep)
    run = lambda model: model(case.inputs)  # noqa: E731
    steps, whole = copy.deepcopy(case.model), compacted_twin(case)
    if first.all():
        return
    remove_units(steps, structure, first, run)
    remove_units(steps, half, keep[first], run)
    for (name, one), (_, other) in zip(
        steps.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_what_else_belongs_to_a_parameter_moves_along() -> None:
    torch.manual_seed(0)
    model = Named(
        a=nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), b=nn.Conv2d(8, 2, 1)
    ).double()
    structure = structure_of(model, [*channels("a", 8), ("b.weight", 1, blocks(8))])
    keep = kept(structure, [0, 5])
    mask(model, structure, keep)
    model.a.weight.requires_grad_(False)
    model.a.weight.is_special = True
    inputs = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model(inputs).sum().backward()
    gradient = model.a.bias.grad.clone()
    movement = {"a.bias": torch.arange(8, dtype=torch.float64)}
    generator = torch.random.get_rng_state()
    remove_units(model, structure, keep, lambda m: m(inputs), movement=movement)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not model.a.weight.requires_grad
    assert model.a.weight.is_special
    assert model.a.weight.dtype == torch.float64
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.a.bias.grad, gradient[torch.from_numpy(keep)])
    assert movement["a.bias"].tolist() == [1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_low_precision_is_compared_within_its_own(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))).to(kind)
    parts = [("0.weight", 0, blocks(32)), ("0.bias", 0, blocks(32)), ("2.weight", 1, blocks(32))]
    structure = structure_of(model, parts)
    keep = kept(structure, range(13))
    mask(model, structure, keep)
    inputs = torch.randn(6, 8).to(kind)
    assert remove_units(model, structure, keep, lambda m: m(inputs)).difference <= 1e-2
    assert model[0].weight.dtype == kind


def test_norms_without_weights_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.InstanceNorm2d(6), nn.Conv2d(6, 2, 1))
    parts = [("0.weight", 0, blocks(6)), ("0.bias", 0, blocks(6)), ("2.weight", 1, blocks(6))]
    structure = structure_of(model, parts)
    found = check_compacts(model, structure, kept(structure, [3]), torch.randn(2, 2, 4, 4))
    assert found["1.num_features"] == model[1].num_features == 5
    assert not recwarn.list


class Cached(nn.Module):
    """Returns what it has inside beside its outputs, in shapes that change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.a(x)
        return self.b(hidden), hidden


def test_outputs_of_other_shapes_are_compared_by_their_sums() -> None:
    torch.manual_seed(0)
    model = randomize(Cached())
    structure = structure_of(model, [*channels("a", 7), ("b.weight", 1, blocks(7))])
    keep = kept(structure, [2])
    mask(model, structure, keep)
    inputs = torch.randn(4, 5)
    before = observe(model, lambda m: m(inputs))
    remove_units(model, structure, keep, lambda m: m(inputs))
    assert check_same(before, observe(model, lambda m: m(inputs))) <= 1e-6
    with torch.no_grad():
        model.a.bias[0] += 0.1
    with pytest.raises(PruneError, match=r"^'a': without its removed units its outputs differ"):
        check_same(before, observe(model, lambda m: m(inputs)))
