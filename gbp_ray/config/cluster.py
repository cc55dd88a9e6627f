"""The section of a job for the cluster: where it runs, which does not change its result."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gbp_ray.config.schema import Section, refuse

__all__ = ["ClusterConfig"]

_MOST_WORKERS = 10_000
_YEAR_S = 366.0 * 24 * 3600


class ClusterConfig(Section):
    """Where the job runs. Nothing here changes the result."""

    num_workers: int | tuple[int, int] = 1
    """Worker processes; 0 works in this very process. [min, max] takes as many as the Ray cluster
    has room for, and follows when that changes, from the last whole round on."""
    launcher: Literal["auto", "ray", "local"] = "auto"
    """What starts the workers of a prune: Ray, or this command, as processes of this machine. auto:
    Ray where a cluster is joined or one of its services asked for (address, autoscale, [min, max]
    workers, accelerator_type, a part of a GPU), else local. A sweep always runs on Ray."""
    use_gpu: bool = False
    """A GPU per worker (NCCL) instead of CPUs (gloo)."""
    gpus_per_worker: float = Field(1.0, gt=0.0, le=1.0)
    """With use_gpu: the part of a GPU that a worker claims. Below 1, trials of one worker share a
    GPU; check with --dry-run that they fit into its memory."""
    accelerator_type: str | None = None
    """With use_gpu: the kind of GPU by Ray's name, such as "A100" or "L4"; unset takes any."""
    cpus_per_worker: float | None = Field(None, gt=0.0, le=10_000.0)
    """CPUs that a worker claims of its machine; unset: threads_per_worker, or as many as the
    largest machine has."""
    placement: Literal["pack", "spread"] = "pack"
    """The workers of a trial: on as few machines as hold them, or on as many as there are."""
    strategy: Literal["replicated", "fsdp"] = "replicated"
    """Whether each worker holds the whole network, or all of them one, in shards (FSDP2)."""
    threads_per_worker: int = Field(1, ge=1, le=1024)
    """CPU threads of each worker. Kernels add in an order of their own per thread count, so results
    agree to the bit between runs that share this number."""
    max_failures: int = Field(2, ge=0, le=10_000)
    """Lost or hung workers that a trial survives; it goes on after its last whole round."""
    max_preemptions: int | None = Field(None, ge=0, le=1_000_000)
    """Machines a trial may lose that were taken away with notice (spot), counted apart from
    max_failures; unset: any number, and always so for trials of one worker in a sweep."""
    room_timeout_s: float = Field(600.0, ge=0.0, le=_YEAR_S)
    """Seconds that a fixed number of workers waits for room on the cluster."""
    autoscale: bool | None = None
    """Whether the cluster adds machines when they are asked for: a job that has no room yet then
    waits. Unset: as far as Ray tells."""
    hang_timeout_s: float = Field(900.0, ge=0.0, le=_YEAR_S)
    """Seconds without a finished step, batch or exchange after which a worker counts as lost.
    Building the workload and reading or writing storage may take longer. 0: never."""
    address: str | None = None
    """Ray cluster to join; unset: this machine, where Ray starts a private one if it is needed."""

    @model_validator(mode="after")
    def _agree(self) -> ClusterConfig:
        has_partial_gpu = self.gpus_per_worker != 1.0
        refuse(
            self.launcher == "local"
            and self.service_of_ray != ""
            and f"launcher = local: {self.service_of_ray} is for Ray only; unset it, or launcher",
            self.strategy == "fsdp"
            and self.min_workers == 0
            and "strategy = fsdp: spreads the network over workers; set num_workers to 1 or more",
            not self.use_gpu
            and self.accelerator_type is not None
            and f"accelerator_type = {self.accelerator_type}: is a kind of GPU; set use_gpu = true",
            not self.use_gpu
            and has_partial_gpu
            and f"gpus_per_worker = {self.gpus_per_worker:g}: set use_gpu = true",
            self.use_gpu
            and has_partial_gpu
            and self.max_workers > 1
            and f"gpus_per_worker = {self.gpus_per_worker:g}: NCCL joins no two workers on one "
            "GPU; set it to 1, or num_workers to 1",
        )
        return self

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_number_or_range(cls, value: object) -> object:
        is_range = isinstance(value, (list, tuple)) and len(value) == 2
        numbers: list[Any] = list(value) if is_range else [value, value]  # type: ignore[call-overload]
        if not all(type(n) is int for n in numbers) or not is_range <= numbers[0] <= numbers[1]:
            raise ValueError("must be a whole number from 0, or [min, max] with 1 <= min <= max")
        if numbers[1] > _MOST_WORKERS:
            raise ValueError(f"must be at most {_MOST_WORKERS:,}")
        return tuple(numbers) if is_range else value

    @property
    def fits_one_process(self) -> bool:
        """Returns whether a trial of a sweep runs in the process that Tune starts for it."""
        return self.max_workers <= 1 and self.strategy == "replicated"

    @property
    def service_of_ray(self) -> str:
        """Returns the first setting that only Ray can serve, such as "autoscale = true", or ""."""
        settings = {
            f"address = {self.address}": self.address is not None,
            f"num_workers = {json.dumps(self.num_workers)}": not isinstance(self.num_workers, int),
            "autoscale = true": self.autoscale,
            f"accelerator_type = {self.accelerator_type}": self.accelerator_type is not None,
            f"gpus_per_worker = {self.gpus_per_worker:g}": self.gpus_per_worker != 1.0,
        }
        return next((text for text, is_asked in settings.items() if is_asked), "")

    @property
    def min_workers(self) -> int:
        """Returns the fewest workers the job goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Returns the most workers the job makes use of."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
