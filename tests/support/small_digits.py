"""One small trial on digits with a validation split, shared by the tests of what comes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gbp_ray
from gbp_ray.runtime.api import PruneResult

FIELDS: dict[str, Any] = {
    "cluster.num_workers": 0,
    "workload.options.width": 8,
    "workload.validation": 0.2,
    "workload.train_sample": 200,
    "pretrain.epochs": 1,
    "finetune.epochs": 0.5,
    "finetune.patience": 1,
    "finetune.validate_every": 0.25,
    "prune.rounds": 3,
    # Two rounds at the final sparsity, so that there is something to choose.
    "prune.ramp_rounds": 2,
    "prune.calibration_examples": 64,
    "prune.batchnorm_examples": 128,
}


def prune_digits(storage: Path, **changed: Any) -> PruneResult:
    """Runs it, or answers from the storage."""
    return gbp_ray.prune(None, FIELDS | {"storage": str(storage)} | changed, is_quiet=True)
