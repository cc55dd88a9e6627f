"""Workloads that are objects of this process, which a job can name but nothing can import.

Such a workload is known as "live:NAME_DIGEST". The digest covers its first weights, its data as far
as `fingerprints_of_data` reads them and the code of its functions, and the name is part of the
trial's id. So another workload is another trial, and another job: it never goes on with results, or
answers with them, that are not its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig, load_job
from gbp_ray.config.schema import PLUG_IN
from gbp_ray.distributed.agreement import (
    digest_tensor,
    digest_weights,
    fingerprints_of_data,
    fingerprints_of_network,
)
from gbp_ray.distributed.ranks import fixed_kernels
from gbp_ray.distributed.sharding import copy_network
from gbp_ray.errors import ConfigError, GbpError
from gbp_ray.training.network import network_of_seed
from gbp_ray.workloads.batch import kind_of
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.loading import LIVE, import_attribute, load_workload

__all__ = ["load_live_job"]

_SPLITS = ("train", "test", "validation")
_MOST_DEPTH = 6


def load_live_job(
    workload: Workload | Callable[..., Workload],
    overrides: Mapping[str, Any] | list[str] | None,
    job: JobConfig | str | Any = None,
) -> JobConfig:
    """Loads a job for a workload, or a function that makes one, of this process.

    A function of a module is named like any other; for anything else the job is one of this
    process only. Its network is copied, so that training leaves it as it is. Whatever draws its
    first weights or its data must be seeded for the job to be known again.

    Args:
        job: As for `prune`; without one all comes from `overrides`, and its name is the workload's.

    Raises:
        ConfigError: The workload is neither, or the job is wrong.
        WorkloadError: The network or the data cannot be used.
    """
    label, make = _maker_of(workload)
    if (path := _importable_path(workload)) is not None:
        return _fill_in(job, overrides, path, label)
    pending = f"live:{label}"
    LIVE[pending] = make
    try:
        loaded = _fill_in(job, overrides, pending, label)
        bare = loaded.workload.model_copy(
            update={
                key: field.default
                for key, field in type(loaded.workload).model_fields.items()
                if key not in ("factory", "options")
            }
        )
        with fixed_kernels(loaded.cluster.threads_per_worker):
            # Under one seed, so that trials of other seeds are of the same workload.
            name = f"{pending}_{_digest(load_workload(bare, 0))}"
    finally:
        del LIVE[pending]
    LIVE[name] = make
    return load_job(loaded, {"workload.factory": name})


def _maker_of(workload: Any) -> tuple[str, Callable[..., Workload]]:
    """Returns a name for a live workload, and a factory of copies."""
    if isinstance(workload, Workload):
        return "workload", lambda: _with_copies(workload)
    if not callable(workload):
        raise ConfigError(
            "workload: must be a gbp_ray.Workload or a function that returns one, not "
            f"{kind_of(workload)}"
        )
    label = getattr(workload, "__name__", type(workload).__name__)

    @functools.wraps(workload)
    def make(**options: Any) -> Workload:
        made = workload(**options)
        return _with_copies(made) if isinstance(made, Workload) else made

    return label if label.isidentifier() else "workload", make


def _with_copies(workload: Workload) -> Workload:
    def build() -> Any:
        model = workload.build_model()
        return copy_network(model) if isinstance(model, nn.Module) else model

    return replace(workload, build_model=build)


def _importable_path(workload: Any) -> str | None:
    """Returns the "module:function" by which any process finds a function, or None."""
    path = f"{getattr(workload, '__module__', '')}:{getattr(workload, '__qualname__', '')}"
    if not PLUG_IN.fullmatch(path) or path.startswith("__main__:"):
        return None
    try:
        return path if import_attribute(path, "workload") is workload else None
    except GbpError:
        return None


def _fill_in(
    job: Any, overrides: Mapping[str, Any] | list[str] | None, factory: str, label: str
) -> JobConfig:
    """Loads a job with a factory, a name, and no workers unless it says how many."""
    if isinstance(overrides, list):
        overrides = [*overrides, f"workload.factory={factory}"]
    else:
        overrides = {**(overrides or {}), "workload.factory": factory}
    loaded = load_job({"name": label} if job is None else job, overrides)
    if "num_workers" in loaded.cluster.model_fields_set:
        return loaded
    return load_job(loaded, {"cluster.num_workers": 0})


# -- digests ---------------------------------------------------------------------------------------


def _digest(workload: Workload) -> str:
    model, is_blank = network_of_seed(workload, 0)
    found: dict[str, Any] = {
        "weights": digest_weights(model),
        **fingerprints_of_network(model, is_blank=is_blank),
        **fingerprints_of_data(workload),
    }
    for field in fields(workload):
        value = getattr(workload, field.name)
        if field.name in _SPLITS and isinstance(value, tuple):
            value = [digest_tensor(torch.as_tensor(column)) for column in value]
            found[field.name] = value
        elif field.name not in (*_SPLITS, "build_model"):
            found[field.name] = _describe(value)
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(value: Any, depth: int = 0) -> Any:
    """Describes a function or a value by what it does, for a digest; the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return digest_tensor(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if depth > _MOST_DEPTH:
        return kind

    def inner(other: Any) -> Any:
        return _describe(other, depth + 1)

    if isinstance(value, nn.Module):
        return [kind, str(value), digest_weights(value)]
    if isinstance(value, CodeType):
        # Without line numbers and paths.
        return [value.co_code.hex(), list(value.co_names), [inner(c) for c in value.co_consts]]
    if isinstance(value, MethodType):
        return [inner(value.__func__), inner(value.__self__)]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [value.__code__, cells, value.__defaults__, value.__kwdefaults__]
        return [value.__module__, value.__qualname__, *(inner(part) for part in held)]
    if isinstance(value, functools.partial):
        return [kind, inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, (list, tuple)):
        return [kind, *(inner(item) for item in value)]
    if isinstance(value, (set, frozenset)):
        return [kind, *sorted(str(inner(item)) for item in value)]
    if isinstance(value, Mapping):
        return [kind, *sorted((str(key), str(inner(item))) for key, item in value.items())]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return [kind, getattr(value, "__module__", ""), getattr(value, "__qualname__", "")]
    return [kind, inner(vars(value))]
