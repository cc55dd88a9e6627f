"""A sweep on Ray Tune: one Tune trial per trial, as many at a time as the cluster holds.

The store, not Tune, holds the state. What has ended is known from its records and never started;
what was broken off goes on after its last whole round, because that is what running it again does.
So resuming a sweep is running it again, and Tune's own files are scratch. A trial that another
driver is at work on is put off until nothing else is left.

A trial of 0 or 1 workers runs in the process of its Tune trial, which is used again for the next
one, so that torch is imported once per process. More workers are a TorchTrainer inside the Tune
trial. The Tune trial itself then asks for no CPU, and no more of them run at a time than the
cluster has CPUs for their workers, so none waits for another one's. Workers pause after each round
until the scheduler has judged it; a stopped trial ends by itself, and Ray frees what it held.

A fault of the job or of the user's code ends a trial at once. What may pass (a killed process, a
storage that does not answer) is tried again `sweep.max_failures` times, and then is a row with its
cause.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.config.sweep import parse_space
from gbp_ray.errors import BusyError, GbpError, TrialError, in_one_line
from gbp_ray.results.lease import hold_lease
from gbp_ray.results.records import FailureRecord, RoundRecord, StopRecord, write_share
from gbp_ray.results.store import Store
from gbp_ray.runtime.on_ray.failures import first_line, may_pass, unwrap
from gbp_ray.runtime.on_ray.machines import (
    check_cluster,
    check_folder,
    is_autoscaling,
    list_machines,
)
from gbp_ray.runtime.on_ray.mailbox import Mailbox, Relay
from gbp_ray.runtime.on_ray.schedulers import GuardedScheduler
from gbp_ray.runtime.on_ray.session import fit_interruptibly, ray_session
from gbp_ray.runtime.on_ray.train import StoppedError, fit_trial
from gbp_ray.runtime.placement import count_trials, worker_resources
from gbp_ray.runtime.progress import SweepBoard, Tick
from gbp_ray.runtime.search import Outcome, TrialQueue
from gbp_ray.runtime.trial import Step, run_solo, run_whole
from gbp_ray.workloads.loading import add_import_paths

__all__ = [
    "RunTrial",
    "make_loggers",
    "run_sweep",
]

RunTrial = Callable[[JobConfig, Callable[[Tick], None], bool], Iterator[Step]]
"""Runs a trial of at most one worker in this process, a round at a time, and commits it; says
whether to wait where another driver is at work on it."""

_TICK_INTERVAL_S = 0.5
_LOOK_INTERVAL_S = 5.0
"""Between two looks at how many machines there are."""


def run_sweep(
    base: JobConfig,
    feeder: TrialQueue,
    import_paths: list[str],
    board: SweepBoard,
    *,
    is_debug: bool = False,
    run: RunTrial = run_solo,
) -> None:
    """Runs what the feeder gives until it is over; the feeder then has all outcomes.

    Args:
        base: The job with its sweep.
        import_paths: Folders where workers find the user's modules.
        is_debug: Lets Ray's own output through.
        run: What a trial of at most one worker does.

    Raises:
        GbpError: Ray did not start, or stopped working.
    """
    store = Store(base.storage, base.name)
    if not is_debug:
        # It repeats at the end what the board has said when it happened.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with _tidied(store), ray_session(base.cluster, is_debug), Relay(board) as relay:
        check_cluster(base, import_paths)
        board.pass_checks()
        slots = _Slots(base, feeder)
        scheduler = None
        if base.sweep.scheduler != "fifo":
            scheduler = _make_scheduler(base, feeder, store)
        trainable = tune.with_parameters(
            _TuneTrial,
            import_paths=import_paths,
            working_folder=os.getcwd(),  # noqa: PTH109
            mailbox=relay.mailbox,
            run=run,
        )
        with tempfile.TemporaryDirectory(prefix="gbp-ray-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(trainable, _resources(base)),
                tune_config=tune.TuneConfig(
                    num_samples=-1,
                    search_alg=_FeederSearch(base, feeder, slots),
                    scheduler=scheduler,
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
                        _Bookkeeper(base, feeder, store, board),
                        *make_loggers(base, store),
                    ],
                ),
            )
            try:
                fit_interruptibly(tuner)
            except (tune.TuneError, ray.exceptions.RayError) as error:
                raise TrialError(
                    f"sweep: Ray Tune stopped: {first_line(unwrap(error))}; run the same command "
                    "again to go on",
                    trial_id="",
                    rank=None,
                    cause=first_line(unwrap(error)),
                ) from error


@contextlib.contextmanager
def _tidied(store: Store) -> Iterator[None]:
    """Removes in the end the locks of trials whose processes were ended with Ray."""
    try:
        yield
    finally:
        for lock in store.folder.glob("*/*/driver.lock") if store.folder is not None else ():
            place = lock.parent.relative_to(store.folder or "").as_posix()
            # Others may be at work there.
            with contextlib.suppress(GbpError), hold_lease(store.objects, place):
                pass


class _Slots:
    """How many trials run at a time: as many as the cluster holds, which may change meanwhile."""

    def __init__(self, base: JobConfig, feeder: TrialQueue) -> None:
        self._base, self._feeder = base, feeder
        self._is_autoscaling = is_autoscaling(base.cluster)
        self._looked = -math.inf
        self.count()

    def count(self) -> int:
        """Counts them, and lets the plan know."""
        if (now := time.monotonic()) - self._looked > _LOOK_INTERVAL_S:
            self._looked = now
            most = self._base.sweep.max_concurrent
            # A machine that is lost or has yet to come leaves room for one to wait.
            number = max(1, count_trials(self._base.cluster, list_machines()))
            if most is not None:
                # What has no room yet is what makes a cluster grow.
                number = most if self._is_autoscaling else min(number, most)
            self._feeder.plan.num_slots = number
        return self._feeder.plan.num_slots


def _is_nested(base: JobConfig) -> bool:
    return not base.cluster.fits_one_process


def _resources(base: JobConfig) -> dict[str, float]:
    if _is_nested(base):
        # Tune takes no request without any resource, and a byte of memory is always there.
        return {"CPU": 0, "memory": 1}
    return worker_resources(base.cluster, list_machines())


# -- what Tune asks the driver ---------------------------------------------------------------------


class _Unsaved:
    """Stays out of what Tune saves of itself: a sweep is resumed from its store."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _FeederSearch(_Unsaved, Searcher):  # type: ignore[misc]
    """Lets Tune take its trials from a feeder."""

    def __init__(self, base: JobConfig, feeder: TrialQueue, slots: _Slots) -> None:
        super().__init__()
        self._feeder, self._slots = feeder, slots
        # One more that waits for a process saves the process from waiting for it, as Tune starts no
        # more than it has resources for. Of the CPUs of nested workers it knows nothing.
        is_bounded = _is_nested(base) or base.sweep.max_concurrent is not None
        self._num_waiting = int(not is_bounded)
        self._fields = [field for axis in parse_space(base.sweep.space) for field in axis.fields]
        if base.sweep.target.max_drop is not None:
            self._fields.append("prune.sparsity")

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        most = self._slots.count() + self._num_waiting
        if not self._feeder.is_over and self._feeder.num_running < most:
            job = self._feeder.next()
            if job is not None:
                return _describe(job, self._fields) | {"is_patient": self._feeder.is_deferred(job)}
        return Searcher.FINISHED if self._feeder.is_over else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        # The bookkeeper, which knows the causes, tells the feeder.
        pass

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def _describe(job: JobConfig, fields: Iterable[str]) -> dict[str, Any]:
    """Makes what Tune knows of a trial: the whole, its name, and by itself what varies."""
    found: dict[str, Any] = {"job": job.model_dump_json(), "trial": trial_id(job)}
    tree = job.model_dump(mode="json")
    for field in fields:
        value: Any = tree
        for part in field.split("."):
            value = value[part]
        # For loggers; as text where it is a list or a table, which Tune would take apart.
        found[field] = value if isinstance(value, str | int | float | None) else json.dumps(value)
    return found


def _name_of(trial: Any) -> str:
    return str(trial.config["trial"])


class _Bookkeeper(_Unsaved, tune.Callback):  # type: ignore[misc]
    """Takes note of how each trial ended."""

    def __init__(
        self, base: JobConfig, feeder: TrialQueue, store: Store, board: SweepBoard
    ) -> None:
        self._base, self._feeder, self._store, self._board = base, feeder, store, board

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result
        state = result.get("state", "stopped")
        if state == "busy":
            self._feeder.defer(self._feeder.job_of(_name_of(trial)))
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
        name = _name_of(trial)
        outcome = Outcome(
            trial_id=name,
            job=self._feeder.job_of(name),
            state=state,
            round=result.get("round"),
            accuracy=result.get("accuracy"),
            loss=result.get("loss"),
            dense_accuracy=result.get("dense_accuracy"),
            dense_is_recalibrated=result.get("dense_is_recalibrated", False),
            cause=cause,
            seconds=result.get("spent_s", 0.0),
            # Another driver of the same sweep may have been faster.
            is_new=state != "finished" or not result.get("is_old", False),
        )
        self._feeder.tell(outcome)
        # Of every number that a trial has reported Tune keeps the last ten, for good: thirty
        # kilobytes for each trial, and nobody asks again.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        detail, value = cause, None
        reached = f"accuracy {write_share(outcome.accuracy)}"
        if fault := outcome.accuracy_fault:
            reached = f"loss {outcome.loss:.4f} ({fault})"
        if state == "finished":
            if not fault or self._base.sweep.metric == "loss":
                value = getattr(outcome, self._base.sweep.metric)
            detail = reached
        elif state == "stopped":
            detail = f"after round {outcome.round}, {reached}"
        self._board.end_trial(outcome.trial_id, state, detail, value)


def _cause_of(trial: Any) -> str:
    """Says in one line what a trial that broke too often met the last time."""
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return "Ray Tune gave up on it"
    cause = unwrap(ray.cloudpickle.loads(Path(path).read_bytes()))
    if isinstance(cause, ray.exceptions.RayActorError):
        return "its process died; perhaps it ran out of memory, or the user's code crashed"
    if isinstance(cause, GbpError):
        return first_line(cause)
    return f"{type(cause).__name__}: {first_line(cause)}"


def _make_scheduler(base: JobConfig, feeder: TrialQueue, store: Store) -> GuardedScheduler:
    def stopped(job: JobConfig, number: int) -> None:
        store.write_stop(
            StopRecord(trial_id=trial_id(job), round=number, scheduler=base.sweep.scheduler)
        )

    scheduler = GuardedScheduler(base.sweep, lambda trial: feeder.job_of(_name_of(trial)), stopped)
    for outcome in feeder.outcomes.values():
        scheduler.remember(outcome.job, store.read_rounds(outcome.trial_id))
    return scheduler


# -- what a Tune trial does ------------------------------------------------------------------------


class _TuneTrial(tune.Trainable):  # type: ignore[misc]
    """One trial after another in one process, a round per step."""

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
        # Gives the lease back where the trial was stopped between two rounds.
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
            # Others come first; it is given out again when none is left, to be waited for.
            self._last |= {"state": "busy", "done": True}
        except Exception as error:
            if may_pass(error):
                raise
            own = isinstance(error, GbpError)
            cause = " ".join(str(error).split()) if own else in_one_line(error)
            self._store.write_failure(
                FailureRecord(
                    trial_id=trial_id(self._job), cause=cause, round=self._last.get("round")
                )
            )
            self._last |= {"state": "failed", "cause": cause, "done": True}
        return dict(self._last)

    def _begin(self, config: dict[str, Any]) -> None:
        os.chdir(self._working_folder)
        add_import_paths(self._import_paths)
        self._job = JobConfig.model_validate_json(config["job"])
        self._store = Store(self._job.storage, self._job.name)
        self._last: dict[str, Any] = {}
        is_patient = config["is_patient"]
        if _is_nested(self._job):
            steps = run_whole(
                self._job,
                self._store,
                lambda: _run_nested(self._job, self._import_paths, self._mailbox),
                is_patient=is_patient,
            )
        else:
            steps = self._run(self._job, _throttle(self._mailbox), is_patient)
        self._steps = _run_checked(self._job, steps)


def _run_checked(job: JobConfig, steps: Iterator[Step]) -> Iterator[Step]:
    # On a machine that has joined since the others were asked.
    check_folder(job)
    yield from steps


def _as_result(job: JobConfig, step: Step, before: dict[str, Any]) -> dict[str, Any]:
    record = step.record
    spent_s = sum(record.seconds.values()) * max(1, job.cluster.max_workers)
    # The dense network's is the first result of a trial.
    dense = record.reference
    return {
        "round": record.round,
        "sparsity": record.sparsity,
        "accuracy": record.accuracy,
        "loss": record.loss,
        "dense_accuracy": before.get("dense_accuracy", dense.accuracy),
        "dense_is_recalibrated": before.get("dense_is_recalibrated", dense.is_recalibrated),
        "spent_s": round(before.get("spent_s", 0.0) + spent_s, 3),
        "is_old": step.is_old,
        "done": False,
    }


def _throttle(mailbox: Any) -> Callable[[Tick], None]:
    last_sent = 0.0

    def tell(tick: Tick) -> None:
        nonlocal last_sent
        if (now := time.monotonic()) - last_sent > _TICK_INTERVAL_S:
            last_sent = now
            mailbox.put.remote(tick)

    return tell


def _run_nested(job: JobConfig, import_paths: list[str], mailbox: Any) -> Iterator[RoundRecord]:
    """Runs a trial's missing rounds on workers of its own, which wait after each round."""
    gate = Mailbox.remote()  # type: ignore[attr-defined]
    ended: queue.Queue[GbpError | BaseException | None] = queue.Queue()

    def fit() -> None:
        try:
            ended.put(fit_trial(job, import_paths, mailbox, gate))
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            ended.put(error)

    thread = threading.Thread(target=fit, name="gbp-ray-fit", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(timeout=0.2)
            for record in ray.get(gate.take.remote()):
                yield record
                ray.get(gate.allow.remote(record.round))
        failure = ended.get()
        if failure is not None and not isinstance(failure, StoppedError):
            raise failure
    finally:
        # Stopped between two rounds: the workers hear it and leave.
        ray.get(gate.end.remote())
        thread.join()


def make_loggers(job: JobConfig, store: Store) -> list[Any]:
    """Makes the callbacks that Tune is to tell."""
    # Each is imported where it is asked for: the last two are extras.
    callbacks: list[Any] = []
    if "tensorboard" in job.sweep.loggers:
        from ray.tune import Callback
        from ray.tune.logger import TBXLoggerCallback

        class KeepEvents(Callback):  # type: ignore[misc]
            """Puts TensorBoard's files where the results are; comes after the one that closes."""

            def __getstate__(self) -> dict[str, Any]:
                return {}

            def on_trial_complete(
                self, iteration: int, trials: Any, trial: Any, **info: Any
            ) -> None:
                name = trial_id(JobConfig.model_validate_json(trial.config["job"]))
                files = list(Path(trial.local_path).glob("events.out.tfevents.*"))
                # An earlier attempt was told from the start again.
                old = [entry.key for entry in store.objects.entries(f"tune/{name}/")]
                for file in files:
                    store.objects.put(f"tune/{name}/{file.name}", file.read_bytes())
                store.objects.delete(old)

            on_trial_error = on_trial_complete

        callbacks += [TBXLoggerCallback(), KeepEvents()]
    if "mlflow" in job.sweep.loggers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(MLflowLoggerCallback(experiment_name=job.name))
    if "wandb" in job.sweep.loggers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project=job.name))
    return callbacks
