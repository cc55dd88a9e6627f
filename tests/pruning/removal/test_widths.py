"""Numbers of heads, groups and channels in modules follow when units are removed for good."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from structures import blocks, check_compacts, kept, mask, randomize, repeated, structure_of
from torch import Tensor, nn

from gbp_ray.errors import PruneError
from gbp_ray.pruning.removal.remove import remove_units


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


def test_modules_without_weights_follow() -> None:
    torch.manual_seed(0)
    model = Grouped()
    parts = [("a.weight", 0, blocks(4, 2)), ("a.bias", 0, blocks(4, 2))]
    structure = structure_of(model, [*parts, ("b.weight", 1, blocks(4, 2))])
    check_compacts(model, structure, kept(structure, [2]), torch.randn(3, 2, 4, 4))
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


def test_zeros_that_hide_a_layer_are_seen_through() -> None:
    """As untrained networks have it: a projection of zeros shows nothing of the heads before it."""
    torch.manual_seed(0)
    block = Block(Attention(8, 4, 4, is_explicit=False))
    model, attention = randomize(block), block.attn
    structure = structure_of(model, attention_heads("attn", 4, 4))
    keep = kept(structure, [0, 2])
    mask(model, structure, keep)
    nn.init.zeros_(attention.proj.weight)
    inputs = torch.randn(4, 5, 8)
    remove_units(model, structure, keep, lambda m: m(inputs))
    assert (attention.num_heads, attention.head_dim) == (2, 4)
    assert not attention.proj.weight.any()


class Gate(nn.Module):
    """Makes one half of a channel that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x * self.weight)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(5, 8), Gate(), nn.Linear(8, 3)
        self.parts = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.a(x)).unflatten(1, (self.parts, -1))
        return self.b((x * torch.arange(x.shape[2])).flatten(1))


def test_a_layer_that_makes_something_of_zeros_is_no_fault() -> None:
    torch.manual_seed(0)
    model = Gated()
    parts = [(name, 0, blocks(4, 2)) for name in ("a.weight", "a.bias", "gate.weight")]
    structure = structure_of(model, [*parts, ("b.weight", 1, blocks(4, 2))])
    check_compacts(model, structure, kept(structure, [1]), torch.randn(6, 5))
    assert model.parts == 3


class Numbered(nn.Module):
    """Holds one number for each of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = 4, 4, 4
        self.reads = nn.ModuleList(nn.Linear(6, 16) for _ in range(3))
        self.writes = nn.ModuleList(nn.Linear(16, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.first, self.second, self.third)
        for read, write, number in zip(self.reads, self.writes, parts, strict=True):
            x = x + write(torch.softmax(read(x).unflatten(1, (number, -1)), -1).flatten(1))
        return x


def test_numbers_of_the_network_itself_follow_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = Numbered()
    groups = [
        [(f"reads.{i}.weight", 0, blocks(4, 4)), (f"reads.{i}.bias", 0, blocks(4, 4)),
         (f"writes.{i}.weight", 1, blocks(4, 4))]
        for i in range(3)
    ]  # fmt: skip
    structure = structure_of(model, *groups)
    check_compacts(model, structure, kept(structure, [0], [1, 2], [0, 1, 2]), torch.randn(5, 6))
    assert (model.first, model.second, model.third) == (3, 2, 1)


class Half(nn.Module):
    """Uses its number as the size of a split, or to multiply by."""

    def __init__(self, is_split: bool) -> None:
        super().__init__()
        self.is_split, self.number = is_split, 6
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.is_split:
            return self.b(torch.cat([part.tanh() for part in x.split(self.number, 1)][::-1], 1))
        return self.b(x * self.number)


def test_a_module_of_the_same_class_may_stay_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Half(False), Half(True))
    halves = [
        (f"{n}.{name}", dim, repeated(6, 2))
        for n in range(2)
        for name, dim in (("a.weight", 0), ("a.bias", 0), ("b.weight", 1))
    ]
    structure = structure_of(model, halves[:3], halves[3:])
    check_compacts(model, structure, kept(structure, [0], [2, 3]), torch.randn(5, 4))
    assert [model[0].number, model[1].number] == [6, 4]
