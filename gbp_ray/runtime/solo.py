"""One trial from its lease to its record, in the process that drives it.

This is what a trial of a sweep runs, and the end of every other trial too. It stops after each
round, so that a scheduler may have its say, and holds the trial's lease all the while.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from gbp_ray import __version__
from gbp_ray.config import JobConfig, trial_id
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.runtime.progress import Tick
from gbp_ray.runtime.shared import (
    SharedScores,
    adopt_dense,
    dense_origin,
    own_sources,
    share_dense,
)
from gbp_ray.runtime.worker import iterate_trial
from gbp_ray.store import RoundRecord, Store, TrialRecord
from gbp_ray.workload import load_workload

__all__ = ["Step", "finish_trial", "own_device", "run_solo", "run_whole"]

RunRounds = Callable[[], Iterator[RoundRecord]]
"""Runs the rounds that a trial lacks, committing each."""


@dataclass(frozen=True)
class Step:
    """A round of a trial.

    Attributes:
        record: What was measured.
        is_old: Whether it was there before, and not computed now.
    """

    record: RoundRecord
    is_old: bool


def run_solo(
    job: JobConfig,
    tell: Callable[[Tick], None] = lambda tick: None,
    is_patient: bool = True,
) -> Iterator[Step]:
    """Runs a trial on one rank, this process; yields its rounds from the first, then commits it.

    Args:
        is_patient: Waits where another driver is at work on it.

    Raises:
        BusyError: Another driver is, and this one does not wait.
        GbpError: What is wrong with the job or the storage.
    """
    store = Store(job.storage, job.name)

    def run_rounds() -> Iterator[RoundRecord]:
        return iterate_trial(
            job, Ranks(device=own_device(job)), tell=tell, score_cache=SharedScores(store)
        )

    return run_whole(job, store, run_rounds, is_patient=is_patient)


def run_whole(
    job: JobConfig, store: Store, run_rounds: RunRounds, *, is_patient: bool = True
) -> Iterator[Step]:
    """Does so with whatever runs the rounds; the dense network is shared with other trials."""
    name = trial_id(job)
    started = time.monotonic()
    with store.await_lease(f"trials/{name}") if is_patient else store.hold(name) as lease:
        # Whoever held it before may have finished the trial.
        finished = store.read_trial(name)
        rounds = store.read_rounds(name) if finished is None else finished.rounds
        for record in rounds:
            yield Step(record, is_old=True)
        if finished is not None:
            return
        check_job(job, load_workload(job.workload, job.seed), rounds[0] if rounds else None)
        for record in _run_with_dense(job, store, run_rounds):
            lease.check()
            yield Step(record, is_old=False)
        lease.check()
        finish_trial(job, store, time.monotonic() - started)


def _run_with_dense(job: JobConfig, store: Store, run_rounds: RunRounds) -> Iterator[RoundRecord]:
    if dense_origin(job) is None or store.read_round(trial_id(job), 0) is not None:
        yield from run_rounds()
        return
    record, rounds = adopt_dense(store, job), None
    if record is None:
        with share_dense(store, job) as share:
            # Another trial may have trained it while this one waited for its turn.
            record = adopt_dense(store, job)
            if record is None:
                rounds = run_rounds()
                record = next(rounds)
                share(record)
    yield record
    yield from rounds or run_rounds()


def finish_trial(job: JobConfig, store: Store, seconds: float) -> TrialRecord:
    """Commits a trial whose rounds are all there.

    Raises:
        StoreError: Some are not, or the storage cannot be written.
    """
    name = trial_id(job)
    rounds = store.read_rounds(name)
    if len(rounds) != job.prune.rounds + 1:
        raise StoreError(
            f"storage: round {len(rounds)} vanished from '{store.trial_uri(name)}'; is another "
            "process running this job? Run the job again when it has ended"
        )
    test = store.read_test(name)
    if test is None and job.workload.validation:
        raise StoreError(
            f"storage: test.json vanished from '{store.trial_uri(name)}'; run the job again"
        )
    record = TrialRecord(
        trial_id=name,
        job=job,
        rounds=tuple(rounds),
        seconds=round(seconds, 1),
        num_workers=job.cluster.num_workers,
        versions=_versions(),
        sources=own_sources(job),
        test=test,
    )
    store.write_trial(record)
    return record


def check_cuda() -> None:
    """Refuses a GPU that this machine does not have.

    Raises:
        ConfigError: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu = true: this machine has no CUDA device; set it to false or give "
            "cluster.address"
        )


def own_device(job: JobConfig) -> torch.device:
    """Finds where this process computes.

    Raises:
        ConfigError: The job wants a GPU, and there is none.
    """
    if not job.cluster.use_gpu:
        return torch.device("cpu")
    check_cuda()
    # Started now: weights that a workload draws on it before would know nothing of the seed.
    torch.cuda.init()
    return torch.device("cuda")


def _versions() -> dict[str, str]:
    # What a job brought along to a cluster is not installed there.
    packages = {"gbp-ray": __version__}
    for name in ("torch", "ray", "numpy"):
        with suppress(PackageNotFoundError):  # one rank needs no Ray
            packages[name] = version(name)
    return {"python": platform.python_version(), **packages, "machine": platform.machine()}
