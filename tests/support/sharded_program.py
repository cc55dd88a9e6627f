"""What every rank computes in test_sharding, replicated on one process and sharded over several."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rank_program import gather_movement, hard_masks
from safetensors.torch import load_file
from small_networks import BlockNet, prune_config
from techniques import rounds_of
from torch import Tensor, nn

from gbp_ray.config.criteria import CRITERIA
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
from gbp_ray.pruning.checkpoint import Checkpoint
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.network import build_start
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.networks import build_cifar_resnet

DATA = Path(os.environ.get("GBP_RAY_DATA", Path(__file__).parents[3] / "shared" / "data"))

# movement comes last, as it trains the network.
GRADIENT_RULES = sorted(set(CRITERIA) - {"magnitude", "random"}, key=["movement"].count)
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
    """Shards it; on odd numbers of ranks hard scores come along, on even ones in `test_ranks`."""
    report: dict[str, Any] = {"masks": resnet_masks(ranks, is_sharded=True)}
    if ranks.world_size % 2:
        report["hard masks"] = hard_masks(ranks, is_sharded=True)
    return report


# -- networks in blocks ----------------------------------------------------------------------------


class TrialProgram:
    """A trial of a sharded network in blocks, from its start or from a checkpoint."""

    def __init__(self, resume: Checkpoint | None = None) -> None:
        self.resume = resume

    def __call__(self, ranks: Ranks) -> dict[str, Any]:
        return {"rounds": rounds_of("in blocks", ranks, "fsdp", self.resume)}


def blocks_program(ranks: Ranks) -> dict[str, Any]:
    """Looks at what lies on this rank."""
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
        rounds_of("in blocks", ranks, "fsdp", build=FailingNet)
    except (GbpError, RuntimeError, ZeroDivisionError) as error:
        return {"failed with": f"{type(error).__name__}: {error}"}
    return {"failed with": "nothing"}
