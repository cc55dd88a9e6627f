"""One trial on Ray: a TorchTrainer over 1 to N workers, with Ray's noise and errors unwrapped.

The store, not Ray, holds the state of a trial: a restarted worker group, of the same size or
another, goes on after the last committed round, and so does a new driver.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import GbpError, StoreError, TrialError, WorkloadError
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store
from gbp_ray.runtime.on_ray import START_TIMEOUT_S
from gbp_ray.runtime.on_ray.failures import (
    Failure,
    find_failure,
    first_line,
    is_consequence,
    may_pass,
    unwrap,
)
from gbp_ray.runtime.on_ray.hang import Standstill, Watch
from gbp_ray.runtime.on_ray.machines import check_cluster, check_folder, list_machines
from gbp_ray.runtime.on_ray.mailbox import Relay
from gbp_ray.runtime.on_ray.privacy import PrivateTorchConfig, is_private
from gbp_ray.runtime.on_ray.session import fit_interruptibly, ray_session
from gbp_ray.runtime.placement import worker_resources
from gbp_ray.runtime.progress import ProgressBoard, Tick
from gbp_ray.workloads.loading import add_import_paths

__all__ = [
    "StoppedError",
    "fit_trial",
    "run_trial",
]

_POLL_INTERVAL_S = 0.2
_TICK_INTERVAL_S = 0.2
_GRACE_S = 5.0
"""How long a worker holds back that it lost the others: Ray then sees which one died."""

_EXCHANGE_TIMEOUT_S = 4 * 3600
"""How long workers wait for one that builds the workload; hung ones are noticed by `watch`."""

_MAILBOX_TIMEOUT_S = 10.0


def run_trial(
    job: JobConfig, import_paths: list[str], board: ProgressBoard, *, is_debug: bool = False
) -> None:
    """Runs a trial's missing rounds on Ray Train workers.

    Args:
        import_paths: Folders where workers find the user's modules.
        board: Shows the workers' progress.
        is_debug: Lets Ray's own output through.

    Raises:
        GbpError: What a worker raised on purpose, as it raised it.
        TrialError: The workers failed for another reason; names trial, rank and root cause.
    """
    with ray_session(job.cluster, is_debug):
        check_cluster(job, import_paths)
        board.pass_checks()
        with Relay(board, job.cluster) as relay:
            refusal = fit_trial(job, import_paths, relay.mailbox, describe=relay.describe)
    if refusal is not None:
        raise refusal


def fit_trial(
    job: JobConfig,
    import_paths: list[str],
    mailbox: Any,
    gate: Any = None,
    describe: Callable[[Failure], tuple[int, str]] = lambda failure: (failure.rank, failure.words),
) -> GbpError | None:
    """Runs the workers to their end; returns what they all agreed to fail with.

    Args:
        mailbox: Takes their progress.
        gate: A mailbox of this trial's own that takes each round and says when to go on.
        describe: Says of a failure which worker it was and what happened to it.
    """
    with _scratch(job) as scratch, tempfile.TemporaryDirectory(prefix="gbp-ray-") as meeting:
        torch_config = ray.train.torch.TorchConfig(timeout_s=_EXCHANGE_TIMEOUT_S)
        if is_private():
            torch_config = PrivateTorchConfig(timeout_s=_EXCHANGE_TIMEOUT_S, folder=meeting)
        return _fit(scratch, torch_config, job, import_paths, mailbox, gate, describe)


@contextlib.contextmanager
def _scratch(job: JobConfig) -> Iterator[str]:
    """Gives Ray a place for its own files, which say nothing that the records do not."""
    store = Store(job.storage, job.name)
    if store.folder is not None:
        folder = store.folder / "ray"
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder / trial_id(job), ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
    elif job.cluster.address is None:
        with tempfile.TemporaryDirectory(prefix="gbp-ray-") as local:
            yield local
    else:
        # Several machines share no folder, but all of them reach the store.
        try:
            yield store.objects.uri_of("ray")
        finally:
            # What ended the trial matters more than what it leaves here.
            with contextlib.suppress(StoreError):
                leftovers = store.objects.entries(f"ray/{trial_id(job)}/")
                store.objects.delete([entry.key for entry in leftovers])


def _fit(
    scratch: str,
    torch_config: ray.train.torch.TorchConfig,
    job: JobConfig,
    import_paths: list[str],
    mailbox: Any,
    gate: Any,
    describe: Callable[[Failure], tuple[int, str]],
) -> GbpError | None:
    cluster, name = job.cluster, trial_id(job)
    # A worker that answers Ray no more is frozen.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.hang_timeout_s or "inf")
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "import_paths": import_paths,
            "working_folder": os.getcwd(),  # noqa: PTH109
            "mailbox": mailbox,
            "gate": gate,
        },
        torch_config=torch_config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=worker_resources(cluster, list_machines()),
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures,
                max_preemption_failures=(
                    -1 if cluster.max_preemptions is None else cluster.max_preemptions
                ),
                controller_failure_limit=max(
                    0, math.ceil(cluster.room_timeout_s / START_TIMEOUT_S) - 1
                ),
            ),
            callbacks=[_Listener(mailbox, name)],
        ),
    )
    try:
        result = fit_interruptibly(trainer)
    except ray.train.WorkerGroupError as error:
        failure = find_failure(error.worker_failures)
        raise _final_error(failure, describe, job, name) from error
    except ray.train.ControllerError as error:
        cause = unwrap(error)
        text = first_line(cause)
        if "startup timed out" in text:
            text = (
                f"the cluster had no room for cluster.num_workers = {cluster.max_workers} within "
                f"cluster.room_timeout_s = {cluster.room_timeout_s:g}; ask for fewer or wait longer"
            )
        raise TrialError(
            f"trial {name}: Ray could not run the workers: {text}; run the job again to go on "
            "after its last whole round",
            trial_id=name,
            rank=None,
            cause=text,
        ) from error
    told: GbpError | None = result.return_value
    if isinstance(told, TrialError):
        return TrialError(
            f"trial {name}: worker {told.rank} failed with {told.cause}; it would again, so the "
            "workers were not started again; mend it and run the job again to go on after its "
            "last whole round",
            trial_id=name,
            rank=told.rank,
            cause=told.cause,
            is_lasting=True,
        )
    return told


def _train_worker(config: dict[str, Any]) -> GbpError | None:
    """Runs on each Ray Train worker; returns rather than raises what all ranks agree on.

    A bad input stays bad: returning it spares the restarts that a raised error would trigger.
    """
    # Here, since Ray's controller of the workers loads this module, too: it saves a second there.
    from gbp_ray.runtime.trial import work_trial

    with contextlib.suppress(OSError):
        os.chdir(config["working_folder"])
    add_import_paths(config["import_paths"])
    job = JobConfig.model_validate(config["job"])
    mailbox, gate = config["mailbox"], config["gate"]
    # Several trials of a sweep may share the other one.
    meeting = gate if gate is not None else mailbox
    if (told := ray.get(meeting.last_word.remote())) is not None:
        return told
    device = ray.train.torch.get_device() if job.cluster.use_gpu else torch.device("cpu")
    ranks = Ranks.current(device)
    try:
        ranks.run_collectively(lambda: check_folder(job))
    except StoreError as error:
        return error
    watch = Watch(
        ranks,
        job.cluster.hang_timeout_s,
        compare=partial(_compare, meeting, ranks.broadcast_object(uuid.uuid4().hex)),
        accuse=partial(_say, mailbox),
    )
    last_sent, last_phase = 0.0, ""

    def tell(tick: Tick) -> None:
        nonlocal last_sent, last_phase
        watch.note(tick)
        now = time.monotonic()
        is_due = now - last_sent > _TICK_INTERVAL_S or tick.phase != last_phase
        if ranks.is_first and is_due:
            last_sent, last_phase = now, tick.phase
            mailbox.put.remote(tick)

    def round_done(record: RoundRecord) -> None:
        if ranks.is_first:
            mailbox.put.remote((trial_id(job), record))
        ray.train.report({"round": record.round, "accuracy": record.accuracy})
        if gate is not None:
            if ranks.is_first:
                gate.put.remote(record)
            # All ranks hear the same, so none is left behind in a collective.
            while (verdict := ray.get(gate.verdict.remote(record.round))) is None:
                time.sleep(_POLL_INTERVAL_S)
            if not verdict:
                raise StoppedError(f"trial {trial_id(job)}: stopped after round {record.round}")

    try:
        with watch:
            work_trial(job, ranks, tell=tell, round_done=round_done)
    except Exception as error:
        if isinstance(error, GbpError) and not ranks.has_left:
            if isinstance(error, WorkloadError) and may_pass(error):
                # Raised from a connection that was lost, say.
                raise
            return error
        if is_consequence(error):
            time.sleep(_GRACE_S)
        if may_pass(error):
            raise
        # Where it was raised is seen with --debug.
        traceback.print_exception(error)
        told = ranks.in_words(error)
        if not ranks.has_left:
            return told
        # The others know nothing of it; started again, all of them end at once.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(meeting.say_last_word.remote(told), timeout=_MAILBOX_TIMEOUT_S)
        raise
    return None


def _compare(mailbox: Any, group: str, own: Standstill) -> list[Standstill]:
    try:
        return ray.get(mailbox.compare.remote(group, own), timeout=_MAILBOX_TIMEOUT_S)
    except ray.exceptions.RayError:
        return []


def _say(mailbox: Any, message: Standstill) -> None:
    """Makes sure that a last word has arrived."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(mailbox.put.remote(message), timeout=_MAILBOX_TIMEOUT_S)


class StoppedError(GbpError):
    """A scheduler ended the trial between two rounds."""


class _Listener(ray.train.UserCallback):  # type: ignore[misc]
    """Tells the driver of failures that Ray answers by starting the workers again."""

    def __init__(self, mailbox: Any, name: str) -> None:
        self._mailbox, self._name = mailbox, name

    def after_exception(
        self, run_context: object, worker_exceptions: Mapping[int, BaseException]
    ) -> None:
        self._mailbox.put.remote((self._name, find_failure(worker_exceptions)))


def _final_error(
    failure: Failure,
    describe: Callable[[Failure], tuple[int, str]],
    job: JobConfig,
    name: str,
) -> GbpError:
    if failure.cause is not None:
        return failure.cause
    rank, words = describe(failure)
    limit = f"max_failures = {job.cluster.max_failures}"
    if failure.is_preemption:
        limit = f"max_preemptions = {job.cluster.max_preemptions}"
    return TrialError(
        f"trial {name}: worker {rank} {words}; cluster.{limit} "
        "allows no more restarts; run the job again to go on after its last whole round",
        trial_id=name,
        rank=rank,
        cause=words,
    )
