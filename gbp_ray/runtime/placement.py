"""Resources of workers, and the number of workers and trials that a cluster's machines hold.

Counts use the total of each machine, not what is free: other jobs end, machines do not grow. Ray is
not needed here.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.errors import ConfigError

__all__ = [
    "Machine",
    "check_placeable",
    "count_trials",
    "count_workers",
    "find_misfit",
    "launches_locally",
    "pretend_cpus",
    "worker_resources",
]

_ACCELERATOR = "accelerator_type:"
_LEAST_SHARE = 0.001
"""Claim of each worker on a GPU type: Ray gives a machine 1 of its type for all its workers."""


@dataclass(frozen=True)
class Machine:
    """A machine of a cluster: its address, total resources by Ray's names, and Ray's node id."""

    name: str
    resources: Mapping[str, float] = field(default_factory=dict)
    id: str = ""

    def count(self, claim: Mapping[str, float]) -> int:
        """Counts how often a claim fits."""
        shares = [
            self.resources.get(name, 0.0) / amount for name, amount in claim.items() if amount > 0
        ]
        return math.floor(min(shares) + 1e-9)


def launches_locally(cluster: ClusterConfig) -> bool:
    """Returns whether the workers of a prune are processes of this machine, without Ray."""
    if cluster.launcher != "auto":
        return cluster.launcher == "local"
    # Not imported: a Ray that this process has joined is loaded.
    ray = sys.modules.get("ray")
    is_joined = "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized())
    return not is_joined and cluster.service_of_ray == ""


def worker_resources(cluster: ClusterConfig, machines: Sequence[Machine]) -> dict[str, float]:
    """Returns the resources that one worker claims."""
    num_cpus = cluster.cpus_per_worker
    if num_cpus is None:
        # By default workers make do with the CPUs there are.
        most = max((machine.resources.get("CPU", 0.0) for machine in machines), default=0.0)
        num_cpus = max(1.0, min(float(cluster.threads_per_worker), most))
    claim = {"CPU": num_cpus}
    if cluster.use_gpu:
        claim["GPU"] = cluster.gpus_per_worker
        if cluster.accelerator_type is not None:
            claim[f"{_ACCELERATOR}{cluster.accelerator_type}"] = _LEAST_SHARE
    return claim


def count_workers(cluster: ClusterConfig, machines: Sequence[Machine]) -> int:
    """Counts the workers that the machines hold."""
    claim = worker_resources(cluster, machines)
    return sum(machine.count(claim) for machine in machines)


def count_trials(cluster: ClusterConfig, machines: Sequence[Machine]) -> int:
    """Counts the trials that the machines hold at a time."""
    num_workers = count_workers(cluster, machines)
    # A trial without workers takes the room of one worker.
    if num_workers < max(1, cluster.min_workers):
        return 0
    return max(1, num_workers // max(1, cluster.max_workers))


def pretend_cpus(cluster: ClusterConfig, num_cores: int) -> int:
    """Returns the number of CPUs a private cluster must claim to place all workers at once."""
    cpus = cluster.cpus_per_worker or min(cluster.threads_per_worker, num_cores)
    # One more for Ray's own actors.
    return max(num_cores, math.ceil(cluster.max_workers * max(1.0, cpus)) + 1)


def find_misfit(cluster: ClusterConfig, machines: Sequence[Machine]) -> str | None:
    """Explains in one line why the machines can never run the job; None if they can."""
    if (fault := _find_worker_misfit(cluster, machines)) is not None:
        return fault
    num_workers, needed = count_workers(cluster, machines), max(1, cluster.min_workers)
    if num_workers >= needed:
        return None
    claim = worker_resources(cluster, machines)
    total = {name: sum(m.resources.get(name, 0.0) for m in machines) for name in claim}
    return (
        f"cluster.num_workers = {needed}: the cluster has room for {num_workers} "
        f"({_in_words(claim)} each, of {_in_words(total)} on {_machines(len(machines))}); lower it "
        "or add machines"
    )


def _find_worker_misfit(cluster: ClusterConfig, machines: Sequence[Machine]) -> str | None:
    """Explains which resource of one worker no machine has enough of."""
    claim = worker_resources(cluster, machines)
    kind = cluster.accelerator_type
    if any(machine.count(claim) > 0 for machine in machines):
        return None
    if cluster.use_gpu and not any(machine.count({"GPU": claim["GPU"]}) for machine in machines):
        return (
            f"cluster.use_gpu = true: none of the cluster's {_machines(len(machines))} has a GPU; "
            "set it to false or add one that has"
        )
    if kind is not None and not any(m.resources.get(f"{_ACCELERATOR}{kind}") for m in machines):
        known = {
            name.removeprefix(_ACCELERATOR)
            for machine in machines
            for name in machine.resources
            if name.startswith(_ACCELERATOR)
        }
        return (
            f"cluster.accelerator_type = {kind}: no machine of the cluster has it (allowed: "
            f"{', '.join(sorted(known)) or 'none is named'}); name one of these or unset it"
        )
    beside = {name: amount for name, amount in claim.items() if name != "CPU"}
    able = [machine for machine in machines if not beside or machine.count(beside)]
    most = max((machine.resources.get("CPU", 0.0) for machine in able), default=0.0)
    having = "with such a GPU " if beside else ""
    if cluster.cpus_per_worker is None:
        return (
            f"cluster.num_workers = {cluster.max_workers}: no machine {having}has a CPU for a "
            "worker; start Ray there with --num-cpus of at least 1"
        )
    return (
        f"cluster.cpus_per_worker = {cluster.cpus_per_worker:g}: the largest machine {having}has "
        f"{most:g} CPUs; lower it or add a larger one"
    )


def check_placeable(
    cluster: ClusterConfig, machines: Sequence[Machine], is_autoscaling: bool
) -> None:
    """Raises a ConfigError if the machines can never run the job, unless more may join."""
    if not is_autoscaling and (fault := find_misfit(cluster, machines)) is not None:
        raise ConfigError(f"{fault} (cluster.autoscale = true waits for machines that come)")


def _in_words(amounts: Mapping[str, float]) -> str:
    return " and ".join(
        f"{amount:g} {name}{'' if amount == 1 else 's'}"
        for name, amount in amounts.items()
        if not name.startswith(_ACCELERATOR)
    )


def _machines(number: int) -> str:
    return "1 machine" if number == 1 else f"{number} machines"
