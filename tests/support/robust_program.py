"""What test_ranks and test_sharding run with attacks, frozen parts and teachers."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from small_networks import images, job_config

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole
from gbp_ray.pruning.checkpoint import Checkpoint
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload

CASES = ("attacked", "taught once")


def case_of(case: str, strategy: str = "replicated") -> tuple[JobConfig, Workload]:
    """Makes a job with its workload.

    "attacked" trains on adversarial examples, freezes a layer and matches features; "taught once"
    asks its teacher beforehand.
    """
    training: dict[str, Any] = {"epochs": 1, "batch_size": 15, "microbatches": 4}
    prune = {"rounds": 2, "calibration_examples": 30, "calibration_batch_size": 7}
    common = {
        "prune": {**prune, "batchnorm_examples": 20},
        "workload": {"eval_batch_size": 5},
        "cluster": {"strategy": strategy},
    }
    workload = dataclasses.replace(images(), input_range=(-6.0, 6.0))
    if case == "taught once":
        taught = {**training, "distillation": {"weight": 0.7}}
        job = job_config(pretrain=training, finetune=taught, **common)
        return job, dataclasses.replace(workload, augment=None)
    attack = {"kind": "pgd", "epsilon": 0.02, "steps": 2}
    job = job_config(
        pretrain={
            **training,
            "freeze": ["conv1.*", "norm1.*"],
            "adversarial": {"kind": "fgsm", "epsilon": 0.02, "weight": 0.5},
        },
        finetune={
            **training,
            "adversarial": attack,
            "freeze": ["conv2.*"],
            "distillation": {"weight": 0.3, "features": ["norm1", "conv2"]},
        },
        attack={**attack, "steps": 3, "examples": 18},
        **common,
    )
    return job, workload


def rounds_of(
    case: str, ranks: Ranks, strategy: str = "replicated", resume: Checkpoint | None = None
) -> list[dict[str, Any]]:
    """Runs a case; reports of each round what was measured, and its weights."""
    job, workload = case_of(case, strategy)
    found = []
    for state in run_rounds(job, workload, ranks, resume=resume):
        hashed = hashlib.sha256()
        for name, tensor in state.model.state_dict().items():
            hashed.update(name.encode() + gather_whole(tensor).contiguous().numpy().tobytes())
        record = state.record.model_dump(exclude={"seconds"})
        found.append({"record": record, "weights": hashed.hexdigest()})
    return found
