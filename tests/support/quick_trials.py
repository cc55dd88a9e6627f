"""A trial on digits in a second, and what of its results nothing may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.results.store import Store

QUICK: dict[str, Any] = {
    "cluster.num_workers": 0,
    "workload.options.width": 8,
    "pretrain.epochs": 0.5,
    "finetune.epochs": 0.2,
    "prune.rounds": 2,
    "prune.calibration_examples": 64,
    "prune.batchnorm_examples": 128,
}


def quick_job(storage: Path | str, **changed: Any) -> JobConfig:
    return load_job(None, QUICK | {"storage": str(storage)} | changed)


def results_of(job: JobConfig) -> list[tuple[Any, ...]]:
    """Reads everything of a trial that an interruption, a death or sharing must not change."""
    store, name = Store(job.storage, job.name), trial_id(job)
    return [
        (
            record.model_dump(exclude={"seconds", "files"}),
            # state.pt is a zip archive, whose bytes are the writer's business.
            store.read_file(name, record, "weights.safetensors"),
            store.read_file(name, record, "masks.safetensors"),
        )
        for record in store.read_rounds(name)
    ]
