"""Trials that remove whole units, for one process and for several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from safetensors.torch import load
from small_networks import ConvNet, images, job_config
from techniques import checkpoint_of, digest
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.checkpoint import Checkpoint
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload


class Attending(nn.Module):
    """Rows of an image attend to each other, in four heads whose width is a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.embed = nn.Linear(12, 16)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.transpose(1, 2).flatten(2)
        hidden = self.embed(rows)
        batch, length, _ = hidden.shape
        qkv = self.qkv(hidden).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        hidden = hidden + self.down(functional.gelu(self.up(self.norm(hidden))))
        return self.head(hidden.mean(dim=1))


class Stacked(nn.Module):
    """Three feed-forward blocks on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(72, 12)
        self.up = nn.ModuleList(nn.Linear(12, 20) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(20, 12) for _ in range(3))
        self.head = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs.flatten(1))
        for up, down in zip(self.up, self.down, strict=True):
            hidden = hidden + down(functional.gelu(up(hidden)))
        return self.head(hidden)


@dataclass(frozen=True)
class Case:
    """A job in few sections, and its network."""

    prune: dict[str, Any]
    finetune: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] = field(default=partial(ConvNet, dropout=0.0))


_HALF = {"granularity": "channel", "target": {"macs": 0.5}}
_ADAM = {"optimizer": "adamw"}

CASES = {
    "gate": Case({**_HALF, "criterion": "taylor_squared"}, {"momentum": 0.9}),
    "example": Case({**_HALF, "criterion": "fisher"}, _ADAM),
    "norm": Case(
        {"granularity": "channel", "criterion": "magnitude", "sparsity": 0.5, "scope": "layer"}
    ),
    "moved": Case({**_HALF, "criterion": "movement"}),
    "rewound": Case({**_HALF, "criterion": "taylor", "rewind": "weights"}, _ADAM),
    "taught": Case(
        {**_HALF, "criterion": "taylor"}, {"distillation": {"weight": 0.5}, "ema_decay": 0.5}
    ),
    "heads": Case(
        {
            "granularity": "channel+head",
            "criterion": "taylor",
            "target": {"parameters": 0.6},
            "min_width": 1,
        },
        _ADAM,
        Attending,
    ),
    "uniform": Case(
        {
            "granularity": "channel",
            "criterion": "taylor",
            "target": {"macs": 0.7, "uniform": True},
            "exclude": ["embed.*", "head.*"],
        },
        build=Stacked,
    ),
    "refitted": Case(
        {**_HALF, "criterion": "taylor", "reconstruct": "least_squares"}, {"momentum": 0.9}
    ),
    "zeros": Case({**_HALF, "criterion": "taylor_squared", "compact": False}, {"momentum": 0.9}),
}


def case_of(name: str, strategy: str = "replicated", **prune: Any) -> tuple[JobConfig, Workload]:
    """Returns the job and the workload of a case."""
    case = CASES[name]
    few = {"rounds": 2, "calibration_examples": 20, "calibration_batch_size": 8}
    job = job_config(
        workload={"eval_batch_size": 8},
        pretrain={"epochs": 1, "batch_size": 12},
        prune={**few, "batchnorm_examples": 24, "sparsity": 0.0, **case.prune, **prune},
        finetune={"epochs": 1, "batch_size": 12, "learning_rate": 0.01, **case.finetune},
        cluster={"strategy": strategy},
    )
    return job, images(case.build)


def rounds_of(
    name: str,
    ranks: Ranks,
    strategy: str = "replicated",
    resume: Checkpoint | None = None,
    *,
    with_model: bool = False,
) -> list[dict[str, Any]]:
    """Runs a case; reports of each round what has to be the same everywhere, and its files."""
    job, workload = case_of(name, strategy)
    found = []
    for state in run_rounds(job, workload, ranks, resume=resume):
        parts = ranks.all_gather_objects({n: bytes(d) for n, d in state.to_files().items()})
        files = {n: d for part in reversed(parts) for n, d in part.items()}
        cost = state.record.cost
        found.append(
            {
                "mask": state.masks.digest,
                "units": cost.model_copy(update={"units": None}).model_dump(),
                "widths": cost.units.widths if cost.units else (),
                "macs": cost.units.macs if cost.units else 0,
                "score": state.record.score,
                "loss": state.record.loss,
                "weights": digest(dict(state.model.named_parameters())),
                "shapes": {n: tuple(p.shape) for n, p in state.model.named_parameters()},
                "stored": files["weights.safetensors"],
                "masks": files["masks.safetensors"],
                "files": files,
                "cost": cost,
                "model": copy.deepcopy(state.model) if with_model else None,
            }
        )
    return found


SHARDED = ("gate", "moved", "heads", "refitted")
"""Cases that are run in shards as well, and resumed there."""


def unit_program(ranks: Ranks) -> dict[Any, Any]:
    """Runs every case in one piece, and some in shards, there also resumed after a round."""
    found: dict[Any, Any] = {}
    for name in CASES:
        found[name, "replicated"] = _without_files(rounds_of(name, ranks))
    for name in SHARDED:
        whole = rounds_of(name, ranks, "fsdp")
        rest = rounds_of(name, ranks, "fsdp", checkpoint_of(whole, 1))
        found[name, "fsdp"] = _without_files(whole)
        found[name, "fsdp", "resumed"] = _without_files(rest)
    return found


def few_program(ranks: Ranks) -> dict[Any, Any]:
    """Runs one case, for more ranks than are fast."""
    return {
        ("gate", strategy): _without_files(rounds_of("gate", ranks, strategy))
        for strategy in ("replicated", "fsdp")
    }


def _without_files(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in report.items() if k != "files"} for report in rounds]


def weights_in(report: dict[str, Any]) -> dict[str, Tensor]:
    """Reads the stored weights of a round."""
    return load(report["stored"])
