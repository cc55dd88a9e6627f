"""Gradient-based pruning of PyTorch models as jobs on a Ray cluster.

Names load on first use, so that `import gbp_ray` costs neither torch nor Ray.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ClusterError": "gbp_ray.errors",
    "CompactResult": "gbp_ray.pruning.compact_in_memory",
    "ConfigError": "gbp_ray.errors",
    "GbpError": "gbp_ray.errors",
    "JobConfig": "gbp_ray.config.job",
    "MaskSet": "gbp_ray.pruning.masks",
    "Metric": "gbp_ray.workloads.metrics",
    "PruneError": "gbp_ray.errors",
    "PruneResult": "gbp_ray.runtime.api",
    "Pruner": "gbp_ray.pruning.pruner",
    "Report": "gbp_ray.report.page",
    "Results": "gbp_ray.results.query",
    "Scores": "gbp_ray.pruning.in_memory",
    "StoreError": "gbp_ray.errors",
    "SweepResult": "gbp_ray.runtime.api",
    "TransientStoreError": "gbp_ray.errors",
    "TrialError": "gbp_ray.errors",
    "Workload": "gbp_ray.workloads.contract",
    "WorkloadError": "gbp_ray.errors",
    "apply_masks": "gbp_ray.export.apply",
    "compact": "gbp_ray.pruning.compact_in_memory:compact_model",
    "explain_round": "gbp_ray.runtime.explain",
    "export_round": "gbp_ray.export.program",
    "load_job": "gbp_ray.config.job",
    "measure_stability": "gbp_ray.runtime.stability",
    "open_result": "gbp_ray.runtime.api",
    "open_results": "gbp_ray.results.query",
    "plan_prune": "gbp_ray.runtime.api",
    "plan_sweep": "gbp_ray.runtime.api",
    "prune": "gbp_ray.runtime.api",
    "prune_model": "gbp_ray.pruning.in_memory",
    "score": "gbp_ray.pruning.in_memory",
    "select": "gbp_ray.pruning.in_memory",
    "submit": "gbp_ray.runtime.api",
    "sweep": "gbp_ray.runtime.api",
    "write_report": "gbp_ray.report.page",
}
"""The module of each name, and after a colon the name that it has there."""

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gbp_ray' has no attribute {name!r}")
    home, _, other = _HOMES[name].partition(":")
    value = getattr(import_module(home), other or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _offer_zoo() -> None:
    """Let `gbp_ray.zoo`, the name of built-in workloads in trial ids, stand."""
    zoo = ModuleType("gbp_ray.zoo", "The built-in workloads.")
    vars(zoo)["__getattr__"] = lambda name: getattr(import_module("gbp_ray.workloads"), name)
    vars(zoo)["__dir__"] = lambda: dir(import_module("gbp_ray.workloads"))
    sys.modules[zoo.__name__] = globals()["zoo"] = zoo


_offer_zoo()
