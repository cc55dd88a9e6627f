"""Digests of the files that a job names, which are part of the id of its trials."""

from __future__ import annotations

from typing import Any

from gbp_ray.config.job import JobConfig, expand

__all__ = ["pin_files", "pin_trials"]


def pin_files(job: JobConfig, known: dict[str, str] | None = None) -> JobConfig:
    """Adds the digests of masks and weights that a job names, where it does not hold them yet.

    Args:
        known: Digests by address, shared by the jobs of a sweep; new ones are added.

    Raises:
        ConfigError: The masks cannot be read.
        WorkloadError: The weights cannot be read.
    """
    known = {} if known is None else known
    job = _pin(job, "workload.transfer.checkpoint", known)
    job = _pin(job, "finetune.distillation.teacher", known)
    return _pin(job, "prune.initial_masks", known)


def pin_trials(job: JobConfig) -> tuple[JobConfig, list[JobConfig]]:
    """Pins the files of a job or of a sweep; returns it with the trials of its grid, if it has one.

    Raises:
        GbpError: As `pin_files` and `expand`.
    """
    if job.sweep.search != "grid":
        return pin_files(job), []
    digests: dict[str, str] = {}
    return job, [pin_files(trial, digests) for trial in expand(job)]


def _pin(job: JobConfig, key: str, known: dict[str, str]) -> JobConfig:
    """Sets the field `key`_digest where the field holds an address."""
    *parents, name = key.split(".")
    sections: list[Any] = [job]
    for parent in parents:
        sections.append(getattr(sections[-1], parent))
    address = getattr(sections[-1], name)
    if not address or getattr(sections[-1], f"{name}_digest"):
        return job
    if address not in known:
        known[address] = _digest(address, key)
    changed = sections.pop().model_copy(update={f"{name}_digest": known[address]})
    for parent in reversed(parents):
        changed = sections.pop().model_copy(update={parent: changed})
    return changed


def _digest(address: str, key: str) -> str:
    # What reads such files loads torch, which jobs that name none do not need.
    if key == "prune.initial_masks":
        from gbp_ray.pruning.masks import read_named_masks

        return read_named_masks(address).digest
    from gbp_ray.workloads.weight_files import hash_weights

    return hash_weights(address, key)
