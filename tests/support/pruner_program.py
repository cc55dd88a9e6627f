"""A training loop with a Pruner: alone, and on each of two ranks under DDP or FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rank_program import digest
from small_networks import built, draw
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import gbp_ray
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole
from gbp_ray.errors import GbpError

NUM_STEPS = 7
SIZES = (6, 4)
"""Examples of each of two ranks in a batch; their means weigh alike in training."""

CRITERIA = (
    *("taylor", "taylor_squared", "fisher", "obd", "grasp", "wanda", "obs", "kfac"),
    *("magnitude", "random", "movement"),
)
SHARDABLE = ("taylor", "taylor_squared", "magnitude", "random", "movement")


class Net(nn.Module):
    """Convolutions, a spare buffer that rank 0 decides, and dropout, which scoring leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8)
        self.body = nn.Sequential(nn.Linear(8 * 16, 12), nn.Tanh())
        self.head = nn.Linear(12, 4)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(inputs))).flatten(1)
        return self.head(self.body(hidden + self.shift))


class UnitNet(Net):
    """The same without a norm, so that channels of the convolution can leave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    size = SIZES[rank]
    inputs = draw(size, 2, 6, 6, seed=100 * step + rank)
    return inputs, (inputs.sum(dim=(1, 2, 3)) * 3).long().remainder(4)


def optimizer_of(model: nn.Module, kind: str = "adam") -> Optimizer:
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def pruner_of(
    model: nn.Module, optimizer: Optimizer, criterion: str, **more: Any
) -> gbp_ray.Pruner:
    options = {"sparsity": 0.9, "start": 1, "end": 6, "every": 2, **more}
    return gbp_ray.Pruner(model, criterion=criterion, optimizer=optimizer, **options)


def train(criterion: str, kind: str = "alone", rank: int = 0, **more: Any) -> dict[str, Any]:
    """Trains on both ranks' batches, this process on its own; reports masks and weights."""
    model = built(Net)
    if kind == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model.body)
        wrapped = fully_shard(model)
    else:
        wrapped = model
    optimizer = optimizer_of(model, more.pop("optimizer", "adam"))
    pruner = pruner_of(wrapped, optimizer, criterion, **more)
    masks, zeros = [], []
    for step in range(1, NUM_STEPS + 1):
        batches = [batch_of(step, r) for r in ((0, 1) if kind == "alone" else (rank,))]
        for inputs, targets in batches:
            (functional.cross_entropy(wrapped(inputs), targets) / len(batches)).backward()
        optimizer.step()
        if pruner.step(*batches):
            masks.append((step, pruner.masks.digest, pruner.sparsity))
        optimizer.zero_grad()
        zeros.append(pruner.masks.find_revived(model))
    state = pruner.state_dict()
    if kind == "fsdp":
        other = pruner_of(wrapped, optimizer, criterion, **more)
        other.load_state_dict(state)
        assert other.masks == pruner.masks
        assert digest(other.state_dict()["movement"]) == digest(state["movement"])
    return {
        "masks": masks,
        "zeros": zeros,
        "weights": digest({n: gather_whole(p.detach()) for n, p in model.named_parameters()}),
        "state": {**state, "masks": digest(state["masks"]), "movement": digest(state["movement"])},
    }


UNIT_CASES: dict[str, dict[str, Any]] = {
    "gate": {"criterion": "taylor", "target": {"macs": 0.5}},
    "example": {"criterion": "fisher", "sparsity": 0.5},
    "norm": {"criterion": "magnitude", "sparsity": 0.5, "scope": "layer"},
    "moved": {"criterion": "movement", "target": {"parameters": 0.4}, "every": 3},
}


def train_units(case: str, kind: str = "alone", rank: int = 0) -> dict[str, Any]:
    """Trains as `train`, takes the units out at the end, and trains on without them."""
    model = built(UnitNet)
    wrapped: nn.Module = DistributedDataParallel(model) if kind == "ddp" else model
    optimizer = optimizer_of(model)
    fields = {"granularity": "channel", "start": 0, "end": 4, "every": 2, **UNIT_CASES[case]}
    pruner = gbp_ray.Pruner(wrapped, optimizer=optimizer, **fields)
    masks, result = [], None
    for step in range(1, NUM_STEPS + 1):
        batches = [batch_of(step, r) for r in ((0, 1) if kind == "alone" else (rank,))]
        for inputs, targets in batches:
            (functional.cross_entropy(wrapped(inputs), targets) / len(batches)).backward()
        optimizer.step()
        if pruner.step(*batches):
            masks.append((step, pruner.masks.digest, pruner.sparsity))
        assert result is not None or pruner.masks.find_revived(model) is None
        optimizer.zero_grad()
        if step == 5:
            result = pruner.compact(batches[0])
            wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    assert result is not None
    return {
        "masks": masks,
        "result": (result.widths, result.macs, result.num_parameters, result.difference <= 1e-5),
        "weights": digest({n: p.detach() for n, p in model.named_parameters()}),
    }


def strayed_buffers(rank: int, kind: str = "ddp") -> str:
    """Decides once where each rank has another buffer."""
    model = built(Net)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    model.shift.fill_(float(rank))
    pruner = gbp_ray.Pruner(wrapped, sparsity=0.5, end=1, criterion="taylor")
    pruner.step(*(batch_of(1, r) for r in ((0, 1) if kind == "alone" else (rank,))))
    assert model.shift == rank
    return pruner.masks.digest


DATA = (draw(30, 2, 6, 6), torch.arange(30) % 4)


def at_once(ranks: Ranks, kind: str = "alone", criterion: str = "taylor") -> str:
    model = built(Net)
    if kind == "fsdp":
        fully_shard(model.body)
        model = fully_shard(model)
    masks = gbp_ray.prune_model(
        model, DATA, sparsity=0.8, criterion=criterion, calibration_batch_size=7
    )
    assert masks.find_revived(model) is None
    return masks.digest


def refitted_at_once(ranks: Ranks, kind: str = "alone") -> str:
    """Refits where each rank has another buffer; returns a digest of the weights."""
    model = built(Net)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    model.shift.fill_(float(ranks.rank))
    fields = {"criterion": "magnitude", "reconstruct": "least_squares"}
    gbp_ray.prune_model(wrapped, DATA, sparsity=0.6, calibration_batch_size=7, **fields)
    assert model.shift == ranks.rank
    return digest({n: p.detach() for n, p in model.named_parameters()})


def units_at_once(ranks: Ranks) -> tuple[Any, ...]:
    """Prunes units of a network in memory and takes them out, with the same data everywhere."""
    model = built(UnitNet)
    fields = {"granularity": "channel", "target": {"macs": 0.5}, "calibration_batch_size": 7}
    masks = gbp_ray.prune_model(model, DATA, criterion="taylor_squared", **fields)
    result = gbp_ray.compact(model, masks, DATA)
    return masks.digest, result, digest({n: p.detach() for n, p in model.named_parameters()})


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except GbpError as error:
        return str(error)
    return ""


def refusals(ranks: Ranks) -> dict[str, str]:
    strayed = built(Net, seed=ranks.rank)
    few = tuple(column[: 30 - ranks.rank] for column in DATA)
    uneven = gbp_ray.Pruner(DistributedDataParallel(built(Net)), sparsity=0.5, end=1)
    return {
        "weights": told(
            lambda: gbp_ray.Pruner(strayed, sparsity=0.5, end=1, criterion="magnitude").step()
        ),
        "models": told(lambda: gbp_ray.prune_model(strayed, DATA, sparsity=0.5)),
        "data": told(lambda: gbp_ray.prune_model(built(Net), few, sparsity=0.5)),
        "batches": told(lambda: uneven.step(*[batch_of(1, 0)] * (1 + ranks.rank))),
        "labels": told(
            lambda: gbp_ray.Pruner(built(Net), sparsity=0.5, end=1).step(
                (batch_of(1, 0)[0], batch_of(1, 0)[1] + ranks.rank)
            )
        ),
        "passes": told(lambda: at_once(ranks, "fsdp", "fisher")),
    }


def pruner_program(ranks: Ranks) -> dict[str, Any]:
    """Reports what one of two ranks gets."""
    found: dict[str, Any] = {}
    for criterion in CRITERIA:
        found["ddp", criterion] = train(criterion, "ddp", ranks.rank)
    for criterion in SHARDABLE:
        found["fsdp", criterion] = train(criterion, "fsdp", ranks.rank)
    more = {"scope": "layer", "optimizer": "sgd", "schedule": "geometric"}
    found["ddp", "by layer"] = train("taylor", "ddp", ranks.rank, **more)
    found["fsdp", "by layer"] = train("taylor", "fsdp", ranks.rank, **more)
    for case in UNIT_CASES:
        found["units", case] = train_units(case, "ddp", ranks.rank)
    found["buffers"] = strayed_buffers(ranks.rank)
    found["at once"] = [at_once(ranks, kind) for kind in ("alone", "fsdp")]
    found["refitted at once"] = refitted_at_once(ranks, "ddp")
    found["units at once"] = units_at_once(ranks)
    found["refused"] = refusals(ranks)
    return found
