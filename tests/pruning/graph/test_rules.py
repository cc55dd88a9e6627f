"""The rules of operators: which slices they couple, each seen in the smallest network.

`EXPECTED` was written down from what the rules give and read against the networks of
`random_networks`. The oracle is the network itself: without a unit's slices it must compute what
the masked one does, without a part of them not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import random_networks
import torch
from architectures import randomize, run
from random_networks import Step, param, random_network
from structures import kept, largest_difference, mask
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import PruneError
from gbp_ray.pruning.graph.find import find_structure
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.pruning.structure import Group, Slice, Structure
from gbp_ray.training.passes import count_macs

EXPECTED: dict[str, tuple[str, ...]] = {
    "conv": (
        "8: first.weight[0] layer.weight[1]",
        "12: layer.weight[0] last.weight[1]",
    ),
    "grouped": ("2: first.weight[0]*4 layer.weight[0]*8 last.weight[1]*8",),
    "depthwise": ("8: first.weight[0] layer.weight[0]*2 last.weight[1]*2",),
    "transposed": ("2: first.weight[0]*4 layer.weight[0]*4 last.weight[1]*4",),
    "norm": ("8: first.weight[0] layer.weight[0] last.weight[1]",),
    "channels_last_norm": (),
    "activation": ("8: first.weight[0] layer.weight[0] last.weight[1]",),
    "pool": ("8: first.weight[0] last.weight[1]",),
    "residual": (
        "8: first.weight[0] scale[0] one.weight[1] two.weight[0] last.weight[1]",
        "12: one.weight[0] two.weight[1]",
    ),
    "squeeze": (
        "8: first.weight[0] one.weight[1] two.weight[0] last.weight[1]",
        "6: one.weight[0] two.weight[1]",
    ),
    "dense": (
        "8: first.weight[0] one.weight[1] last.weight[1]",
        "8: one.weight[0] last.weight[1]",
    ),
    "two_branches": (
        "8: first.weight[0] one.weight[1] two.weight[1]",
        "8: one.weight[0] last.weight[1]",
        "12: two.weight[0] last.weight[1]",
    ),
    "glu": (
        "8: first.weight[0] one.weight[1]",
        "8: one.weight[0]*2 last.weight[1]",
    ),
    "chunked": (
        "8: first.weight[0] one.weight[1]",
        "8: one.weight[0]*2 two.weight[1] last.weight[1]",
        "8: two.weight[0] last.weight[1]",
    ),
    "split": (
        "8: first.weight[0] one.weight[1]",
        "8: two.weight[0] three.weight[0] last.weight[1]",
    ),
    "shuffle": ("4: first.weight[0]*2 last.weight[1]*2",),
    "padded": (
        "8: first.weight[0] one.weight[0] one.weight[1] last.weight[1]",
        "3: one.weight[0] last.weight[1]",
        "5: one.weight[0] last.weight[1]",
    ),
    "padded_with_ones": ("8: first.weight[0] one.weight[0] one.weight[1] last.weight[1]",),
    "sliced": (),
    "frozen_norm": ("8: first.weight[0] last.weight[1] weight[0] var[0] mean[0]",),
    "twice": (
        "8: first.weight[0] one.weight[1]",
        "8: one.weight[0] two.weight[0] two.weight[1] last.weight[1]",
    ),
    "spatial_attention": (
        "8: first.weight[0] q.weight[1] k.weight[1] v.weight[0] v.weight[1] last.weight[1]",
    ),
    "repeated": ("8: first.weight[0] last.weight[1]*2",),
    "gated_by_mean": (),
    "standardized": ("8: kernel[0] gain[0] last.weight[1]",),
    "einsum": (
        "8: first.weight[0] w[1]",
        "10: w[0] last.weight[1]",
    ),
    "stacked": (
        "8: first.weight[0] one.weight[1] two.weight[1]",
        "8: one.weight[0] two.weight[0] pick.weight[0]*2 pick.weight[1] last.weight[1]",
    ),
    "unshuffled": (
        "8: first.weight[0] one.weight[1]*4",
        "4: one.weight[0]*4 two.weight[1]",
        "8: two.weight[0] last.weight[1]",
    ),
    "focus": (
        "8: first.weight[0] one.weight[1]*4",
        "8: one.weight[0] last.weight[1]",
    ),
    "rotary": (
        "8: first.weight[0] q.weight[1] k.weight[1] v.weight[1]",
        "3 head: q.weight[0]*4 k.weight[0]*4 v.weight[0]*4 o.weight[1]*4",
        "8: o.weight[0] last.weight[1]",
    ),
    "complex_rotary": (
        "8: first.weight[0] q.weight[1] k.weight[1] v.weight[1]",
        "3 head: q.weight[0]*4 k.weight[0]*4 v.weight[0]*4 o.weight[1]*4",
        "8: o.weight[0] last.weight[1]",
    ),
    "cell": (
        "8: first.weight[0] cell.weight_ih[1]",
        "6: cell.weight_ih[0]*3 cell.weight_hh[0]*3 cell.weight_hh[1] last.weight[1]",
    ),
    "shared": (
        "8: first.weight[0] one.weight[1]",
        "10: one.weight[0] out.weight[1]",
        "8: out.weight[0] last.weight[1]",
    ),
    "talking": (
        "8: first.weight[0] qkv.weight[1]",
        "4 head: qkv.weight[0]*9 mix.weight[0] mix.weight[1] out.weight[1]*3",
        "8: out.weight[0] last.weight[1]",
    ),
    "low_rank": (
        "9: w[0] up[0] last.weight[1]",
        "2: up[1] down[0]",
    ),
    "mlp": (
        "8: first.weight[0] one.weight[1]",
        "9: one.weight[0] two.weight[1]",
        "12: two.weight[0] last.weight[1]",
    ),
    "gated": (
        "8: first.weight[0] gate.weight[1] up.weight[1] down.weight[0] last.weight[1]",
        "10: gate.weight[0] up.weight[0] down.weight[1]",
    ),
    "fused_gate": (
        "8: first.weight[0] up.weight[1]",
        "7: up.weight[0]*2 down.weight[1]",
        "12: down.weight[0] last.weight[1]",
    ),
    "normed": ("9: one.weight[0] two.weight[1]",),
    "attention": (
        "8: first.weight[0] qkv.weight[1] out.weight[0] last.weight[1]",
        "4 head: qkv.weight[0]*9 out.weight[1]*3",
    ),
    "grouped_queries": (
        "8: first.weight[0] q.weight[1] k.weight[1] v.weight[1]",
        "3 head: q.weight[0]*8 k.weight[0]*4 v.weight[0]*4 o.weight[1]*8",
        "12: o.weight[0] last.weight[1]",
    ),
    "recurrent": (
        "8: first.weight[0] layer.weight_ih_l0[1] layer.weight_ih_l0_reverse[1]",
        "6: layer.weight_ih_l0[0]*3 layer.weight_hh_l0[0]*3 layer.weight_hh_l0[1] "
        "layer.weight_ih_l0_reverse[0]*3 layer.weight_hh_l0_reverse[0]*3 "
        "layer.weight_hh_l0_reverse[1] layer.weight_ih_l1[0]*3 layer.weight_ih_l1[1]*2 "
        "layer.weight_hh_l1[0]*3 layer.weight_hh_l1[1] layer.weight_ih_l1_reverse[0]*3 "
        "layer.weight_ih_l1_reverse[1]*2 layer.weight_hh_l1_reverse[0]*3 "
        "layer.weight_hh_l1_reverse[1] last.weight[1]*2",
    ),
    "conv1d": (
        "8: first.weight[0] one.weight[1]",
        "9: one.weight[0] last.weight[1]",
    ),
    "raw": (
        "8: first.weight[0] w[1]",
        "9: w[0] last.weight[1]",
    ),
    "tied": (
        "8: first.weight[0] w[0] last.weight[1]",
        "9: w[1]",
    ),
    "positions": ("8: first.weight[0] table[2] last.weight[1]",),
    "token": (
        "8: first.weight[0] token[2] one.weight[1]",
        "8: one.weight[0] last.weight[1]",
    ),
    "maxout": (
        "8: first.weight[0] one.weight[1]",
        "8: one.weight[0]*2 last.weight[1]",
    ),
    "mixer": (
        "8: first.weight[0] last.weight[1]",
        "7: one.weight[0] two.weight[1]",
    ),
    "bilinear_heads": (
        "8: first.weight[0] w[1]",
        "3: w[0] o[0]",
        "4: w[2] o[1]",
        "12: o[2] last.weight[1]",
    ),
}
"""By step, its groups: number of units, and weights[axis] with the positions of one unit; biases
and statistics are left out."""


def describe(structure: Structure) -> tuple[str, ...]:
    lines = []
    for group in structure.groups:
        words = []
        for part in group.slices:
            name, each = part.name.removeprefix("steps.0."), part.positions.shape[1]
            if "bias" not in name and "running" not in name:
                words.append(f"{name}[{part.dim}]" + (f"*{each}" if each > 1 else ""))
        kind = " head" if group.kind == "head" else ""
        lines.append(f"{group.num_units}{kind}: {' '.join(words)}")
    return tuple(lines)


def finer(structure: Structure) -> list[Structure]:
    """Splits each unit of the first group that can be into equal parts, by turns and in a row."""
    found = []
    for number, group in enumerate(structure.groups):
        parts = math.gcd(*(part.positions.shape[1] for part in group.slices))
        if parts == 1:
            continue
        for is_by_turns in (True, False):
            slices = tuple(_split(part, parts, is_by_turns) for part in group.slices)
            groups = list(structure.groups)
            groups[number] = Group(group.name, group.kind, group.num_units * parts, slices)
            found.append(replace(structure, groups=tuple(groups)))
    return found


def _split(part: Slice, parts: int, is_by_turns: bool) -> Slice:
    units, each = part.positions.shape
    shape = (units, each // parts, parts) if is_by_turns else (units, parts, each // parts)
    cut = part.positions.reshape(shape)
    cut = cut.swapaxes(1, 2) if is_by_turns else cut
    return replace(part, positions=cut.reshape(units * parts, -1))


def remove_one_of_each(model: nn.Module, structure: Structure, inputs: tuple[Tensor, ...]) -> None:
    """Removes the second unit of each group, and holds the network against the masked one."""
    keep = kept(structure, *([1] for _ in structure.groups))
    mask(model, structure, keep)
    with torch.no_grad():
        masked = run(model, *inputs)[0]
        remove_units(model, structure, keep, lambda network: run(network, *inputs))
        assert largest_difference(masked, run(model, *inputs)[0]) <= 1e-5
    assert structure.count_macs(keep) == count_macs(model, inputs[0][:1]).total
    assert structure.count_weights(keep) == sum(p.numel() for p in model.parameters())


def test_every_step_is_in_the_table() -> None:
    steps = [*random_networks.IMAGE_STEPS, *random_networks.SEQUENCE_STEPS]
    assert [step.__name__ for step in steps] == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_units_are_those_that_the_network_has(name: str) -> None:
    model, inputs = random_network(0, [getattr(random_networks, name)])
    randomize(model)
    structure = find_structure(model, inputs, run)
    assert describe(structure) == EXPECTED[name]
    assert len({group.name for group in structure.groups}) == len(structure.groups)
    assert structure.count_macs(np.ones(structure.num_units, dtype=bool)) == (
        count_macs(model, inputs[0]).total
    )
    for other in finer(structure):
        split, _ = random_network(0, [getattr(random_networks, name)])
        with pytest.raises(PruneError):
            remove_one_of_each(randomize(split), other, inputs)
    if structure.groups:
        remove_one_of_each(model, structure, inputs)


LAYOUTS = ["3hd", "h3d", "chunk", "h,3d", "hd3"]


class _Chosen:
    """Draws what it is told to, the last option again and again."""

    def __init__(self, *choices: Any) -> None:
        self._choices = list(choices)

    def choice(self, options: list[Any]) -> Any:
        made = self._choices.pop(0)
        assert made in options
        return made

    def random(self) -> float:
        return self._choices.pop(0)


def alone(step: Step, inputs: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
    kind = "image" if inputs.ndim == 4 else "sequence"
    first: nn.Module = nn.Conv2d(3, 8, 1) if kind == "image" else nn.Linear(4, 8)
    network = random_networks.Network(first, [step], nn.Linear(step.width, 3), kind)
    return randomize(network).eval(), (inputs,)


SEQUENCE, IMAGE = torch.linspace(-1, 1, 20).view(1, 5, 4), torch.linspace(-1, 1, 108)


@pytest.mark.parametrize("by_hand", [0.0, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_are_found_in_every_layout_of_queries_keys_and_values(
    layout: str, by_hand: float
) -> None:
    torch.manual_seed(0)
    step = random_networks.attention(8, _Chosen(layout, by_hand))  # type: ignore[arg-type]
    model, inputs = alone(step, SEQUENCE)
    structure = find_structure(model, inputs, run)
    (heads,) = (group for group in structure.groups if group.kind == "head")
    places = {part.name: part.positions for part in heads.slices}
    numbers = np.arange(36)
    expected = {
        "3hd": numbers.reshape(3, 4, 3).transpose(1, 0, 2),
        "chunk": numbers.reshape(3, 4, 3).transpose(1, 0, 2),
        "h3d": numbers.reshape(4, 3, 3),
        "h,3d": numbers.reshape(4, 3, 3),
        "hd3": numbers.reshape(4, 3, 3),
    }[layout].reshape(4, 9)
    np.testing.assert_array_equal(np.sort(places["steps.0.qkv.weight"]), np.sort(expected))
    np.testing.assert_array_equal(places["steps.0.out.weight"], np.arange(12).reshape(4, 3))
    remove_one_of_each(model, structure, inputs)


@pytest.mark.parametrize("how", ["repeat", "expand", "enable"])
def test_a_key_goes_with_its_queries(how: str) -> None:
    torch.manual_seed(0)
    step = random_networks.grouped_queries(8, _Chosen(how))  # type: ignore[arg-type]
    model, inputs = alone(step, SEQUENCE)
    structure = find_structure(model, inputs, run)
    (heads,) = (group for group in structure.groups if group.kind == "head")
    places = {part.name: part.positions for part in heads.slices}
    np.testing.assert_array_equal(places["steps.0.q.weight"], np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(places["steps.0.k.weight"], np.arange(12).reshape(3, 4))
    remove_one_of_each(model, structure, inputs)


# -- what is frozen, and what only looks like it ---------------------------------------------------


def frozen_of(passing: Callable[[Any, Tensor], Tensor], width: int, **parts: Any) -> Structure:
    torch.manual_seed(0)
    model, inputs = alone(Step(passing, width, **parts), SEQUENCE)
    return find_structure(model, inputs, run)


@pytest.mark.parametrize(
    ("passing", "reason"),
    [
        (lambda s, x: x.softmax(-1), "softmax in 'steps.0'"),
        (lambda s, x: x / x.norm(dim=-1, keepdim=True), "linalg_vector_norm in 'steps.0'"),
        (lambda s, x: x.gather(-1, x.argsort(-1)), "no rule for "),
        (lambda s, x: x + torch.arange(8), "add in 'steps.0'"),
        (lambda s, x: x + x.new_zeros(x.shape), "add in 'steps.0'"),
        (lambda s, x: x[..., [1, 0, 2, 3, 4, 5, 6, 7]], "index in 'steps.0'"),
        (lambda s, x: x.flip(-1), "flip in 'steps.0'"),
    ],
)
def test_what_looks_at_an_axis_as_a_whole_freezes_it_by_name(
    passing: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    structure = frozen_of(passing, 8)
    assert not structure.groups
    assert structure.frozen["first.weight[0]"].startswith(reason)


@pytest.mark.parametrize(
    "passing",
    [
        lambda s, x: x * x.new_zeros(()) + x,
        lambda s, x: functional.hardswish(x),
        lambda s, x: x.clone().mul_(2).masked_fill_(x > 0, 1.0),
        lambda s, x: torch.cat([x.tril(), x], 1),
        lambda s, x: x.clone().copy_(x.tanh()),
        lambda s, x: functional.logsigmoid(x),
    ],
)
def test_what_treats_elements_alike_freezes_nothing(
    passing: Callable[[Any, Tensor], Tensor],
) -> None:
    found = frozen_of(passing, 8)
    is_triangle = any("tril" in why for why in found.frozen.values())
    assert is_triangle or describe(found) == ("8: first.weight[0] last.weight[1]",)


def test_products_of_operators_without_a_rule_cost_what_they_do() -> None:
    model, inputs = alone(
        Step(lambda s, x: functional.bilinear(x, x, s.w), 6, w=param(6, 8, 8)), SEQUENCE
    )
    structure = find_structure(model, inputs, run)
    every = np.ones(structure.num_units, dtype=bool)
    assert structure.frozen["first.weight[0]"].startswith("no rule for bilinear")
    counted = count_macs(model, inputs[0])
    assert counted.fault or structure.count_macs(every) == counted.total


def test_a_convolution_with_a_kernel_made_of_inputs_is_counted_and_frozen() -> None:
    def passing(s: Any, x: Tensor) -> Tensor:
        kernel = s.make(x.mean((0, 2, 3))).view(8, 8, 1, 1)
        return functional.conv2d(x, kernel)

    image = IMAGE.view(1, 3, 6, 6)
    model, inputs = alone(Step(passing, 8, make=nn.Linear(8, 64)), image)
    structure = find_structure(model, inputs, run)
    every = np.ones(structure.num_units, dtype=bool)
    assert not structure.groups
    assert structure.count_macs(every) == count_macs(model, inputs[0]).total


# -- training --------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """Has a second head, which only training calls; it can be read from the first layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 9)
        self.norm, self.head, self.second = nn.BatchNorm1d(8), nn.Linear(9, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.one(x)).relu()
        found = {"logits": self.head(self.two(x).relu())}
        return found | {"second": self.second(x)} if self.training else found


def test_what_only_training_reads_goes_with_the_unit() -> None:
    model, inputs = randomize(Auxiliary()), torch.randn(6, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure = find_structure(model, (inputs[:1],), run)
    assert describe(structure) == (
        "8: one.weight[0] two.weight[1] norm.weight[0] second.weight[1]",
        "9: two.weight[0] head.weight[1]",
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    every = np.ones(structure.num_units, dtype=bool)
    assert structure.count_macs(every) == count_macs(model, inputs[:1]).total
    remove_one_of_each(model, structure, (inputs,))
    assert model.train()(inputs)["second"].shape == (6, 3)
