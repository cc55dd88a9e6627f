"""The machines of the cluster that this process has joined: which there are, and what they lack.

Each machine that workers may run on is asked, before any starts, whether it has this version of the
package, the modules that the job names, and, where the storage is a folder, that very folder: the
driver leaves a file there that the machine must see. What a machine lacks is said at once and with
advice; found out by a worker, it would be an odd error minutes later, or results on two disks.
A cluster of one machine, where the driver runs too, is not asked.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
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
from gbp_ray.config.job import JobConfig
from gbp_ray.errors import ConfigError, GbpError, StoreError
from gbp_ray.results.store import Store
from gbp_ray.runtime.placement import Machine, check_placeable, find_misfit, worker_resources

__all__ = [
    "check_cluster",
    "check_folder",
    "check_machines",
    "is_autoscaling",
    "list_machines",
]

_PACKAGES = ("gbp-ray", "torch")
_ANSWER_TIMEOUT_S = 60.0
_AUTOSCALER_TIMEOUT_S = 10.0
"""How long Ray's autoscaler, just started, is given to say that it is there."""

_ANONYMOUS = "node_"
"""Begins the made-up types of machines where nothing adds any."""


def list_machines() -> list[Machine]:
    """Lists the live machines of the cluster."""
    return [
        Machine(node["NodeManagerAddress"], node["Resources"], node["NodeID"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_cluster(job: JobConfig, import_paths: Sequence[str]) -> None:
    """Refuses what the cluster can never run, or what a machine of it cannot.

    Raises:
        ConfigError: There is no room for the workers and none will come, or a machine lacks the
            package or the user's modules.
        StoreError: The storage is a folder that not all machines see.
    """
    machines = list_machines()
    if find_misfit(job.cluster, machines) is not None:
        # Only now, since the autoscaler may take its time to answer.
        check_placeable(job.cluster, machines, is_autoscaling(job.cluster))
    claim = worker_resources(job.cluster, machines)
    able = [machine for machine in machines if machine.count(claim) > 0]
    if [machine.id for machine in able] != [ray.get_runtime_context().get_node_id()]:
        check_machines(job, able, import_paths)


def is_autoscaling(cluster: ClusterConfig) -> bool:
    """Tells whether machines are added to the cluster when they are asked for."""
    if cluster.autoscale is not None:
        return cluster.autoscale
    if cluster.address is None:
        return False
    if internal_kv._internal_kv_get("__autoscaler_v2_enabled") == b"1":
        # It does not say whether it may add machines, and refusing would be worse than waiting.
        return True
    deadline = time.monotonic() + _AUTOSCALER_TIMEOUT_S
    while True:
        told = json.loads(internal_kv._internal_kv_get("__autoscaling_status") or "{}")
        if (report := told.get("autoscaler_report")) is not None:
            types = report.get("active_nodes") or {}
            return any(not name.startswith(_ANONYMOUS) for name in types)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


# -- what each machine is asked --------------------------------------------------------------------


@dataclass(frozen=True)
class NodeReport:
    """What a machine sees.

    Attributes:
        versions: Of the packages that decide results; empty text where one is not installed.
        modules: Those of the job's that cannot be found.
        sees_folder: Whether the storage's folder is the driver's; None where it is none.
    """

    versions: dict[str, str]
    missing: tuple[str, ...]
    sees_folder: bool | None


def probe_node(
    modules: Sequence[str], import_paths: Sequence[str], probe: str | None
) -> NodeReport:
    """Looks around on this machine, as a worker would."""
    # Without torch, whose import would take longer than all else.
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
        # Not what is installed: a submitted job brings its own along.
        return __version__
    with contextlib.suppress(PackageNotFoundError):
        # A head without a GPU may have another build of the same release.
        return version(package).partition("+")[0]
    return ""


_probe_node = ray.remote(num_cpus=0, max_retries=0)(probe_node)


def check_machines(
    job: JobConfig, machines: Sequence[Machine], import_paths: Sequence[str]
) -> None:
    """Asks each machine what it sees; one that does not answer has perhaps left, and is let be.

    Raises:
        ConfigError: A machine lacks the package or the user's modules.
        StoreError: The storage is a folder that not all machines see.
    """
    plug_ins = [name for name in (job.workload.factory, job.prune.criterion) if ":" in name]
    # The folder of a dotted module would be imported to look into it.
    modules = sorted({name.partition(":")[0].partition(".")[0] for name in plug_ins})
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
                sight = ray.get(reference)
            except (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError):
                continue
            except ray.exceptions.RayError as error:
                raise ConfigError(
                    f"cluster.address = {job.cluster.address}: machine {machine.name} cannot load "
                    f"gbp_ray: {_last_line(error)}; install the same version there"
                ) from error
            if (fault := find_fault(job, machine, sight)) is not None:
                raise fault


def find_fault(job: JobConfig, machine: Machine, sight: NodeReport) -> GbpError | None:
    """Says what a machine lacks, the first thing of all."""
    for name in _PACKAGES:
        here, there = _version_of(name), sight.versions[name]
        if here != there:
            return ConfigError(
                f"cluster.address = {job.cluster.address}: machine {machine.name} has {name} "
                f"{there or 'not at all'}, this one {here}; install the same on all"
            )
    if sight.missing:
        return ConfigError(
            f"workload.factory = '{job.workload.factory}': machine {machine.name} has no module "
            f"'{sight.missing[0]}'; gbp-ray submit takes your code along, or install it on every "
            "machine"
        )
    return _foreign_folder(job, machine.name) if sight.sees_folder is False else None


def check_folder(job: JobConfig) -> None:
    """Makes sure, on a worker's machine, that its storage is the driver's, which has claimed it.

    Machines that join a cluster later have not been asked.

    Raises:
        StoreError: The storage is a folder of this machine's own.
    """
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
    """Leaves a file in the storage's folder while the block runs; gives its path."""
    if store.folder is None:
        yield None
        return
    # Called like a file that is being written, which is no part of the results.
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


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
