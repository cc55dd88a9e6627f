"""One trial of a job, without a sweep: its checks, where its workers run, and its plan."""

from __future__ import annotations

import time

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.distributed.ranks import Ranks, own_device
from gbp_ray.pruning.checks import load_checked
from gbp_ray.results.records import JobRecord, RoundRecord, TrialRecord
from gbp_ray.results.store import Store
from gbp_ray.runtime.estimate import (
    PrunePlan,
    find_misfits,
    make_plan,
    see_machines,
    take_of_host,
)
from gbp_ray.runtime.local_workers import run_local_trial
from gbp_ray.runtime.placement import launches_locally
from gbp_ray.runtime.progress import ProgressBoard
from gbp_ray.runtime.trial import finish_trial, work_trial
from gbp_ray.workloads.code import warn_of_shadowed_modules
from gbp_ray.workloads.contract import Workload

__all__ = ["load_single", "plan_single", "run_single"]


def run_single(
    job: JobConfig, store: Store, import_paths: list[str], board: ProgressBoard, *, is_debug: bool
) -> TrialRecord:
    """Checks a job and runs what is left of its trial; returns the trial's record.

    Args:
        import_paths: Folders of the user's modules, the job file's last.
        is_debug: Shows what Ray and workers print.
    """
    started, name = time.monotonic(), trial_id(job)
    checked, is_untouched = load_single(job, import_paths, store.read_round(name, 0))
    handed = checked if is_untouched and job.cluster.num_workers == 0 else None
    del checked
    store.claim(job)
    with store.hold(name) as lease:
        # Its last holder may have finished the trial.
        record = store.read_trial(name)
        if record is None:
            _run_rounds(job, store, import_paths, board, handed, is_debug=is_debug)
            lease.check()
            record = finish_trial(job, store, time.monotonic() - started)
    return record


def plan_single(job: JobConfig, store: Store, import_paths: list[str]) -> PrunePlan:
    """Plans what `run_single` would do; writes nothing."""
    name = trial_id(job)
    uri, num_rounds = store.trial_uri(name), job.prune.rounds + 1
    if store.read_trial(name) is not None:
        return PrunePlan(name, uri, num_rounds, 0, None)
    workload, _ = load_single(job, import_paths, store.read_round(name, 0))
    store.check_claim(JobRecord(factory=job.workload.factory))
    if job.cluster.max_workers == 0 or job.cluster.address is None:
        own_device(job)
    num_done = len(store.read_rounds(name))
    plan = make_plan(job, workload)
    misfits: tuple[str, ...] = ()
    if job.cluster.max_workers > 0:
        most, held = job.cluster.max_workers, (plan.peak_bytes, take_of_host(job, plan))
        misfits = find_misfits(job, see_machines(job), most, *held)
    return PrunePlan(name, uri, num_done, num_rounds - num_done, plan, misfits)


def load_single(
    job: JobConfig, import_paths: list[str], dense: RoundRecord | None = None
) -> tuple[Workload, bool]:
    """Loads and checks a job as `load_checked`; warns of modules that hide the user's."""
    checked = load_checked(job, dense)
    warn_of_shadowed_modules(job, import_paths[-1], stacklevel=5)
    return checked


def _run_rounds(
    job: JobConfig,
    store: Store,
    import_paths: list[str],
    board: ProgressBoard,
    workload: Workload | None,
    *,
    is_debug: bool,
) -> None:
    name = trial_id(job)
    earlier = store.read_rounds(name)
    if earlier:
        board.note(f"{name}  goes on after round {earlier[-1].round}")
    if job.cluster.num_workers == 0:
        device = own_device(job)
        board.pass_checks()
        work_trial(
            job,
            Ranks(device=device),
            workload=workload,
            on_progress=board.show,
            round_done=lambda record: board.show_round(name, record),
        )
        return
    least, most = job.cluster.min_workers, job.cluster.max_workers
    asked = f"{most}" if least == most else f"{least} to {most}"
    asked += " workers" if most > 1 else " worker"
    if launches_locally(job.cluster):
        board.note(f"{name}  starting {asked} on this machine")
        run_local_trial(job, board, is_debug=is_debug)
    else:
        # Ray takes seconds to import, and other jobs do not need it.
        from gbp_ray.runtime.on_ray.train import run_trial

        board.note(f"{name}  starting {asked} on Ray")
        run_trial(job, import_paths, board, is_debug=is_debug)
