"""What every rank computes in test_sharding, replicated on one process and sharded over several."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rank_program import digest, gather_movement, hard_masks
from safetensors.torch import load_file
from small_networks import images, job_config, prune_config
from torch import Tensor, nn

from gbp_ray.config.training import FinetuneConfig
from gbp_ray.distributed import sharding
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import (
    gather_bits,
    gather_whole,
    is_shard,
    local,
    shard_from_rows,
    shard_network,
)
from gbp_ray.errors import GbpError
from gbp_ray.pruning.checkpoint import SHARDS, Checkpoint
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.network import build_start
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.networks import build_cifar_resnet

DATA = Path(os.environ.get("GBP_RAY_DATA", Path(__file__).parents[3] / "shared" / "data"))

# movement comes last, as it trains the network.
GRADIENT_RULES = (
    *("taylor", "snip", "taylor_squared", "fisher", "obd", "grasp", "synflow"),
    "movement",
)
RESNET_CASES = [
    (rule, scope, granularity)
    for rule in GRADIENT_RULES
    for scope in ("global", "layer")
    for granularity in ("weight", "2:4", "1:4")
]


# -- a ResNet-20 with its trained weights ----------------------------------------------------------


def resnet20() -> nn.Module:
    """Loads the public checkpoint."""
    model = build_cifar_resnet(20)
    model.load_state_dict(load_file(DATA / "checkpoints" / "resnet20.safetensors"))
    return model


def cifar_images(number: int) -> tuple[Tensor, Tensor]:
    """Reads the first test images, normalised as the checkpoint wants them."""
    (shard,) = (DATA / "cifar10").glob("test-*.parquet")
    rows = next(pq.ParquetFile(shard).iter_batches(number)).to_pylist()
    pictures = [Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB") for row in rows]
    pixels = torch.stack(
        [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures]
    )
    scaled = pixels.view(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (scaled - mean) / deviation, torch.tensor([row["label"] for row in rows])


def resnet_masks(ranks: Ranks, *, is_sharded: bool) -> dict[tuple[str, str, str], str]:
    """Decides once by every gradient criterion, scope and granularity; returns mask digests."""
    split = cifar_images(10)
    workload = Workload(build_model=resnet20, train=split, test=split)
    strategy = "fsdp" if is_sharded else "replicated"
    model, *_ = build_start(workload, 0, ranks, strategy)
    found = {}
    for rule in GRADIENT_RULES:
        config = prune_config(
            rule,
            exclude=("conv1.*",),
            calibration_examples=10,
            calibration_batch_size=2,
            hutchinson_probes=1,
        )
        units = prunable_parameters(model, config.exclude)
        movement = None
        if rule == "movement":
            recipe = FinetuneConfig(epochs=2, batch_size=10, microbatches=4, learning_rate=0.01)
            movement = gather_movement(ranks, model, workload, recipe, 2)
        scores = score(model, units, workload, config, ranks, seed=1, movement=movement)
        for _, scope, granularity in (case for case in RESNET_CASES if case[0] == rule):
            sparsity = {"weight": 0.8, "2:4": 0.5, "1:4": 0.75}[granularity]
            chosen = config.model_copy(update={"scope": scope, "granularity": granularity})
            axes = {unit.name: unit.input_dim for unit in units}
            dense = MaskSet.dense(units)
            masks = select_masks(scores, dense, chosen, sparsity, axes, ranks).masks
            found[rule, scope, granularity] = masks.digest
    return found


def resnet_program(ranks: Ranks) -> dict[str, Any]:
    """Shards it; hard scores come along, as it runs on every number of ranks."""
    return {
        "masks": resnet_masks(ranks, is_sharded=True),
        "hard masks": hard_masks(ranks, is_sharded=True),
    }


# -- networks in blocks ----------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = inputs + self.second(torch.relu(self.first(inputs)))
        return hidden


class BlockNet(nn.Module):
    """Blocks in a list, each a group of its own; two of them share a weight, two freeze one."""

    def __init__(self, *, is_tied: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(18 * 4, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.head = nn.Linear(24, 3)
        if is_tied:
            self.blocks[3].first.weight = self.blocks[1].first.weight
        self.blocks[4].second.weight.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs.flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        outputs: Tensor = self.head(hidden)
        return outputs


MOVEMENT = {"criterion": "movement", "exclude": ("blocks.4.second.weight",)}


def blank_net() -> nn.Module:
    """Builds the network without weights."""
    with torch.device("meta"):
        return BlockNet(is_tied=False)


def trial(
    ranks: Ranks,
    strategy: str,
    build: Callable[[], nn.Module] = BlockNet,
    resume: Checkpoint | None = None,
    **sections: Any,
) -> list[dict[str, Any]]:
    """Runs rounds; reports of each its figures, mask and weights, and all ranks' files."""
    job = job_config(
        pretrain={"epochs": 1, "batch_size": 15, "microbatches": 4},
        finetune={
            "epochs": 1,
            "batch_size": 15,
            "microbatches": 4,
            "optimizer": "adamw",
            "distillation": {"weight": 0.3},
        },
        prune={
            "rounds": 2,
            "calibration_examples": 30,
            "calibration_batch_size": 7,
            **sections,
        },
        workload={"eval_batch_size": 5},
        cluster={"strategy": strategy},
    )
    reports = []
    for state in run_rounds(job, images(build), ranks, resume=resume):
        weights = {n: gather_whole(t) for n, t in state.model.state_dict().items()}
        parts = ranks.all_gather_objects({n: bytes(d) for n, d in state.to_files().items()})
        reports.append(
            {
                "record": state.record.model_dump(exclude={"seconds"}),
                "mask": state.masks.digest,
                "weights": digest(weights),
                "files": {n: d for part in reversed(parts) for n, d in part.items()},
            }
        )
    return reports


def checkpoint_of(reports: list[dict[str, Any]], number: int) -> Checkpoint:
    """Takes a round's files as a trial that goes on finds them."""
    files = reports[number]["files"]
    return Checkpoint(
        round=number,
        masks=files["masks.safetensors"],
        weights=files["weights.safetensors"],
        state=files.get("state.pt", b""),
        shards={n.removeprefix(SHARDS): d for n, d in files.items() if n.startswith(SHARDS)},
        dense_weights=reports[0]["files"]["weights.safetensors"],
    )


class TrialProgram:
    """A trial of sharded networks, from its start or from a checkpoint."""

    def __init__(self, resume: Checkpoint | None = None, **sections: Any) -> None:
        self.resume, self.sections = resume, sections

    def __call__(self, ranks: Ranks) -> dict[str, Any]:
        return {"rounds": trial(ranks, "fsdp", resume=self.resume, **self.sections)}


def blocks_program(ranks: Ranks) -> dict[str, Any]:
    """Looks at what lies on this rank, and at a network that never had weights in one piece."""
    model = BlockNet()
    shard_network(model, ranks.device, ranks.world_size)
    rows = {name: tuple(local(p.detach()).shape) for name, p in model.named_parameters()}
    return {
        "groups": sorted(
            n for n, m in model.named_modules() if type(m).__name__.startswith("FSDP")
        ),
        "are shards": all(is_shard(p) for p in model.parameters()),
        "rows": rows,
        "gathered bits": {portion: _gather_signs(model, portion) for portion in (1, 2000, 2**27)},
        "blank": trial(ranks, "fsdp", blank_net),
        "fisher": trial(ranks, "fsdp", criterion="fisher", rewind="weights"),
        "movement": trial(ranks, "fsdp", **MOVEMENT),
    }


def _gather_signs(model: nn.Module, portion: int) -> bool:
    """Gathers where weights are positive, so many at a time; says whether it is so everywhere."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    signs = (shard_from_rows(local(parameter) > 0, parameter) for parameter in parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_PORTION", portion)
        gathered = list(gather_bits(signs))
    expected = [gather_whole(parameter).flatten().numpy() > 0 for parameter in parameters]
    return all(map(np.array_equal, gathered, expected)) and len(gathered) == len(expected)


def failing_program(ranks: Ranks) -> dict[str, Any]:
    """Fails in a forward pass of the last rank alone, while the others wait for its weights."""
    calls = 0

    class FailingNet(BlockNet):
        def forward(self, inputs: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if ranks.rank == ranks.world_size - 1 and calls > 6:
                raise ZeroDivisionError("planted")
            return super().forward(inputs)

    try:
        trial(ranks, "fsdp", FailingNet)
    except (GbpError, RuntimeError, ZeroDivisionError) as error:
        return {"failed with": f"{type(error).__name__}: {error}"}
    return {"failed with": "nothing"}


def without_files(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in report.items() if k != "files"} for report in rounds]
