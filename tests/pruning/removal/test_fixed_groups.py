"""Groups that a network's code cannot go without are found by trial, and dropped."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from structures import blocks, kept, mask, randomize, repeated, structure_of
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.pruning.graph.find import find_structure
from gbp_ray.pruning.removal.fixed_groups import _Trial, find_fixed_groups, without_groups
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.pruning.structure import Structure


class Heads(nn.Module):
    """Attention that takes the channels of a head from the width of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        sizes = (batch, length, 3, self.num_heads, width // self.num_heads)
        mixed = nn.functional.scaled_dot_product_attention(
            *self.qkv(x).reshape(sizes).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads()
        self.wide, self.narrow = nn.Linear(16, 6), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.heads(x)
        return x + self.narrow(torch.relu(self.wide(x)))


class Network(nn.Module):
    """Two such layers, and a head with another one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())
        self.neck, self.head, self.aux = nn.Linear(16, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.neck(self.layers(x))
        return self.head(x) + (self.aux(x) if self.training else 0)


def network() -> tuple[nn.Module, Structure, Tensor]:
    torch.manual_seed(0)
    model = randomize(Network())
    groups = []
    for n in range(2):
        path = f"layers.{n}"
        rows = repeated(4, 3, 4)
        heads = [(f"{path}.heads.qkv.weight", 0, rows), (f"{path}.heads.qkv.bias", 0, rows)]
        groups.append([*heads, (f"{path}.heads.proj.weight", 1, blocks(4, 4))])
        hidden = [(f"{path}.wide.weight", 0, blocks(6)), (f"{path}.wide.bias", 0, blocks(6))]
        groups.append([*hidden, (f"{path}.narrow.weight", 1, blocks(6))])
    neck = [("neck.weight", 0, blocks(5)), ("neck.bias", 0, blocks(5))]
    structure = structure_of(model, *groups, [*neck, ("head.weight", 1, blocks(5))])
    return model, structure, torch.randn(3, 7, 16)


def test_groups_that_cannot_be_cut_are_found_and_named() -> None:
    model, structure, inputs = network()
    objects = {name: id(p) for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fixed = find_fixed_groups(model, structure, lambda m: m(inputs))
    assert sorted(fixed) == [0, 2, 4]
    assert fixed[0].startswith("'layers.0.heads': without its removed units it fails")
    assert fixed[4].startswith("'aux': is called in training only")
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.layers[0].heads.num_heads == 4
    assert model.layers[0].wide.out_features == 6


def test_a_structure_without_them_can_be_cut_and_costs_the_same() -> None:
    model, structure, inputs = network()
    left = without_groups(structure, {0: "so", 2: "so", 4: "training"})
    assert [group.name for group in left.groups] == ["layers.0.wide.weight", "layers.1.wide.weight"]
    assert left.frozen["layers.0.heads.qkv.weight[0]"] == "so"
    assert left.frozen["head.weight[1]"] == "training"
    everything = np.ones(left.num_units, dtype=bool)
    assert left.count_weights(everything) == sum(p.numel() for p in model.parameters())
    keep = kept(left, [1], [0, 5])
    wide = kept(structure, [], [1], [], [0, 5], [])
    assert left.count_macs(keep) == structure.count_macs(wide)
    mask(model, left, keep)
    remove_units(model, left, keep, lambda m: m(inputs))
    assert left.count_weights(keep) == sum(p.numel() for p in model.parameters())
    assert find_fixed_groups(model, without_groups(left, {0: "", 1: ""}), lambda m: m(inputs)) == {}


class Padded(nn.Module):
    """A residual block whose shortcut pads by numbers of its code."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(before, 6), nn.Linear(6, after)
        added = (after - before) // 2
        self.shortcut = lambda x: functional.pad(x, (added, added))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + self.shortcut(x))


class Growing(nn.Module):
    """A residual block that adds three features; it holds their number only if told to."""

    def __init__(self, width: int, holds: bool) -> None:
        super().__init__()
        self.one = nn.Linear(width, width + 3)
        added = 3
        if holds:
            self.added = added
        self.number = (lambda block: block.added) if holds else (lambda _: added)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x) + functional.pad(x, (0, self.number(self))))


def fixed_groups_of(*blocks_of: nn.Module) -> tuple[Structure, dict[int, str], int]:
    """Finds the groups of blocks behind a layer that makes four features, and counts the trials."""
    torch.manual_seed(0)
    width = list(blocks_of[-1].parameters())[-1].shape[0]
    model = randomize(nn.Sequential(nn.Linear(3, 4), *blocks_of, nn.Linear(width, 2)))
    inputs = torch.randn(5, 7, 3)
    structure = find_structure(model, [inputs[:1]], lambda m, x: [m(x)])
    trial = _Trial(model, structure, lambda m: m(inputs))
    with mock.patch.object(trial, "_try", wraps=trial._try) as attempt:
        fixed = trial.find(range(len(structure.groups)))
    return structure, fixed, attempt.call_count


def test_of_groups_in_a_padded_shortcut_only_its_zeros_are_fixed() -> None:
    structure, fixed, _ = fixed_groups_of(Padded(4, 4), Padded(4, 8), Padded(8, 12))
    names = [f"{n}.two.weight{side}" for n in (2, 3) for side in ("", " (2)")]
    assert sorted(structure.groups[n].name for n in fixed) == names
    assert all("without its removed units it fails" in why for why in fixed.values())


class Halving(Padded):
    """Such a block that computes its zeros from the widths of its layers, half on either side."""

    def forward(self, x: Tensor) -> Tensor:
        added = self.two.out_features - self.one.in_features
        zeros = functional.pad(x, (added // 2, added - added // 2))
        return torch.relu(self.two(torch.relu(self.one(x))) + zeros)


@pytest.mark.parametrize("before", [0, 1])
def test_zeros_that_code_divides_between_sides_are_fixed_whatever_the_order(before: int) -> None:
    same = [Padded(4, 4) for _ in range(before)]
    structure, fixed, _ = fixed_groups_of(*same, Halving(4, 20), Halving(20, 36))
    names = [f"{before + n}.two.weight{side}" for n in (1, 2) for side in ("", " (2)")]
    assert sorted(structure.groups[n].name for n in fixed) == names


def test_a_stream_that_grows_block_by_block_is_cut_where_it_begins() -> None:
    # The zeros of a block lie in the next one in the same axes as the stream that came before.
    structure, fixed, _ = fixed_groups_of(*(Growing(width, False) for width in (4, 7, 10, 13)))
    assert "0.weight" not in {structure.groups[n].name for n in fixed}
    assert fixed
    _, fixed, _ = fixed_groups_of(*(Growing(width, True) for width in (4, 7, 10, 13)))
    assert not fixed


class Picky(Growing):
    """Such a block that takes the widths 7 and 6, and no other."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in (7, 6):
            raise ValueError("another width")
        return super().forward(x)


def test_what_was_cut_on_trial_is_not_told_fixed_by_likeness() -> None:
    # The second block lets the stem lose its one unit, and not the first block's zeros their two;
    # both lie in it in the same axes.
    blocks_of = Picky(4, True), Picky(7, True), Picky(10, True)
    blocks_of[0].forward = partial(Growing.forward, blocks_of[0])
    blocks_of[2].forward = partial(Growing.forward, blocks_of[2])
    structure, fixed, _ = fixed_groups_of(*blocks_of)
    assert structure.groups[0].name == "0.weight"
    assert fixed
    assert 0 not in fixed


def test_blocks_alike_are_not_tried_again() -> None:
    few, many = ([Layer() for _ in range(n)] for n in (2, 8))
    (_, some, first), (_, more, last) = (
        fixed_groups_of(nn.Linear(4, 16), *layers) for layers in (few, many)
    )
    # The heads of each, and the stream, whose width decides that of a head.
    assert (len(some), len(more)) == (3, 9)
    assert last == first
