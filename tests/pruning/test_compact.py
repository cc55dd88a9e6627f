"""Removing units for good: the smaller network is held against the masked one."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from structures import blocks, kept, mask, repeated, structure_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import LBFGS, SGD, Adafactor, Adam, Optimizer

from gbp_ray.errors import PruneError
from gbp_ray.pruning.compact import compact
from gbp_ray.pruning.cutting import cut_state, expand_optimizer, expand_state, shrink_structure
from gbp_ray.pruning.structure import Structure


class Case(NamedTuple):
    """A network, a batch for it, its structure, and the units that stay.

    Attributes:
        expected: Some attributes of the smaller network by dotted path.
    """

    model: nn.Module
    inputs: Tensor
    structure: Structure
    kept_U: np.ndarray
    expected: Mapping[str, Any]


def randomize(model: nn.Module) -> nn.Module:
    """Draws all weights and statistics, so that no norm is the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def channels(name: str, width: int, *, norm: str = "", statistics: bool = False) -> list[Any]:
    """Lists what makes the channels of a layer: weight, bias, and a norm behind it."""
    names = [f"{name}.weight", f"{name}.bias"]
    if norm:
        names += [f"{norm}.weight", f"{norm}.bias"]
    if statistics:
        names += [f"{norm}.running_mean", f"{norm}.running_var"]
    return [(one, 0, blocks(width)) for one in names]


class Named(nn.Module):
    """Calls layers one after another; flattens before a linear one."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            if isinstance(layer, nn.Linear) and x.ndim > 3:
                x = x.flatten(1)
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def linear() -> Case:
    model = Named(a=nn.Linear(5, 7), act=nn.GELU(), b=nn.Linear(7, 3))
    structure = structure_of(model, [*channels("a", 7), ("b.weight", 1, blocks(7))])
    keep = kept(structure, [1, 4])
    return Case(
        model, torch.randn(6, 5), structure, keep, {"a.out_features": 5, "b.in_features": 5}
    )


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


def recurrent(kind: type[nn.RNNBase], gates: int) -> Case:
    model = Named(table=nn.Embedding(9, 5), rnn=kind(5, 4, 2, batch_first=True), fc=nn.Linear(4, 3))
    rows = [f"rnn.{which}_{layer}" for which in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            for layer in ("l0", "l1")]  # fmt: skip
    parts = [(name, 0, repeated(4, gates)) for name in rows]
    parts += [(f"rnn.{name}", 1, blocks(4)) for name in ("weight_hh_l0", "weight_hh_l1")]
    parts += [("rnn.weight_ih_l1", 1, blocks(4)), ("fc.weight", 1, blocks(4))]
    inside = [("table.weight", 1, blocks(5)), ("rnn.weight_ih_l0", 1, blocks(5))]
    structure = structure_of(model, parts, inside)
    expected = {"rnn.hidden_size": 3, "rnn.input_size": 3, "fc.in_features": 3}
    keep = kept(structure, [1], [0, 1])
    return Case(model, torch.randint(9, (4, 6)), structure, keep, expected)


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


def compacted_twin(case: Case, **options: Any) -> nn.Module:
    twin = copy.deepcopy(case.model)
    compact(twin, case.structure, case.kept_U, lambda model: model(case.inputs), **options)
    return twin


def largest_difference(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-9))


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


def train(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, masks: Mapping[str, Tensor], steps: int
) -> None:
    """Trains towards fixed numbers; pruned weights stay zero, and so does what is kept for them."""
    model.train()
    for _ in range(steps):
        outputs = model(inputs)
        goal = torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)
        ((outputs - goal) ** 2).mean().backward()
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.grad.masked_fill_(~masks[name], 0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.masked_fill_(~masks[name], 0)
                    for value in optimizer.state[parameter].values():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            value.masked_fill_(~masks[name], 0)


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
    compact(small, case.structure, keep, run, optimizer=moments)
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
    compact(steps, structure, first, run)
    compact(steps, half, keep[first], run)
    for (name, one), (_, other) in zip(
        steps.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


# -- attributes of modules that nobody knows -------------------------------------------------------


class Attention(nn.Module):
    """Attention as timm writes it: a wrong number of heads or channels often raises nothing."""

    def __init__(self, dim: int, heads: int, head_dim: int, *, is_explicit: bool) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads, self.head_dim = heads, head_dim
        self.attn_dim = heads * head_dim if is_explicit else -1
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        each = self.head_dim if self.attn_dim > 0 else -1
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, each).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def attention_heads(path: str, heads: int, head_dim: int) -> list[Any]:
    rows = repeated(heads, 3, head_dim)
    return [
        (f"{path}.qkv.weight", 0, rows),
        (f"{path}.qkv.bias", 0, rows),
        (f"{path}.proj.weight", 1, blocks(heads, head_dim)),
    ]


def check_compacts(
    model: nn.Module, structure: Structure, keep: np.ndarray, inputs: Tensor, **options: Any
) -> Mapping[str, Any]:
    randomize(model)
    mask(model, structure, keep)
    expected = model.eval()(inputs)
    found = compact(model, structure, keep, lambda m: m(inputs), **options)
    assert largest_difference(expected, model(inputs)) <= 1e-6
    assert found.difference <= 1e-6
    return found.attributes


@pytest.mark.parametrize("is_explicit", [True, False])
def test_numbers_of_heads_follow_in_each_layer(is_explicit: bool) -> None:
    torch.manual_seed(0)
    # As many heads as channels of a head, so that either number may be the one to change.
    blocks_ = [Block(Attention(8, 4, 4, is_explicit=is_explicit)) for _ in range(3)]
    model = nn.Sequential(*blocks_, nn.Linear(8, 2))
    groups = [attention_heads(f"{number}.attn", 4, 4) for number in range(3)]
    structure = structure_of(model, *groups, kind="head")
    found = check_compacts(model, structure, kept(structure, [0, 2], [], [3]), torch.randn(4, 5, 8))
    assert [block.attn.num_heads for block in blocks_] == [2, 4, 3]
    assert [block.attn.head_dim for block in blocks_] == [4, 4, 4]
    assert [block.attn.dim for block in blocks_] == [8, 8, 8]
    assert found["0.attn.num_heads"] == 2
    assert "0.attn.head_dim" not in found
    if is_explicit:
        assert [block.attn.attn_dim for block in blocks_] == [8, 16, 12]


class Split(nn.Module):
    """Half of the channels go through more layers, as in networks of the YOLO family."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.c = 6
        self.sizes: Sequence[int] = (6, 6) if form == "tuple" else [6, 6]
        self.form = form
        self.a = nn.Conv2d(2, 12, 1)
        self.m = nn.Conv2d(6, 6, 3, padding=1)
        self.b = nn.Conv2d(18, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes = (self.c, self.c) if self.form == "number" else list(self.sizes)
        first, second = self.a(x).split(sizes, 1)
        return self.b(torch.cat([first, second, self.m(second)], 1))


@pytest.mark.parametrize("form", ["number", "tuple", "list"])
@pytest.mark.parametrize("removed", [([0], [5]), ([0, 1], [3])], ids=["equal", "unequal"])
def test_sizes_of_a_split_follow(form: str, removed: Sequence[Sequence[int]]) -> None:
    torch.manual_seed(0)
    model = Split(form)
    groups = [
        [("a.weight", 0, blocks(6, start=start)), ("a.bias", 0, blocks(6, start=start)),
         ("b.weight", 1, blocks(6, start=start))]
        for start in (0, 6)
    ]  # fmt: skip
    groups[1].append(("m.weight", 1, blocks(6)))
    structure = structure_of(model, *groups)
    inputs = torch.randn(2, 2, 4, 4)
    keep = kept(structure, *removed)
    if form == "number" and len(removed[0]) != len(removed[1]):
        # One number cannot be two.
        with pytest.raises(PruneError, match=r"prune\.compact = false"):
            check_compacts(model, structure, keep, inputs)
        assert model.c == 6
        return
    check_compacts(model, structure, keep, inputs)
    sizes = [6 - len(gone) for gone in removed]
    if form == "number":
        assert model.c == sizes[0]
    else:
        assert type(model.sizes)(sizes) == model.sizes


class Grouped(nn.Module):
    """Holds numbers in modules that have no weights, in one without a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 8, 1)
        self.middle = nn.Sequential(
            nn.GroupNorm(4, 8, affine=False), nn.Unflatten(1, (4, 2)), nn.Flatten(1, 2)
        )
        self.b = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x)))


@pytest.mark.parametrize("hints", [None, {"middle.0": [4, 8], "middle.1": [4]}])
def test_modules_without_weights_follow(hints: Any) -> None:
    torch.manual_seed(0)
    model = Grouped()
    parts = [("a.weight", 0, blocks(4, 2)), ("a.bias", 0, blocks(4, 2))]
    structure = structure_of(model, [*parts, ("b.weight", 1, blocks(4, 2))])
    check_compacts(model, structure, kept(structure, [2]), torch.randn(3, 2, 4, 4), hints=hints)
    assert model.middle[0].num_groups == 3
    assert tuple(model.middle[1].unflattened_size) == (3, 2)


def test_a_fault_behind_a_small_factor_is_seen() -> None:
    """Layer scale of 1e-7 hides attention of too many heads from the outputs."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(8, 4, 4, is_explicit=False)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + 1e-7 * self.attn(x))

    torch.manual_seed(0)
    model = Scaled()
    structure = structure_of(model, attention_heads("attn", 4, 4), kind="head")
    check_compacts(model, structure, kept(structure, [0, 1]), torch.randn(4, 5, 8))
    assert model.attn.num_heads == 2


# -- what is refused -------------------------------------------------------------------------------


def check_refused(case: Case, match: str, optimizer: Optimizer | None = None) -> None:
    """Holds that a refusal leaves everything as it was, objects and bits."""
    model, inputs = case.model, case.inputs
    mask(model, case.structure, case.kept_U)
    objects = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    movement = {name: torch.ones_like(p, dtype=torch.float64) for name, p in objects.items()}
    moved = dict(movement)
    numbers = [
        (module, {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))})
        for module in model.modules()
    ]
    before = copy.deepcopy(optimizer.state_dict()) if optimizer else None
    training = model.training
    with pytest.raises(PruneError, match=match):
        compact(
            model, case.structure, case.kept_U, lambda m: m(inputs), optimizer=optimizer,
            movement=movement,
        )  # fmt: skip
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in objects.items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(movement[name] is value for name, value in moved.items())
    for module, values in numbers:
        assert {key: vars(module)[key] for key in values} == values
    assert model.training is training
    assert not any(m._forward_hooks for m in model.modules())
    if optimizer is not None:
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
            id(p) for p in model.parameters()
        ]
        for index, own in optimizer.state_dict()["state"].items():
            for key, value in own.items():
                assert torch.equal(value, before["state"][index][key])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.b = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def test_a_network_that_would_compute_something_else_is_restored() -> None:
    torch.manual_seed(0)
    model = randomize(Normed())
    parts = [*channels("a", 7, norm="norm"), ("b.weight", 1, blocks(7))]
    structure = structure_of(model, parts)
    case = Case(model, torch.randn(4, 5), structure, kept(structure, [1, 4]), {})
    optimizer = Adam(model.parameters())
    train(model, optimizer, case.inputs, {}, 1)
    check_refused(case, r"'norm': .* differ.*prune\.exclude", optimizer)


def test_a_recurrent_layer_is_restored() -> None:
    torch.manual_seed(0)
    case = recurrent(nn.LSTM, 4)
    model = randomize(case.model)
    structure = structure_of(
        model,
        [(name, 0, repeated(4, 4)) for name in ("rnn.weight_ih_l1", "rnn.weight_hh_l1")]
        + [(name, 0, repeated(4, 4)) for name in ("rnn.bias_ih_l1", "rnn.bias_hh_l1")]
        + [("rnn.weight_hh_l1", 1, blocks(4)), ("fc.weight", 1, blocks(4))],
    )
    case = case._replace(structure=structure, kept_U=kept(structure, [1]))
    check_refused(case, r"'rnn': its layers are left with different numbers of units \(3, 4\)")
    assert torch.isfinite(model(case.inputs)).all()


def test_channels_that_are_missing_from_a_structure_are_named() -> None:
    torch.manual_seed(0)
    case = linear()
    randomize(case.model)
    structure = structure_of(case.model, channels("a", 7))
    case = case._replace(structure=structure, kept_U=kept(structure, [1]))
    check_refused(case, r"'b': without its removed units it fails with RuntimeError")


def parametrized(layer: nn.Linear) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    register_parametrization(layer, "weight", Doubled())


def with_hook(layer: nn.Linear) -> None:
    layer.weight.register_hook(lambda gradient: gradient)


def quantized(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(7, 5, dtype=torch.int8), requires_grad=False)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.float(), layer.bias)


@pytest.mark.parametrize(
    ("change", "name", "match"),
    [
        (parametrized, "parametrizations.weight.original", "parametrization"),
        (parametrizations.weight_norm, "parametrizations.weight.original1", "parametrization"),
        (nn.utils.spectral_norm, "weight_orig", "computed from others"),
        (
            lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
            "weight_orig",
            "computed from others",
        ),
        (with_hook, "weight", "hooks on its gradient"),
        (quantized, "weight", "quantized"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused_by_name(
    change: Callable[[Any], Any], name: str, match: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    change(model[0])
    parts = [(f"0.{name}", 0, blocks(7)), ("0.bias", 0, blocks(7)), ("2.weight", 1, blocks(7))]
    structure = structure_of(model, parts)
    model.eval()  # spectral norm moves on in training
    case = Case(model, torch.randn(4, 5), structure, kept(structure, [2]), {})
    check_refused(case, rf"'0\.{name}': .*{match}.*prune\.compact = false")


@pytest.mark.parametrize(
    ("make", "match"),
    [(LBFGS, "LBFGS"), (Adafactor, r"optimizer state 'row_var'")],
)
def test_optimizers_whose_state_cannot_be_cut_are_refused(
    make: Callable[[Any], Optimizer], match: str
) -> None:
    torch.manual_seed(0)
    case = linear()
    randomize(case.model)
    optimizer = make(case.model.parameters())

    def closure() -> Tensor:
        loss = case.model(case.inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    mask(case.model, case.structure, case.kept_U)
    with pytest.raises(PruneError, match="has no parameter of this network|LBFGS"):
        compacted_twin(case, optimizer=optimizer)
    with pytest.raises(PruneError, match=match):
        compact(
            case.model, case.structure, case.kept_U, lambda m: m(case.inputs), optimizer=optimizer
        )


def test_units_and_shapes_that_do_not_fit_are_refused() -> None:
    case = linear()
    run = lambda model: model(case.inputs)  # noqa: E731
    mask(case.model, case.structure, case.kept_U)
    small = compacted_twin(case)
    with pytest.raises(PruneError, match=r"'a\.weight': the network has \(5, 5\)"):
        compact(small, case.structure, case.kept_U, run)
    with pytest.raises(PruneError, match=r"must be bool of shape \(7,\)"):
        compact(case.model, case.structure, case.kept_U[1:], run)
    with pytest.raises(PruneError, match="all of its 7 units are removed"):
        compact(case.model, case.structure, np.zeros(7, dtype=bool), run)
    with pytest.raises(PruneError, match=r"'a\.weight': has 25 values of shape"):
        cut_state(case.structure, case.kept_U, {"a.weight": torch.zeros(5, 5)})
    shared = linear().model
    shared.act.extra = nn.Linear(5, 7)
    shared.act.extra.weight.data = shared.a.weight.data
    with pytest.raises(PruneError, match=r"'act\.extra\.weight': shares the memory of 'a\.weight'"):
        compact(shared, case.structure, case.kept_U, run)


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
    compact(model, structure, keep, lambda m: m(inputs), movement=movement)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not model.a.weight.requires_grad
    assert model.a.weight.is_special
    assert model.a.weight.dtype == torch.float64
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.a.bias.grad, gradient[torch.from_numpy(keep)])
    assert movement["a.bias"].tolist() == [1, 2, 3, 4, 6, 7]


def test_a_unit_that_shares_positions_with_a_removed_one_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    structure = structure_of(model, [("0.weight", 0, np.array([[0, 1], [1, 2]]))])
    with pytest.raises(PruneError, match="has positions of a removed one"):
        shrink_structure(structure, np.array([True, False]))
