"""What a job will cost before it runs: the arithmetic behind `gbp-ray prune JOB --dry-run`.

Memory and traffic by phase come from `phases`, which says how they are computed; here they meet the
number of steps, of passes over the data, and what is written to storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gbp_ray.config import JobConfig
from gbp_ray.pruning.building import network_of_seed
from gbp_ray.pruning.criteria import criterion
from gbp_ray.pruning.passes import Passes
from gbp_ray.pruning.phases import Phase, plan_phases
from gbp_ray.pruning.sizes import Sizes, bytes_of
from gbp_ray.workload import (
    Portion,
    Workload,
)

__all__ = ["Phase", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a job will cost.

    Attributes:
        data_bytes: Examples held in memory by tensors and arrays; data sets are not looked into.
        num_passes: Over the calibration examples, each round.
        num_steps: Optimizer steps, pretrain and all rounds.
        round_bytes: What one round writes to storage.
        stored_bytes: What all rounds write, the dense network's included.
    """

    strategy: str
    num_workers: int
    num_parameters: int
    num_prunable: int
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

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values, for JSON and for tables."""
        return asdict(self)


def make_plan(job: JobConfig, workload: Workload) -> Plan:
    """Plans a job whose network has been checked; a few examples pass through it."""
    model, is_blank = network_of_seed(workload, job.seed)
    sizes = Sizes(job, workload, model, is_blank=is_blank)
    phases = plan_phases(sizes, Passes(job, workload, model))
    rule = criterion(job.prune.criterion)
    # movement fine-tunes before the first decision as well.
    stretches = job.prune.rounds + (job.prune.criterion == "movement")
    return Plan(
        strategy=job.cluster.strategy,
        num_workers=job.cluster.max_workers,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_prunable=sizes.num_prunable,
        data_bytes=sum(bytes_of(column) for column in _columns(workload)),
        criterion=rule.name,
        criterion_cost=rule.cost,
        num_passes=sizes.num_passes,
        calibration_examples=sizes.calibration_examples if sizes.num_passes else 0,
        num_rounds=job.prune.rounds,
        pretrain_steps=sizes.pretrain_steps,
        finetune_steps=sizes.finetune_steps,
        num_steps=sizes.pretrain_steps + stretches * sizes.finetune_steps,
        phases=tuple(phases),
        peak_bytes=max(phase.num_bytes for phase in phases),
        sent_bytes_per_round=sum(p.sent_bytes for p in phases if p.name != "pretrain"),
        round_bytes=sizes.stored_bytes(has_optimizer=True),
        stored_bytes=sizes.stored_bytes(has_optimizer=job.prune.criterion == "movement")
        + job.prune.rounds * sizes.stored_bytes(has_optimizer=True),
    )


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
