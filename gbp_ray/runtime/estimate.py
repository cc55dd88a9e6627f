"""Estimate what running a job or a sweep would do now and cost, for `--dry-run`.

Trials that differ in nothing that memory depends on (seed, sparsity, rounds, learning rates and the
like) are of one kind, and a kind is estimated once (`memory`). Ended trials are left out; networks
and scores that trials share are counted once. The cluster is looked at as it is: a private one
would be this machine, another one is joined for a moment, and nothing is started there.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.pruning.criteria import criterion
from gbp_ray.results.store import Store
from gbp_ray.runtime.cache import dense_folder, scores_key
from gbp_ray.runtime.memory import Memory, Phase, bytes_of
from gbp_ray.runtime.outcomes import Outcome
from gbp_ray.runtime.placement import (
    Machine,
    count_trials,
    find_misfit,
    pretend_cpus,
    worker_resources,
)
from gbp_ray.runtime.search import Bisection, Sparsities, TrialQueue
from gbp_ray.training.network import network_of_seed
from gbp_ray.training.optimizer import num_steps
from gbp_ray.workloads.contract import Portion, Workload

__all__ = [
    "CostEstimate",
    "PrunePlan",
    "SweepPlan",
    "find_misfits",
    "find_trials",
    "make_plan",
    "make_sweep_plan",
    "see_machines",
    "take_of_host",
]

_MOST_KINDS = 20
"""Kinds that are estimated; each passes examples through its network."""

_PROCESS_BYTES = 400_000_000
"""The interpreter with its libraries, in each worker."""

_RATES = {"learning_rate", "weight_decay", "lr_schedule", "lr_milestones", "lr_gamma"}
_CHOICE = {"sparsity", "rounds", "schedule", "ramp_rounds", "scope"}
_CHOICE |= {"layer_min_sparsity", "layer_max_sparsity", "target", "reconstruct_damping"}
_WITHOUT_MEMORY = {"prune": _CHOICE, "pretrain": _RATES, "finetune": _RATES}
"""Fields that change what a trial reaches, and nothing of what it holds."""


@dataclass(frozen=True)
class PrunePlan:
    """The work and cost of running a job now.

    Attributes:
        trial_id: Of the job.
        uri: Where its rounds lie or will lie.
        num_done: Whole rounds that are there already, the dense network among them.
        num_left: Rounds that would be run, likewise; 0 for a finished trial.
        plan: What the whole job costs; None for a finished trial, which answers at once.
        misfits: What would not fit the cluster as it is, one line each.
    """

    trial_id: str
    uri: str
    num_done: int
    num_left: int
    plan: CostEstimate | None
    misfits: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and for tables."""
        return {
            "trial_id": self.trial_id,
            "uri": self.uri,
            "finished": self.num_left == 0,
            "rounds_done": self.num_done,
            "rounds_left": self.num_left,
            "plan": self.plan and self.plan.to_dict(),
            "misfits": list(self.misfits),
        }


@dataclass(frozen=True)
class Trials:
    """The trials of a sweep, as far as they are known before it runs.

    Attributes:
        left: Those to run, each with how many it stands for.
        known: How others ended before.
        is_estimate: Whether what will be tried depends on what is found.
    """

    left: tuple[tuple[JobConfig, int], ...]
    known: tuple[Outcome, ...]
    is_estimate: bool = False


@dataclass(frozen=True)
class Kind:
    """Trials that hold the same: the name of their criterion, and the estimate of one of them."""

    name: str
    num_trials: int
    plan: CostEstimate


@dataclass(frozen=True)
class SweepPlan:
    """The work and cost of running a sweep now.

    Attributes:
        num_trials: In all; an estimate where a search decides on the way.
        num_begun: Of those to run, the ones that have left something to go on from.
        num_at_once: How many trials the cluster holds at a time, as it is.
        num_workers: Of each trial.
        num_dense: Dense networks to train; those that are there are not among them.
        num_steps: Optimizer steps of all of it.
        num_unplanned: Trials of further kinds, which were not looked into.
        worker_bytes: Most that a worker holds, on its device; data and libraries not included.
        host_bytes: Most that a worker takes of its machine, these included.
        stored_bytes: What the trials write.
        seconds_left: At the pace of those finished, or None where none is.
        machines: Of the cluster, as (name, resources).
        misfits: What would not fit the cluster as it is, one line each.
    """

    uri: str
    num_trials: int
    is_estimate: bool
    num_finished: int
    num_stopped: int
    num_begun: int
    num_left: int
    num_at_once: int
    num_workers: int
    num_dense: int
    num_steps: int
    kinds: tuple[Kind, ...]
    num_unplanned: int
    worker_bytes: int
    host_bytes: int
    stored_bytes: int
    seconds_left: float | None
    machines: tuple[tuple[str, dict[str, float]], ...]
    misfits: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and for tables."""
        return asdict(self)


# -- what is left to run ---------------------------------------------------------------------------


def find_trials(job: JobConfig, queue: TrialQueue, num_suggested: int | None) -> Trials:
    """Find what a sweep would run, starting nothing.

    Args:
        queue: Of the sweep's plan, unless Optuna is the one to choose.
        num_suggested: How many trials Optuna would still choose; None where it is not asked.
    """
    waiting = []
    while (trial := queue.next()) is not None:
        waiting.append(trial)
    known = tuple(queue.outcomes.values())
    if num_suggested is not None:
        # They are like the job as it stands.
        return Trials(((job, num_suggested),) if num_suggested else (), known)
    if not isinstance(queue.plan, Bisection):
        return Trials(tuple((trial, 1) for trial in waiting), known)
    # Each search halves what is left, and has made some of its steps.
    steps = math.ceil(math.log2(Sparsities(job).num + 1))
    each = max(1, steps - len(known) // max(1, len(waiting)))
    return Trials(tuple((trial, each) for trial in waiting), known, is_estimate=True)


# -- what it costs ---------------------------------------------------------------------------------


def make_sweep_plan(
    job: JobConfig,
    trials: Trials,
    store: Store,
    machines: Sequence[Machine],
    load: Callable[[JobConfig], Workload],
) -> SweepPlan:
    """Estimate a sweep.

    Args:
        load: Loads and checks what a trial prunes.
    """
    bill = _Bill(store, load)
    for trial, number in trials.left:
        bill.add(trial, number)
    kinds = tuple(Kind(p.criterion, bill.counts[key], p) for key, (p, _) in bill.known.items())
    worker_bytes = max((kind.plan.peak_bytes for kind in kinds), default=0)
    host_bytes = max((take_of_host(job, kind.plan) for kind in kinds), default=0)
    num_left = sum(number for _, number in trials.left)
    num_slots = count_trials(job.cluster, machines)
    num_at_once = min(num_slots, job.sweep.max_concurrent or num_slots, num_left)
    workers = max(1, job.cluster.max_workers)
    most_workers = (job.sweep.max_concurrent or math.inf) * workers
    ends = [outcome.state for outcome in trials.known]
    spent = [outcome.seconds for outcome in trials.known if outcome.state == "finished"]
    seconds = sum(spent) / len(spent) * num_left if spent and num_at_once else None
    return SweepPlan(
        uri=store.uri,
        num_trials=len(trials.known) + num_left,
        is_estimate=trials.is_estimate,
        num_finished=ends.count("finished"),
        num_stopped=ends.count("stopped"),
        num_begun=bill.num_begun,
        num_left=num_left,
        num_at_once=num_at_once,
        num_workers=job.cluster.max_workers,
        num_dense=bill.num_dense,
        num_steps=bill.num_steps,
        kinds=kinds,
        num_unplanned=bill.num_unplanned,
        worker_bytes=worker_bytes,
        host_bytes=host_bytes,
        stored_bytes=bill.stored_bytes,
        seconds_left=None if seconds is None else seconds / (num_at_once * workers),
        machines=tuple((machine.name, dict(machine.resources)) for machine in machines),
        misfits=find_misfits(job, machines, most_workers, worker_bytes, host_bytes),
    )


class _Bill:
    """Add up what trials cost, estimating each kind once."""

    def __init__(self, store: Store, load: Callable[[JobConfig], Workload]) -> None:
        self._load = load
        self._begun = set(store.objects.list_folders("trials/"))
        self._shared = {f"dense/{name}" for name in store.objects.list_folders("dense/")}
        self.known: dict[str, tuple[CostEstimate, Workload]] = {}
        self.counts: Counter[str] = Counter()
        self.num_begun = self.num_dense = self.num_steps = self.num_unplanned = 0
        self.stored_bytes = 0

    def add(self, trial: JobConfig, number: int) -> None:
        """Add so many trials that are like this one."""
        self.num_begun += trial_id(trial) in self._begun
        kind = _kind_of(trial)
        if kind not in self.known:
            if len(self.known) >= _MOST_KINDS:
                self.num_unplanned += number
                return
            workload = self._load(trial)
            self.known[kind] = make_plan(trial, workload), workload
        self.counts[kind] += number
        plan, workload = self.known[kind]
        folder, rounds = dense_folder(trial), trial.prune.rounds
        # A dense network that cannot be shared is trained by each.
        num_dense = number if folder is None else int(folder not in self._shared)
        pretrain, finetune = (
            num_steps(recipe, workload, recipe.epochs)
            for recipe in (trial.pretrain, trial.finetune)
        )
        self.num_dense += num_dense
        self.num_steps += num_dense * pretrain + number * trial.num_finetunings * finetune
        dense_bytes = plan.stored_bytes - plan.num_rounds * plan.round_bytes
        self.stored_bytes += number * (dense_bytes + rounds * plan.round_bytes)
        if folder is None:
            return
        self.stored_bytes += num_dense * dense_bytes
        scores = scores_key(trial, folder) if trial.cluster.fits_one_process else None
        if scores is not None and scores not in self._shared:
            self.stored_bytes += 4 * plan.num_prunable
            self._shared.add(scores)
        self._shared.add(folder)


def _kind_of(trial: JobConfig) -> str:
    outside: dict[str, Any] = dict.fromkeys(("name", "storage", "seed", "sweep"), True)
    tree = trial.model_dump(mode="json", exclude=outside | _WITHOUT_MEMORY)
    for section in ("pretrain", "finetune"):
        for name in ("epochs", "momentum", "warmup_epochs"):
            tree[section][name] = tree[section][name] > 0
    tree["finetune"]["distillation"] = trial.finetune.distillation.weight > 0
    tree["prune"]["batchnorm_examples"] = trial.prune.norm_examples > 0
    return json.dumps(tree, sort_keys=True)


# -- what it would run on --------------------------------------------------------------------------


def see_machines(job: JobConfig) -> list[Machine]:
    """List the machines of the job's cluster as they are.

    Raises:
        ConfigError: The cluster does not answer.
    """
    if job.cluster.address is None:
        # What a private cluster would have.
        resources = {
            "CPU": float(pretend_cpus(job.cluster, os.cpu_count() or 1)),
            "GPU": float(torch.cuda.device_count()),
            "memory": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        }
        return [Machine("this machine", resources)]
    # Ray takes seconds to import, and a private cluster is estimated without it.
    from gbp_ray.runtime.on_ray.machines import list_machines
    from gbp_ray.runtime.on_ray.session import ray_session

    with ray_session(job.cluster, is_debug=False):
        return list_machines()


def take_of_host(job: JobConfig, plan: CostEstimate) -> int:
    """Compute how much of its machine's memory a worker takes."""
    return (0 if job.cluster.use_gpu else plan.peak_bytes) + plan.data_bytes + _PROCESS_BYTES


def find_misfits(
    job: JobConfig,
    machines: Sequence[Machine],
    num_workers: float,
    worker_bytes: int,
    host_bytes: int,
) -> tuple[str, ...]:
    """List what would not fit the cluster as it is, one line each.

    Args:
        num_workers: The most at a time.
        worker_bytes: What each holds on its device.
        host_bytes: What each takes of its machine.
    """
    found = []
    if (fault := find_misfit(job.cluster, machines)) is not None:
        found.append(fault)
    claim = worker_resources(job.cluster, machines)
    for machine in machines:
        number = min(machine.count(claim), num_workers)
        memory = machine.resources.get("memory", math.inf)
        if number * host_bytes > memory:
            found.append(
                f"memory of {machine.name}: {number:g} workers at a time take "
                f"{number * host_bytes / 1e9:.1f} GB of its {memory / 1e9:.1f}; raise "
                "cluster.cpus_per_worker or have fewer at a time"
            )
    if job.cluster.use_gpu and torch.cuda.is_available() and job.cluster.address is None:
        memory = torch.cuda.get_device_properties(0).total_memory
        number = math.floor(1 / job.cluster.gpus_per_worker + 1e-9)
        if number * worker_bytes > memory:
            found.append(
                f"memory of a GPU: {number} workers on it take {number * worker_bytes / 1e9:.1f} "
                f"GB of its {memory / 1e9:.1f}; raise cluster.gpus_per_worker"
            )
    return tuple(found)


@dataclass(frozen=True)
class CostEstimate:
    """The cost of one job.

    Attributes:
        unpruned: Of each other matrix its weights, and why they are not prunable.
        data_bytes: Examples held in memory by tensors and arrays; data sets are not looked into.
        num_passes: Over the calibration examples, each round.
        num_steps: Optimizer steps, pretrain and all rounds.
        round_bytes: What one round writes to storage.
        stored_bytes: What all rounds write, the dense network's included.
        units: Which whole units there are and what may stay of them, in words; "" for weights.
    """

    strategy: str
    num_workers: int
    num_parameters: int
    num_prunable: int
    unpruned: dict[str, tuple[int, str]]
    data_bytes: int
    criterion: str
    criterion_cost: str
    num_passes: int
    calibration_examples: int
    num_rounds: int
    pretrain_steps: int
    finetune_steps: int
    num_steps: int
    phases: tuple[Phase, ...]
    peak_bytes: int
    sent_bytes_per_round: int
    round_bytes: int
    stored_bytes: int
    units: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and for tables."""
        tree = asdict(self)
        return tree if self.units else {k: v for k, v in tree.items() if k != "units"}


def make_plan(job: JobConfig, workload: Workload) -> CostEstimate:
    """Estimate a job whose network has been checked; a few examples pass through it."""
    model, is_blank = network_of_seed(workload, job.seed)
    num_parameters = sum(p.numel() for p in model.parameters())
    memory = Memory(job, workload, model, is_blank=is_blank)
    del model  # it may be large, and there is a copy
    phases = memory.phases()
    has_passes = memory.num_passes > 0 or job.prune.reconstruct != "none"
    round_bytes = memory.stored_bytes(has_optimizer=True)
    dense_bytes = memory.stored_bytes(has_optimizer=job.prune.spec.needs_history)
    return CostEstimate(
        strategy=job.cluster.strategy,
        num_workers=job.cluster.max_workers,
        num_parameters=num_parameters,
        num_prunable=memory.num_prunable,
        unpruned=memory.unpruned,
        data_bytes=bytes_of(_columns(workload)),
        criterion=job.prune.criterion,
        criterion_cost=criterion(job.prune.criterion).spec.cost,
        num_passes=memory.num_passes,
        calibration_examples=memory.calibration_examples if has_passes else 0,
        num_rounds=job.prune.rounds,
        pretrain_steps=memory.pretrain_steps,
        finetune_steps=memory.finetune_steps,
        num_steps=memory.pretrain_steps + job.num_finetunings * memory.finetune_steps,
        phases=tuple(phases),
        peak_bytes=max(phase.num_bytes for phase in phases),
        sent_bytes_per_round=sum(p.sent_bytes for p in phases if p.name != "pretrain"),
        round_bytes=round_bytes,
        stored_bytes=dense_bytes + job.prune.rounds * round_bytes,
        units=_describe_units(job, memory),
    )


def _describe_units(job: JobConfig, memory: Memory) -> str:
    """Counts the whole units that a job may remove, and says where removing ends."""
    prune = job.prune
    if not prune.unit_kinds:
        return ""
    kinds = [
        f"{number:,} {kind}{'' if number == 1 else 's'} in {num_groups:,} "
        f"group{'' if num_groups == 1 else 's'}"
        for kind, (num_groups, number) in memory.count_units().items()
    ]
    then = "leave the network after each round" if prune.compact else "stay in it as zeros"
    return f"{', '.join(kinds)}; pruned to {prune.goal}; removed ones {then}"


def _columns(workload: Workload) -> Iterator[Any]:
    seen: set[int] = set()
    for data in (workload.train, workload.validation, workload.test):
        split = data
        while isinstance(split, Portion):
            split = split.data
        for column in split if isinstance(split, tuple) else ():
            if id(column) not in seen:
                seen.add(id(column))
                yield column
