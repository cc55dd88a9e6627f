"""Workloads that are objects of this process, which a job can name but nothing can import.

Such a workload is known as "live:NAME_DIGEST". The digest covers its network with its first
weights, its data as far as `fingerprints_of_data` reads them, and the code of its functions and
classes with the functions, classes and plain values of the user's own that this code names. The
name is part of the trial's id. So another workload is another trial, and another job: it never goes
on with results, or answers with them, that are not its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
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
from gbp_ray.workloads.code import LIVE, import_attribute
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.loading import load_workload

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
        "model": _describe(model),
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


def _describe(value: Any, path: tuple[int, ...] = ()) -> Any:
    """Describes a function or a value by what it does, for a digest; the same in every process.

    Args:
        path: Addresses of what the value is part of.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return digest_tensor(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    name = [kind, getattr(value, "__module__", ""), getattr(value, "__qualname__", "")]
    if len(path) > _MOST_DEPTH or id(value) in path:
        return name

    def inner(other: Any) -> Any:
        return _describe(other, (*path, id(value)))

    if isinstance(value, nn.Module):
        owners = {type(module): None for module in value.modules() if _is_own(type(module))}
        plain = [
            sorted((key, repr(v)) for key, v in vars(module).items() if isinstance(v, _PLAIN))
            for module in value.modules()
        ]
        return [kind, str(value), digest_weights(value), list(map(inner, owners)), plain]
    if isinstance(value, CodeType):
        # Without line numbers and paths.
        return [value.co_code.hex(), list(value.co_names), [inner(c) for c in value.co_consts]]
    if isinstance(value, MethodType):
        return [inner(value.__func__), inner(value.__self__)]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [value.__code__, cells, value.__defaults__, value.__kwdefaults__]
        held += [_named_by(value)] if _is_own(value) else []
        return [*name, *(inner(part) for part in held)]
    if isinstance(value, functools.partial):
        return [kind, inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, (list, tuple)):
        return [kind, *(inner(item) for item in value)]
    if isinstance(value, (set, frozenset)):
        return [kind, *sorted(str(inner(item)) for item in value)]
    if isinstance(value, Mapping):
        return [kind, *sorted((str(key), str(inner(item))) for key, item in value.items())]
    if isinstance(value, type) and _is_own(value):
        # Methods lie in static ones, class methods and properties, too.
        parts = ((key, getattr(v, "__func__", getattr(v, "fget", v))) for key, v in _items(value))
        return [*name, inner(value.__bases__), inner(dict(parts))]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return name
    return [kind, inner(vars(value)), inner(type(value))]


_PLAIN = (type(None), bool, int, float, str)
_NAMED = (*_PLAIN, list, tuple, dict, set, frozenset, type, FunctionType, functools.partial)
"""Kinds of globals that code is described with; others, such as loggers, change by themselves."""


def _items(owner: type) -> Iterator[tuple[str, Any]]:
    """Lists what a class itself holds, without what Python puts there."""
    held = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__")
    return ((k, v) for k, v in vars(owner).items() if k not in held and "line" not in k)


def _named_by(function: FunctionType) -> dict[str, Any]:
    """Returns the globals that a function names and that decide what it does."""
    names: set[str] = set()
    left = [function.__code__]
    while left:
        code = left.pop()
        names.update(code.co_names)
        left += [const for const in code.co_consts if isinstance(const, CodeType)]
    found = {name: function.__globals__[name] for name in names & function.__globals__.keys()}
    kinds = (*_NAMED, Tensor, np.ndarray)
    return {name: value for name, value in found.items() if isinstance(value, kinds)}


def _is_own(code: Any) -> bool:
    """Returns True for a function or class that is neither built in nor installed."""
    name = str(code.__module__)
    if name == "__main__" or name not in sys.modules:
        return True
    path = getattr(sys.modules[name], "__file__", None)
    if path is None or name.partition(".")[0] == "gbp_ray":
        return False
    folders = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    return not any(Path(path).is_relative_to(folder) for folder in folders)
