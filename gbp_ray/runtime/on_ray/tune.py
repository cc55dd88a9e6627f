"""A sweep on Ray Tune: one Tune trial per trial, as many at a time as the cluster holds.

The store holds the state, not Tune, whose files are scratch: a finished trial is never started, an
interrupted one resumes after its last whole round. A trial that another driver holds is deferred
until no other is left.

A trial of 0 or 1 workers runs in the process of its Tune trial, which is reused for the next one,
so torch is imported once per process. More workers are a TorchTrainer inside the Tune trial, which
then claims no CPU itself; no more of them run than the cluster has CPUs for their workers. Workers
pause after each round until the scheduler has judged it; a stopped trial ends by itself.

An error of the job or the user's code ends a trial at once. One that may not occur again (a killed
process, a storage that does not answer) is retried `sweep.max_failures` times, then recorded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.tune.search import Searcher

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.errors import BusyError, GbpError, TrialError, in_one_line
from gbp_ray.results.index import name_measured
from gbp_ray.results.lease import hold_lease
from gbp_ray.results.records import FailureRecord, RoundRecord, StopRecord
from gbp_ray.results.scores import read_specs
from gbp_ray.results.store import Store
from gbp_ray.runtime.failures import first_line
from gbp_ray.runtime.on_ray.failures import may_pass, unwrap
from gbp_ray.runtime.on_ray.machines import (
    check_cluster,
    check_folder,
    is_autoscaling,
    list_machines,
)
from gbp_ray.runtime.on_ray.mailbox import Mailbox, Relay
from gbp_ray.runtime.on_ray.schedulers import GuardedScheduler
from gbp_ray.runtime.on_ray.session import fit_interruptibly, ray_session, run_beside
from gbp_ray.runtime.on_ray.train import StoppedError, fit_trial
from gbp_ray.runtime.outcomes import Outcome, dense_values, values_in
from gbp_ray.runtime.placement import count_trials, worker_resources
from gbp_ray.runtime.progress import SweepBoard
from gbp_ray.runtime.search import TrialQueue, space_fields, values_at
from gbp_ray.runtime.trial import Step, run_solo, run_whole
from gbp_ray.training.progress import OnProgress, Progress
from gbp_ray.workloads.code import add_import_paths

__all__ = ["RunTrial", "make_loggers", "run_sweep"]

RunTrial = Callable[[JobConfig, OnProgress, bool], Iterator[Step]]
"""Signature of `run_solo`."""

_PROGRESS_INTERVAL_S = 0.5
_LOOK_INTERVAL_S = 5.0
"""Between two counts of the cluster's machines."""


def run_sweep(
    base: JobConfig,
    queue: TrialQueue,
    import_paths: list[str],
    board: SweepBoard,
    *,
    judge: MetricSpec = ACCURACY,
    is_debug: bool = False,
    run: RunTrial = run_solo,
) -> None:
    """Runs the trials of the queue, which then has all outcomes; `run` those without workers.

    `judge` describes the metric that schedulers and the board judge by.
    """
    store = Store(base.storage, base.name)
    if not is_debug:
        # It would repeat at the end what the board has shown.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with _tidied(store), ray_session(base.cluster, is_debug), Relay(board) as relay:
        check_cluster(base, import_paths)
        board.pass_checks()
        slots = _Slots(base, queue)
        # Tune takes no request without any resource, and a byte of memory is always there.
        resources: dict[str, float] = {"CPU": 0, "memory": 1}
        if base.cluster.fits_one_process:
            resources = worker_resources(base.cluster, list_machines())
        trainable = tune.with_parameters(
            _TuneTrial,
            import_paths=import_paths,
            working_folder=os.getcwd(),  # noqa: PTH109
            mailbox=relay.mailbox,
            run=run,
        )
        with tempfile.TemporaryDirectory(prefix="gbp-ray-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                tune_config=tune.TuneConfig(
                    num_samples=-1,
                    search_alg=_QueueSearch(base, queue, slots),
                    scheduler=_make_scheduler(base, judge, queue, store),
                    reuse_actors=True,
                    trial_name_creator=_name_of,
                    trial_dirname_creator=_name_of,
                ),
                run_config=tune.RunConfig(
                    name=base.name,
                    storage_path=scratch,
                    verbose=0,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=base.sweep.max_failures),
                    callbacks=[
                        _Bookkeeper(judge, queue, store, board),
                        *make_loggers(base, store),
                    ],
                ),
            )
            try:
                fit_interruptibly(tuner)
            except (tune.TuneError, ray.exceptions.RayError) as error:
                cause = first_line(unwrap(error))
                text = f"Ray Tune stopped: {cause}; run the same command again to go on"
                raise TrialError(f"sweep: {text}", cause=cause) from error


@contextlib.contextmanager
def _tidied(store: Store) -> Iterator[None]:
    """Removes at the end the locks of trials whose processes ended with Ray."""
    try:
        yield
    finally:
        for lock in store.folder.glob("*/*/driver.lock") if store.folder is not None else ():
            place = lock.parent.relative_to(store.folder or "").as_posix()
            # Another driver may hold it.
            with contextlib.suppress(GbpError), hold_lease(store.objects, place):
                pass


class _Slots:
    """The number of trials at a time, which follows the size of the cluster."""

    def __init__(self, base: JobConfig, queue: TrialQueue) -> None:
        self._base, self._queue = base, queue
        self._is_autoscaling = is_autoscaling(base.cluster)
        self._looked = -math.inf
        self.count()

    def count(self) -> int:
        """Returns the number, for the plan, too; counts the machines every few seconds."""
        if (now := time.monotonic()) - self._looked > _LOOK_INTERVAL_S:
            self._looked = now
            most = self._base.sweep.max_concurrent
            # At least one trial waits for a machine that is lost or has yet to join.
            number = max(1, count_trials(self._base.cluster, list_machines()))
            if most is not None:
                # A cluster grows for trials that wait for room.
                number = most if self._is_autoscaling else min(number, most)
            self._queue.plan.num_slots = number
        return self._queue.plan.num_slots


class _Unsaved:
    """Keeps an object out of the files of Tune: a sweep is resumed from its store."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _QueueSearch(_Unsaved, Searcher):  # type: ignore[misc]
    """Makes Tune take its trials from a queue."""

    def __init__(self, base: JobConfig, queue: TrialQueue, slots: _Slots) -> None:
        super().__init__()
        self._queue, self._slots = queue, slots
        # One trial in waiting keeps processes busy. Tune itself starts no more than it has
        # resources for, but it does not count the CPUs of nested workers.
        is_bounded = not base.cluster.fits_one_process or base.sweep.max_concurrent is not None
        self._num_waiting = int(not is_bounded)
        self._fields = space_fields(base)
        if base.sweep.target.is_on:
            self._fields.append("prune.sparsity")

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        most = self._slots.count() + self._num_waiting
        if not self._queue.is_over and self._queue.num_running < most:
            job = self._queue.next()
            if job is not None:
                return _describe(job, self._fields) | {"is_patient": self._queue.is_deferred(job)}
        return Searcher.FINISHED if self._queue.is_over else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass  # the bookkeeper, which knows the causes, tells the queue

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def _describe(job: JobConfig, fields: Iterable[str]) -> dict[str, Any]:
    """Makes Tune's config of a trial: the job, its id, and for loggers the fields that vary."""
    found: dict[str, Any] = {"job": job.model_dump_json(), "trial": trial_id(job)}
    for field, value in values_at(job, fields).items():
        # Tune would flatten a list or a table.
        found[field] = value if isinstance(value, str | int | float | None) else json.dumps(value)
    return found


def _name_of(trial: Any) -> str:
    return str(trial.config["trial"])


class _Bookkeeper(_Unsaved, tune.Callback):  # type: ignore[misc]
    """Passes the end of each trial to the queue, the store and the board."""

    def __init__(
        self, judge: MetricSpec, queue: TrialQueue, store: Store, board: SweepBoard
    ) -> None:
        self._judge, self._queue, self._store, self._board = judge, queue, store, board

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result
        state = result.get("state", "stopped")
        if state == "busy":
            self._queue.defer(self._queue.job_of(_name_of(trial)))
            return
        self._end(trial, state, result, result.get("cause", ""))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        text = _cause_of(trial)
        result = trial.last_result or {}
        self._store.write_failure(
            FailureRecord(trial_id=_name_of(trial), cause=text, round=result.get("round"))
        )
        self._end(trial, "failed", result, text)

    def _end(self, trial: Any, state: Any, result: dict[str, Any], cause: str) -> None:
        name, specs = _name_of(trial), read_specs(result.get("metric_specs"))
        outcome = Outcome(
            trial_id=name,
            job=self._queue.job_of(name),
            state=state,
            round=result.get("round"),
            specs=specs,
            values=values_in(result, specs),
            dense=values_in(result, specs, before="dense_"),
            doubt=result.get("metric_fault", ""),
            dense_is_recalibrated=result.get("dense_is_recalibrated", False),
            cause=cause,
            seconds=result.get("spent_s", 0.0),
            # Another driver of the same sweep may have been faster.
            is_new=state != "finished" or not result.get("is_old", False),
        )
        self._queue.tell(outcome)
        # Tune would keep the last ten values of every metric for good, 30 kB a trial.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        detail, value = cause, None
        reached = f"{outcome.metric.name} {outcome.metric.write(outcome.score)}"
        if fault := outcome.find_fault(outcome.metric):
            reached = f"loss {outcome.values['loss']:.4f} ({fault})"
        if state == "finished":
            if not outcome.find_fault(self._judge):
                value = outcome.values.get(self._judge.name)
            detail = reached
        elif state == "stopped":
            detail = f"after round {outcome.round}, {reached}"
        self._board.end_trial(outcome.trial_id, state, detail, value)


def _cause_of(trial: Any) -> str:
    """Returns the last error of a trial that failed too often, in one line."""
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return "Ray Tune gave up on it"
    cause = unwrap(ray.cloudpickle.loads(Path(path).read_bytes()))
    if isinstance(cause, ray.exceptions.RayActorError):
        return "its process died; perhaps it ran out of memory, or the user's code crashed"
    if isinstance(cause, GbpError):
        return first_line(cause)
    return f"{type(cause).__name__}: {first_line(cause)}"


def _make_scheduler(
    base: JobConfig, judge: MetricSpec, queue: TrialQueue, store: Store
) -> GuardedScheduler | None:
    if base.sweep.scheduler == "fifo":
        return None

    def stopped(job: JobConfig, number: int) -> None:
        store.write_stop(
            StopRecord(trial_id=trial_id(job), round=number, scheduler=base.sweep.scheduler)
        )

    scheduler = GuardedScheduler(
        base.sweep, judge, lambda trial: queue.job_of(_name_of(trial)), stopped
    )
    for outcome in queue.outcomes.values():
        scheduler.remember(outcome.job, store.read_rounds(outcome.trial_id))
    return scheduler


class _TuneTrial(tune.Trainable):  # type: ignore[misc]
    """Runs trials one after another in one process, a round per step."""

    def setup(
        self,
        config: dict[str, Any],
        *,
        import_paths: list[str],
        working_folder: str,
        mailbox: Any,
        run: RunTrial,
    ) -> None:
        self._working_folder, self._import_paths = working_folder, import_paths
        self._mailbox, self._run = mailbox, run
        self._steps: Iterator[Step] | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        # Releases the lease of a trial that was stopped between two rounds.
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]

    def step(self) -> dict[str, Any]:
        assert self._steps is not None
        try:
            step = next(self._steps, None)
            if step is not None:
                self._last |= _as_result(self._job, step, self._last)
            if step is None or step.record.round == self._job.prune.rounds:
                # Going on after the last round commits the trial.
                next(self._steps, None)
                self._last |= {"state": "finished", "done": True}
        except BusyError:
            self._last |= {"state": "busy", "done": True}  # deferred
        except Exception as error:
            if may_pass(error):
                raise
            own = isinstance(error, GbpError)
            cause = " ".join(str(error).split()) if own else in_one_line(error)
            name, number = trial_id(self._job), self._last.get("round")
            self._store.write_failure(FailureRecord(trial_id=name, cause=cause, round=number))
            self._last |= {"state": "failed", "cause": cause, "done": True}
        return dict(self._last)

    def _begin(self, config: dict[str, Any]) -> None:
        os.chdir(self._working_folder)
        add_import_paths(self._import_paths)
        self._job = JobConfig.model_validate_json(config["job"])
        self._store = Store(self._job.storage, self._job.name)
        self._last: dict[str, Any] = {}
        self._steps = self._run_rounds(config["is_patient"])

    def _run_rounds(self, is_patient: bool) -> Iterator[Step]:
        # The machine may have joined after the others were checked.
        check_folder(self._job)
        if self._job.cluster.fits_one_process:
            return (yield from self._run(self._job, _throttle(self._mailbox), is_patient))
        yield from run_whole(
            self._job,
            self._store,
            lambda _: _run_nested(self._job, self._import_paths, self._mailbox),
            is_patient=is_patient,
        )


def _as_result(job: JobConfig, step: Step, before: dict[str, Any]) -> dict[str, Any]:
    record = step.record
    spent_s = sum(record.seconds.values()) * max(1, job.cluster.max_workers)
    # The dense network is round 0, which comes first.
    dense = {key: value for key, value in before.items() if key.startswith("dense_")}
    if not dense:
        row = name_measured(record)
        values, is_recalibrated = dense_values(row, record.specs)
        dense = {f"dense_{name}": value for name, value in values.items()}
        dense["dense_is_recalibrated"] = is_recalibrated
        dense |= {key: row[key] for key in ("metric_specs", "metric_fault") if key in row}
    return {
        "round": record.round,
        "sparsity": record.sparsity,
        **record.values,
        **dense,
        "spent_s": round(before.get("spent_s", 0.0) + spent_s, 3),
        "is_old": step.is_old,
        "done": False,
    }


def _throttle(mailbox: Any) -> OnProgress:
    last_sent = 0.0

    def send(progress: Progress) -> None:
        nonlocal last_sent
        if (now := time.monotonic()) - last_sent > _PROGRESS_INTERVAL_S:
            last_sent = now
            mailbox.put.remote(progress)

    return send


def _run_nested(job: JobConfig, import_paths: list[str], mailbox: Any) -> Iterator[RoundRecord]:
    """Runs a trial's missing rounds on workers of its own, which wait after each round."""
    gate = Mailbox.remote()  # type: ignore[attr-defined]
    ended = run_beside(lambda: fit_trial(job, import_paths, mailbox, gate))
    try:
        while not ended.done():
            wait([ended], timeout=0.2)
            for record in ray.get(gate.take.remote()):
                yield record
                ray.get(gate.allow.remote(record.round))
        failure = ended.exception() or ended.result()
        if failure is not None and not isinstance(failure, StoppedError):
            raise failure
    finally:
        # After a stop between two rounds the workers end themselves.
        ray.get(gate.end.remote())
        wait([ended])


class _EventKeeper(_Unsaved, tune.Callback):  # type: ignore[misc]
    """Stores TensorBoard's files with the results, after their writer has closed them."""

    def __init__(self, store: Store) -> None:
        self._objects = store.objects

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        folder = f"tune/{_name_of(trial)}/"
        # The new files repeat the rounds of an earlier attempt.
        old = [entry.key for entry in self._objects.entries(folder)]
        for file in Path(trial.local_path).glob("events.out.tfevents.*"):
            self._objects.put(f"{folder}{file.name}", file.read_bytes())
        self._objects.delete(old)

    on_trial_error = on_trial_complete


def make_loggers(job: JobConfig, store: Store) -> list[Any]:
    """Makes the callbacks of the sweep's loggers; mlflow and wandb are extras."""
    callbacks: list[Any] = []
    if "tensorboard" in job.sweep.loggers:
        callbacks += [TBXLoggerCallback(), _EventKeeper(store)]
    if "mlflow" in job.sweep.loggers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(MLflowLoggerCallback(experiment_name=job.name))
    if "wandb" in job.sweep.loggers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project=job.name))
    return callbacks
