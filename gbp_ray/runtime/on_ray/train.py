"""One trial on Ray Train: a TorchTrainer over 1 to N workers, and the translation of its errors.

The store holds the state of a trial, not Ray: a restarted worker group of any size, or a new
driver, resumes after the last committed round.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
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
from gbp_ray.errors import GbpError, StoreError, TrialError
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store
from gbp_ray.runtime.failures import Failure, first_line
from gbp_ray.runtime.on_ray import START_TIMEOUT_S
from gbp_ray.runtime.on_ray.failures import find_failure, may_pass, unwrap
from gbp_ray.runtime.on_ray.machines import check_cluster, check_folder, list_machines
from gbp_ray.runtime.on_ray.mailbox import Relay
from gbp_ray.runtime.on_ray.privacy import PrivateTorchConfig, is_private
from gbp_ray.runtime.on_ray.session import fit_interruptibly, ray_session
from gbp_ray.runtime.placement import worker_resources
from gbp_ray.runtime.progress import ProgressBoard
from gbp_ray.runtime.worker import (
    AGAIN,
    EXCHANGE_TIMEOUT_S,
    Message,
    as_lasting,
    refuse_restart,
    run_worker,
)
from gbp_ray.workloads.code import add_import_paths

__all__ = ["StoppedError", "fit_trial", "run_trial"]

_POLL_INTERVAL_S = 0.2
_MAILBOX_TIMEOUT_S = 10.0


def run_trial(
    job: JobConfig, import_paths: list[str], board: ProgressBoard, *, is_debug: bool = False
) -> None:
    """Runs a trial's missing rounds on Ray Train workers.

    Raises:
        GbpError: As a worker raised it.
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
    """Runs the workers to their end; returns the error that all of them agreed on, if any.

    Args:
        mailbox: Receives their progress.
        gate: This trial's own mailbox, at which workers wait after each round.
        describe: Returns (rank, words) of a failure.
    """
    cluster, name = job.cluster, trial_id(job)
    # A worker that no longer answers Ray is frozen.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.hang_timeout_s or "inf")
    with _scratch(job) as scratch, tempfile.TemporaryDirectory(prefix="gbp-ray-") as meeting:
        torch_config = ray.train.torch.TorchConfig(timeout_s=EXCHANGE_TIMEOUT_S)
        if is_private():
            torch_config = PrivateTorchConfig(timeout_s=EXCHANGE_TIMEOUT_S, folder=meeting)
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
            agreed: GbpError | None = fit_interruptibly(trainer).return_value
        except ray.train.WorkerGroupError as error:
            failure = find_failure(error.worker_failures)
            if failure.cause is not None:
                raise failure.cause from error
            rank, words = describe(failure)
            raise refuse_restart(job, rank, words, failure.is_preemption) from error
        except ray.train.ControllerError as error:
            cause = first_line(unwrap(error))
            if "startup timed out" in cause:
                cause = (
                    f"the cluster had no room for cluster.num_workers = {cluster.max_workers} "
                    f"within cluster.room_timeout_s = {cluster.room_timeout_s:g}; ask for fewer or "
                    "wait longer"
                )
            text = f"Ray could not run the workers: {cause}; {AGAIN}"
            raise TrialError(f"trial {name}: {text}", trial_id=name, cause=cause) from error
    return as_lasting(job, agreed)


@contextlib.contextmanager
def _scratch(job: JobConfig) -> Iterator[str]:
    """Yields a place for Ray's own files, which nobody reads later."""
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
            # The trial's own error matters more than these leftovers.
            with contextlib.suppress(StoreError):
                leftovers = store.objects.entries(f"ray/{trial_id(job)}/")
                store.objects.delete([entry.key for entry in leftovers])


def _train_worker(config: dict[str, Any]) -> GbpError | None:
    """Runs a trial on one Ray Train worker; returns an error that all ranks agree on.

    Raising such an error, which would occur again, would make Ray restart the workers.
    """
    with contextlib.suppress(OSError):
        os.chdir(config["working_folder"])
    add_import_paths(config["import_paths"])
    job = JobConfig.model_validate(config["job"])
    mailbox, gate = config["mailbox"], config["gate"]
    # Trials of a sweep share the mailbox but not the gate.
    meeting = gate if gate is not None else mailbox
    if (agreed := ray.get(meeting.kept_error.remote())) is not None:
        return agreed
    device = ray.train.torch.get_device() if job.cluster.use_gpu else torch.device("cpu")
    ranks = Ranks.current(device)
    try:
        ranks.run_collectively(lambda: check_folder(job))
    except StoreError as error:
        return error

    def put(message: Message) -> None:
        mailbox.put.remote(message)

    def round_done(record: RoundRecord) -> None:
        ray.train.report({"round": record.round, **record.metrics})
        if gate is not None:
            if ranks.is_first:
                gate.put.remote(record)
            # All ranks receive the same verdict, so none waits in a collective.
            while (verdict := ray.get(gate.verdict.remote(record.round))) is None:
                time.sleep(_POLL_INTERVAL_S)
            if not verdict:
                raise StoppedError(f"trial {trial_id(job)}: stopped after round {record.round}")

    return run_worker(
        job,
        ranks,
        put=put,
        compare=partial(_wait_for, meeting.compare, ranks.broadcast_object(uuid.uuid4().hex)),
        accuse=partial(_wait_for, mailbox.put),
        # After the restart all of them end at once.
        keep_error=partial(_wait_for, meeting.keep_error),
        round_done=round_done,
        is_passing=may_pass,
    )


def _wait_for(method: Any, *arguments: Any) -> Any:
    """Calls a method of a mailbox and waits for its answer; [] if the mailbox does not answer."""
    try:
        return ray.get(method.remote(*arguments), timeout=_MAILBOX_TIMEOUT_S)
    except ray.exceptions.RayError:
        return []


class StoppedError(GbpError):
    """A scheduler ended the trial between two rounds."""


class _Listener(ray.train.UserCallback):  # type: ignore[misc]
    """Reports failures to the driver after which Ray restarts the workers."""

    def __init__(self, mailbox: Any, name: str) -> None:
        self._mailbox, self._name = mailbox, name

    def after_exception(
        self, run_context: object, worker_exceptions: Mapping[int, BaseException]
    ) -> None:
        self._mailbox.put.remote((self._name, find_failure(worker_exceptions)))
