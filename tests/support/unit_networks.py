"""Networks of which units are whole channels and heads, with structures made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from small_networks import Block, draw, in_float64, prune_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import shard_network
from gbp_ray.pruning.structure import Group, Slice, Structure
from gbp_ray.pruning.unit_scores import score_units
from gbp_ray.workloads.contract import Workload

NUM_EXAMPLES = 11
STEPS = 3


class Conv1D(nn.Module):
    """A linear layer with its inputs first, as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """A network of parts and a function that passes examples through them."""

    def __init__(self, passing: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.passing = passing
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.passing(self, inputs)


def slices_of(*parts: tuple[str, int, Any, str]) -> tuple[Slice, ...]:
    """Makes slices of (name, axis, positions, role); positions of one a unit may be flat."""
    made = []
    for name, dim, positions, role in parts:
        array = np.asarray(positions, dtype=np.int64)
        made.append(Slice(name, dim, array.reshape(len(array), -1), role))
    return tuple(made)


def structure_of(model: nn.Module, *groups: tuple[Slice, ...]) -> Structure:
    made = tuple(
        Group(parts[0].name, "channel", len(parts[0].positions), parts) for parts in groups
    )
    shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    return Structure(made, (), (), {}, shapes)


# -- networks --------------------------------------------------------------------------------------


def residual() -> Net:
    """A residual sum, BatchNorm, a grouped convolution, and channels that become features."""

    def passing(net: Any, images: Tensor) -> Tensor:
        stream = torch.relu(net.norm1(net.conv1(images)))
        stream = stream + net.norm2(net.conv2(stream))
        hidden = torch.tanh(net.conv3(stream))
        return net.head(functional.adaptive_avg_pool2d(hidden, 2).flatten(1))

    net = Net(
        passing,
        conv1=nn.Conv2d(2, 6, 3, padding=1),
        norm1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(6),
        conv3=nn.Conv2d(6, 4, 3, groups=2),
        head=nn.Linear(16, 3),
    )
    with torch.no_grad():
        for norm in (net.norm1, net.norm2):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.weight.uniform_(0.5, 2)
    return net


PAIRS = [[0, 3], [1, 4], [2, 5]]
OF_RESIDUAL = (
    slices_of(
        *((name, 0, PAIRS, "out") for name in ("conv1.weight", "conv1.bias", "conv2.weight")),
        *((f"norm{i}.{own}", 0, PAIRS, "out") for i in (1, 2) for own in ("weight", "bias")),
        ("conv2.weight", 1, PAIRS, "in"),
        ("conv3.weight", 1, [0, 1, 2], "in"),
    ),
    slices_of(
        ("conv3.weight", 0, range(4), "out"),
        ("conv3.bias", 0, range(4), "out"),
        ("head.weight", 1, np.arange(16).reshape(4, 4), "in"),
    ),
)


def gated_ffn() -> Net:
    return Net(
        lambda net, x: net.down(functional.silu(net.gate(x)) * net.up(x)).mean(dim=1),
        gate=nn.Linear(4, 7, bias=False),
        up=nn.Linear(4, 7, bias=False),
        down=nn.Linear(7, 3),
    )


OF_FFN = (
    slices_of(
        ("gate.weight", 0, range(7), "out"),
        ("up.weight", 0, range(7), "out"),
        ("down.weight", 1, range(7), "in"),
    ),
)
HEADS = [[0, 1, 2], [3, 4, 5]]


def attention() -> Net:
    def passing(net: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (2, 3)).transpose(1, 2) for part in (net.q, net.k, net.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return net.o(mixed).mean(dim=1)

    parts = {name: nn.Linear(4, 6) for name in "qkv"}
    return Net(passing, **parts, o=nn.Linear(6, 3))


OF_ATTENTION = (
    slices_of(
        *((f"{part}.{own}", 0, HEADS, "out") for part in "qkv" for own in ("weight", "bias")),
        ("o.weight", 1, HEADS, "in"),
    ),
)


def multihead() -> Net:
    """Attention of torch, which never calls its last layer."""

    def passing(net: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(net.mix(x))
        return net.attention(hidden, hidden, hidden, need_weights=False)[0].mean(dim=1)[:, :3]

    return Net(
        passing, mix=nn.Linear(4, 6), attention=nn.MultiheadAttention(6, 2, batch_first=True)
    )


OF_MULTIHEAD = (
    slices_of(("mix.weight", 0, range(6), "out"), ("attention.in_proj_weight", 1, range(6), "in")),
    slices_of(
        (
            *("attention.in_proj_weight", 0),
            [[*range(s, s + 3), *range(s + 6, s + 9), *range(s + 12, s + 15)] for s in (0, 3)],
            "out",
        ),
        ("attention.out_proj.weight", 1, HEADS, "in"),
    ),
)


def recurrent() -> Net:
    """Examples lie on the second axis, after as many steps as a batch may have examples."""

    def passing(net: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(net.mix(x.transpose(0, 1)))
        return net.head(net.lstm(hidden)[0])[-1]

    return Net(passing, mix=nn.Linear(4, 5), lstm=nn.LSTM(5, 6), head=nn.Linear(6, 3))


OF_RECURRENT = (
    slices_of(("mix.weight", 0, range(5), "out"), ("lstm.weight_ih_l0", 1, range(5), "in")),
    slices_of(
        ("lstm.weight_hh_l0", 0, [[u, u + 6, u + 12, u + 18] for u in range(6)], "out"),
        ("lstm.weight_hh_l0", 1, range(6), "in"),
        ("head.weight", 1, range(6), "in"),
    ),
)


def stepwise() -> Net:
    """Only linear layers, with steps first: batches of three examples look like three steps."""

    def passing(net: Any, x: Tensor) -> Tensor:
        return net.b(torch.tanh(net.a(x.transpose(0, 1)))).cumsum(dim=0).tanh().sum(dim=0)

    return Net(passing, a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def windowed() -> Net:
    """Windows of examples lie along the first axis."""
    return Net(
        lambda net, x: net.b(torch.tanh(net.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2]).sum(1),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3),
    )


OF_TWO = (
    slices_of(
        ("a.weight", 0, range(5), "out"),
        ("a.bias", 0, range(5), "out"),
        ("b.weight", 1, range(5), "in"),
    ),
)


def by_function() -> Net:
    """Calls a layer, and uses its weight once more by itself."""

    def passing(net: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(net.a(x))
        again = functional.linear(hidden.square(), net.b.weight)
        return (net.b(hidden) + 0.3 * again).mean(dim=1)

    return Net(passing, a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def routed() -> Net:
    """Each expert is called with a list of tokens; which tokens depends on them."""

    def passing(net: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(net.a(x))
        outputs = torch.zeros(*x.shape[:2], 3, dtype=x.dtype)
        for number, expert in enumerate((net.b, net.c)):
            is_mine = (x.sum(dim=2) > 0.5) == bool(number)
            outputs = outputs.masked_scatter(is_mine.unsqueeze(2), expert(hidden[is_mine]))
        return outputs.sum(dim=1)

    return Net(passing, a=nn.Linear(4, 5), b=nn.Linear(5, 3), c=nn.Linear(5, 3))


OF_ROUTED = (
    slices_of(
        *((s.name, s.dim, s.positions, s.role) for s in OF_TWO[0]), ("c.weight", 1, range(5), "in")
    ),
)


def turned() -> Net:
    """A transposed convolution in groups, a layer with inputs first, and one called twice."""

    def passing(net: Any, images: Tensor) -> Tensor:
        hidden = torch.tanh(net.up(torch.tanh(net.conv(images))))
        features = net.first(hidden.mean(dim=(2, 3)))
        return net.last(torch.tanh(features)) + net.last(features.square())

    return Net(
        passing,
        conv=nn.Conv2d(2, 4, 3),
        up=nn.ConvTranspose2d(4, 6, 2, groups=2),
        first=Conv1D(5, 6),
        last=nn.Linear(5, 3),
    )


OF_TURNED = (
    slices_of(("conv.weight", 0, range(4), "out"), ("up.weight", 0, range(4), "in")),
    slices_of(("up.weight", 1, [0, 1, 2], "out"), ("first.weight", 0, PAIRS, "in")),
    slices_of(("first.weight", 1, range(5), "out"), ("last.weight", 1, range(5), "in")),
)


def encoder() -> Net:
    """Begins with a layer that torch passes in one kernel where no weight needs a gradient."""
    return Net(
        lambda net, x: net.head(net.layer(x)).mean(dim=1),
        layer=nn.TransformerEncoderLayer(4, 2, 7, 0.0, batch_first=True),
        head=nn.Linear(4, 3),
    )


OF_ENCODER = (
    slices_of(
        ("layer.linear1.weight", 0, range(7), "out"),
        ("layer.linear1.bias", 0, range(7), "out"),
        ("layer.linear2.weight", 1, range(7), "in"),
    ),
)


def checkpointed() -> Net:
    """Recomputes a part that lets no gradient through unless its inputs need one."""

    def passing(net: Any, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda h: net.b(torch.tanh(net.a(h))), net.stem(x), use_reentrant=True)
        return hidden.mean(dim=1)

    return Net(passing, stem=nn.Linear(4, 4), a=nn.Linear(4, 5), b=nn.Linear(5, 3))


class AttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.attention(inputs, inputs, inputs, need_weights=False)[0]


def in_blocks() -> Net:
    """Blocks large enough to be sharded as groups, one of them frozen."""

    def passing(net: Any, x: Tensor) -> Tensor:
        stream = net.stem(x)
        for block in net.blocks:
            stream = block(stream)
        return net.head(stream).mean(dim=1)

    blocks = nn.ModuleList([Block(18), AttentionBlock(18), Block(18)])
    blocks[2].requires_grad_(False)
    return Net(passing, stem=nn.Linear(4, 18), blocks=blocks, head=nn.Linear(18, 3))


def _hidden_of(block: str, width: int) -> tuple[Slice, ...]:
    return slices_of(
        (f"{block}.first.weight", 0, range(width), "out"),
        (f"{block}.first.bias", 0, range(width), "out"),
        (f"{block}.second.weight", 1, range(width), "in"),
    )


OF_BLOCKS = (
    _hidden_of("blocks.0", 6),
    slices_of(("blocks.1.attention.out_proj.weight", 1, np.arange(18).reshape(2, 9), "in")),
    _hidden_of("blocks.2", 6),
)


@dataclass(frozen=True)
class UnitCase:
    """A network, its groups, the shape of an example, and whether its gates can be heard by row."""

    build: Callable[[], nn.Module]
    groups: tuple[tuple[Slice, ...], ...]
    shape: tuple[int, ...] = (STEPS, 4)
    is_by_row: bool = False

    def made(self, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Structure]:
        model = in_float64(self.build).to(dtype)
        return model, structure_of(model, *self.groups)

    def workload(self, dtype: torch.dtype = torch.float64) -> Workload:
        inputs = draw(NUM_EXAMPLES, *self.shape, seed=1, dtype=dtype)
        labels = (inputs.flatten(1).sum(dim=1) * 3).round().long().remainder(3)
        return Workload(self.build, (inputs, labels), (inputs, labels))


UNIT_CASES = {
    "residual": UnitCase(residual, OF_RESIDUAL, (2, 5, 5), is_by_row=True),
    "gated ffn": UnitCase(gated_ffn, OF_FFN, is_by_row=True),
    "attention": UnitCase(attention, OF_ATTENTION, is_by_row=True),
    "turned": UnitCase(turned, OF_TURNED, (2, 5, 5), is_by_row=True),
    "encoder": UnitCase(encoder, OF_ENCODER, is_by_row=True),
    "checkpointed": UnitCase(checkpointed, OF_TWO, is_by_row=True),
    "multihead": UnitCase(multihead, OF_MULTIHEAD),
    "recurrent": UnitCase(recurrent, OF_RECURRENT),
    "stepwise": UnitCase(stepwise, OF_TWO),
    "windowed": UnitCase(windowed, OF_TWO),
    "by function": UnitCase(by_function, OF_TWO),
    "routed": UnitCase(routed, OF_ROUTED),
    "in blocks": UnitCase(in_blocks, OF_BLOCKS),
}


# -- on several ranks ------------------------------------------------------------------------------

ON_RANKS = ("residual", "multihead", "in blocks")
RULES = ("taylor", "taylor_squared", "fisher", "magnitude", "grasp", "random")


def unit_scores_of(ranks: Ranks, *, is_sharded: bool = False) -> dict[tuple[str, ...], bytes]:
    """Scores the units of networks by the gate, and by the sum; returns the bits."""
    found = {}
    for name in ON_RANKS:
        case = UNIT_CASES[name]
        for rule in RULES:
            for way in ("gate", "sum"):
                model, structure = case.made(dtype=torch.float32)
                if is_sharded:
                    shard_network(model, ranks.device, ranks.world_size)
                config = prune_config(rule, unit_score=way, calibration_batch_size=2)
                kept_U = np.arange(structure.num_units) != 1
                workload = case.workload(torch.float32)
                scores_U = score_units(model, structure, kept_U, workload, config, ranks)
                assert all(parameter.grad is None for parameter in model.parameters())
                found[name, rule, way] = scores_U.tobytes()
    return found


def unit_program(ranks: Ranks) -> dict[str, Any]:
    """Scores networks in one piece and, on two ranks, in shards."""
    report: dict[str, Any] = {"replicated": unit_scores_of(ranks)}
    if ranks.world_size == 2:
        report["fsdp"] = unit_scores_of(ranks, is_sharded=True)
    return report
