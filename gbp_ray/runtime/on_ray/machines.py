"""Checks of the machines in the cluster that this process has joined, before workers start.

Each machine must have this version of the package, the modules that the job names and, if the
storage is a folder, the same folder: the driver leaves a file there that the machine must see. A
worker would fail for these minutes later with an obscure error, or write results on two disks. A
cluster of only the driver's machine needs no check.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gbp_ray import __version__
from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.job import JobConfig, list_code
from gbp_ray.errors import ConfigError, GbpError, StoreError
from gbp_ray.results.store import Store
from gbp_ray.runtime.placement import Machine, check_placeable, find_misfit, worker_resources

__all__ = ["check_cluster", "check_folder", "check_machines", "is_autoscaling", "list_machines"]

_PACKAGES = ("gbp-ray", "torch")
_ANSWER_TIMEOUT_S = 60.0
_AUTOSCALER_TIMEOUT_S = 10.0
"""Longest wait for the first report of an autoscaler that has just started."""

_ANONYMOUS = "node_"
"""Prefix of the machine types that Ray makes up where no autoscaler adds any."""


def list_machines() -> list[Machine]:
    """Lists the live machines of the cluster."""
    return [
        Machine(node["NodeManagerAddress"], node["Resources"], node["NodeID"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_cluster(job: JobConfig, import_paths: Sequence[str]) -> None:
    """Refuses a job that the cluster, or a machine of it, can never run.

    Raises:
        ConfigError: There will never be room for the workers, or a machine lacks the package or
            the user's modules.
        StoreError: The storage is a folder that not all machines see.
    """
    machines = list_machines()
    if find_misfit(job.cluster, machines) is not None:
        # Asked only if needed, since the autoscaler may take seconds to answer.
        check_placeable(job.cluster, machines, is_autoscaling(job.cluster))
    claim = worker_resources(job.cluster, machines)
    able = [machine for machine in machines if machine.count(claim) > 0]
    if [machine.id for machine in able] != [ray.get_runtime_context().get_node_id()]:
        check_machines(job, able, import_paths)


def is_autoscaling(cluster: ClusterConfig) -> bool:
    """Finds out if the cluster adds machines on demand."""
    if cluster.autoscale is not None:
        return cluster.autoscale
    if cluster.address is None:
        return False
    if internal_kv._internal_kv_get("__autoscaler_v2_enabled") == b"1":
        # It does not report if it may add machines; waiting is better than refusing.
        return True
    deadline = time.monotonic() + _AUTOSCALER_TIMEOUT_S
    while True:
        status = json.loads(internal_kv._internal_kv_get("__autoscaling_status") or "{}")
        if (report := status.get("autoscaler_report")) is not None:
            types = report.get("active_nodes") or {}
            return any(not name.startswith(_ANONYMOUS) for name in types)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


@dataclass(frozen=True)
class NodeReport:
    """The versions, missing modules and storage folder that a machine sees.

    A package that is not installed has the version "". `sees_folder` is None on object storage.
    """

    versions: dict[str, str]
    missing: tuple[str, ...]
    sees_folder: bool | None


def probe_node(
    modules: Sequence[str], import_paths: Sequence[str], probe: str | None
) -> NodeReport:
    """Answers on one machine; imports no torch, which would take longest."""
    before = list(sys.path)
    sys.path.extend(import_paths)
    try:
        missing = tuple(name for name in modules if importlib.util.find_spec(name) is None)
    finally:
        sys.path[:] = before
    return NodeReport(
        {name: _version_of(name) for name in _PACKAGES},
        missing,
        None if probe is None else Path(probe).is_file(),
    )


def _version_of(package: str) -> str:
    if package == "gbp-ray":
        # A submitted job brings its own, which is not installed.
        return __version__
    with contextlib.suppress(PackageNotFoundError):
        # A head without a GPU may have another build of the same release.
        return version(package).partition("+")[0]
    return ""


_probe_node = ray.remote(num_cpus=0, max_retries=0)(probe_node)


def check_machines(
    job: JobConfig, machines: Sequence[Machine], import_paths: Sequence[str]
) -> None:
    """Checks each machine as in `check_cluster`; one that does not answer may have left."""
    # Only the first part: looking for a submodule would import its package.
    modules = sorted({re.split("[.:]", name)[0] for name in list_code(job).values()})
    with _probe(Store(job.storage, job.name)) as probe:
        asked = {
            _probe_node.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(machine.id, soft=False)
            ).remote(modules, import_paths, probe): machine
            for machine in machines
        }
        answered, _ = ray.wait(
            list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S, fetch_local=False
        )
        for reference in answered:
            machine = asked[reference]
            try:
                report = ray.get(reference)
            except (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError):
                continue
            except ray.exceptions.RayError as error:
                last_line = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
                raise ConfigError(
                    f"cluster.address = {job.cluster.address}: machine {machine.name} cannot load "
                    f"gbp_ray: {last_line}; install the same version there"
                ) from error
            if (fault := find_fault(job, machine, report)) is not None:
                raise fault


def find_fault(job: JobConfig, machine: Machine, report: NodeReport) -> GbpError | None:
    """Returns the error for the first thing that a machine lacks, or None."""
    for name in _PACKAGES:
        here, there = _version_of(name), report.versions[name]
        if here != there:
            return ConfigError(
                f"cluster.address = {job.cluster.address}: machine {machine.name} has {name} "
                f"{there or 'not at all'}, this one {here}; install the same on all"
            )
    if report.missing:
        return ConfigError(
            f"workload.factory = '{job.workload.factory}': machine {machine.name} has no module "
            f"'{report.missing[0]}'; gbp-ray submit takes your code along, or install it on every "
            "machine"
        )
    return _foreign_folder(job, machine.name) if report.sees_folder is False else None


def check_folder(job: JobConfig) -> None:
    """Checks on a worker's machine, which may have joined late, that it sees the driver's claim."""
    store = Store(job.storage, job.name)
    if store.folder is not None and store.read_claim() is None:
        raise _foreign_folder(job, socket.gethostname())


def _foreign_folder(job: JobConfig, machine: str) -> StoreError:
    return StoreError(
        f"storage = '{job.storage}': machine {machine} does not see this folder; give "
        "s3://bucket/prefix, or a folder that all machines have mounted under the same path"
    )


@contextlib.contextmanager
def _probe(store: Store) -> Iterator[str | None]:
    """Keeps a file in the storage's folder while the block runs; yields its path, if any."""
    if store.folder is None:
        yield None
        return
    # Named like a file in writing, which readers ignore.
    path = store.folder.absolute() / f".seen.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise StoreError(
            f"storage: cannot write '{path.parent}': {error.strerror}; choose a storage folder you "
            "can write"
        ) from None
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)
