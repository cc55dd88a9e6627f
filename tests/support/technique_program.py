"""What every rank computes in test_techniques: trials that use everything a recipe offers."""

from __future__ import annotations

from typing import Any

from rank_program import digest
from small_networks import images, job_config

from gbp_ray.config.training import FinetuneConfig, PretrainConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole
from gbp_ray.pruning.rounds import run_rounds

EVERYTHING = {
    "epochs": 1,
    "batch_size": 15,
    "microbatches": 4,
    "label_smoothing": 0.1,
    "mixup": 0.4,
    "cutmix": 1.0,
    "max_gradient_norm": 0.5,
    "ema_decay": 0.8,
}


def technique_rounds(ranks: Ranks, strategy: str, precision: str) -> list[Any]:
    """Runs two rounds; reports of each its figures, its mask and its weights."""
    recipe = EVERYTHING | {"precision": precision}
    job = job_config(
        pretrain=PretrainConfig(**recipe),
        finetune=FinetuneConfig(
            **recipe, optimizer="adamw", learning_rate=0.003, distillation={"weight": 0.3}
        ),
        prune={
            "rounds": 2,
            "calibration_examples": 30,
            "calibration_batch_size": 7,
            "batchnorm_examples": 20,
        },
        workload={"eval_batch_size": 5},
        cluster={"strategy": strategy},
    )
    return [
        (
            state.record.model_dump(exclude={"seconds"}),
            state.masks.digest,
            digest({n: gather_whole(t) for n, t in state.model.state_dict().items()}),
        )
        for state in run_rounds(job, images(), ranks)
    ]


def technique_program(ranks: Ranks) -> dict[str, Any]:
    """Runs them in one piece and in shards; two ranks and four share the precisions among them."""
    precisions = ("float32", "bfloat16") if ranks.world_size == 2 else ("bfloat16", "float32")
    return {
        case: technique_rounds(ranks, *case)
        for case in zip(("replicated", "fsdp"), precisions, strict=True)
    }
