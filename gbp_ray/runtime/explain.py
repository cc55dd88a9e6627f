"""Comparison of a trial's pruned network with its dense one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gbp_ray.distributed.agreement import check_data
from gbp_ray.distributed.ranks import Ranks, fixed_kernels, own_device
from gbp_ray.distributed.sharding import copy_network
from gbp_ray.pruning.analysis import compare_networks
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.results.findings import Findings
from gbp_ray.results.store import locate_finished
from gbp_ray.training.batchnorm import recalibrate_as_asked
from gbp_ray.training.network import load_weights, rebuild_network
from gbp_ray.training.progress import OnProgress, ignore_progress
from gbp_ray.workloads.code import admit_code, warn_of_changed_code
from gbp_ray.workloads.loading import load_workload

__all__ = ["Explanation", "explain_round"]


@dataclass(frozen=True)
class Explanation:
    """The findings, the address `uri` where they are stored, and that of the trial."""

    findings: Findings
    uri: str
    trial_uri: str


def explain_round(
    uri: str | Path,
    *,
    code: str | Path = "",
    trust_code: Sequence[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> Explanation:
    """Compares a round of a finished trial with its dense network, and stores the findings.

    Args:
        uri: A round's folder, or a trial's for its chosen round.
        code: A folder of the job's own modules, searched in addition to the working folder.
        trust_code: Code that may run although only the record names it; see `admit_code`.
        on_progress: Called with a `training.progress.Progress` after each step.

    Raises:
        ConfigError: The record names code that is neither built in nor trusted.
        StoreError: The trial has not finished, or something cannot be read or written.
        WorkloadError: The data or the network are not available any more.
    """
    store, trial, record = locate_finished(uri)
    name = trial.trial_id
    admit_code(trial.job, store.trial_uri(name), trust_code, [code] if code else [])
    warn_of_changed_code(trial.sources, trial.trial_id, trial.job)
    job = trial.job
    ranks = Ranks(device=own_device(job))
    with fixed_kernels(job.cluster.threads_per_worker):
        workload = load_workload(job.workload, job.seed)
        check_data(workload, trial.dense.fingerprints, store.trial_uri(name))
        weights = [
            store.read_file(name, stored, "weights.safetensors") for stored in (trial.dense, record)
        ]
        source = "round_000/weights.safetensors"
        dense = rebuild_network(workload, job.seed, weights[0], source, trial.dense.fingerprints)
        # Copied, since build_model may return the same network at every call.
        pruned = copy_network(dense)
        load_weights(pruned, weights[1], f"round_{record.round:03d}/weights.safetensors")
        dense, pruned = dense.to(ranks.device), pruned.to(ranks.device)
        reference = trial.dense.reference
        if reference.is_recalibrated:
            recalibrate_as_asked(job, dense, workload, ranks)
        masks = MaskSet.from_bytes(store.read_file(name, record, "masks.safetensors"))
        findings = compare_networks(
            job,
            workload,
            dense,
            pruned,
            masks,
            ranks,
            trial_id=name,
            round_number=record.round,
            on_progress=on_progress,
        )
    if reference.is_recalibrated:
        note = f"the dense network as stored; shown is {reference.name}"
        findings = replace(findings, left_out=(*findings.left_out, note))
    return Explanation(findings, findings.save(store), store.trial_uri(name))
