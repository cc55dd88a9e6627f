"""Gradient-based pruning of PyTorch models as jobs on a Ray cluster.

Names load on first use, so that `import gbp_ray` costs neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ClusterError": "gbp_ray.errors",
    "ConfigError": "gbp_ray.errors",
    "GbpError": "gbp_ray.errors",
    "JobConfig": "gbp_ray.config",
    "MaskSet": "gbp_ray.pruning.masks",
    "PruneError": "gbp_ray.errors",
    "PruneResult": "gbp_ray.api",
    "Report": "gbp_ray.page",
    "Results": "gbp_ray.results",
    "StoreError": "gbp_ray.errors",
    "SweepResult": "gbp_ray.api",
    "TransientStoreError": "gbp_ray.errors",
    "TrialError": "gbp_ray.errors",
    "Workload": "gbp_ray.workload",
    "WorkloadError": "gbp_ray.errors",
    "apply_masks": "gbp_ray.reuse",
    "explain_round": "gbp_ray.explain",
    "export_round": "gbp_ray.export",
    "load_job": "gbp_ray.config",
    "measure_stability": "gbp_ray.stability",
    "open_result": "gbp_ray.api",
    "open_results": "gbp_ray.results",
    "plan_prune": "gbp_ray.api",
    "plan_sweep": "gbp_ray.api",
    "prune": "gbp_ray.api",
    "submit": "gbp_ray.api",
    "sweep": "gbp_ray.api",
    "write_report": "gbp_ray.page",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gbp_ray' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
