"""One trial on Ray: a TorchTrainer over 1 to N workers, with Ray's noise and errors unwrapped.

The store, not Ray, holds the state of a trial: a restarted worker group goes on after the last
committed round, and so does a new driver.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from gbp_ray.config import ClusterConfig, JobConfig, trial_id
from gbp_ray.errors import ConfigError, GbpError, TrialError
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.runtime.progress import ProgressBoard, Tick
from gbp_ray.runtime.worker import work_trial
from gbp_ray.store import RoundRecord, Store
from gbp_ray.workload import add_import_paths

# Ray reads these when it is imported and when processes start, so they come before the import.
for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.train  # noqa: E402
import ray.train.torch  # noqa: E402
import torch  # noqa: E402
from ray._private import auto_init_hook  # noqa: E402

__all__ = [
    "Mailbox",
    "StoppedError",
    "first_line",
    "fit_interruptibly",
    "fit_trial",
    "ray_session",
    "relay",
    "run_trial",
    "unwrap",
]

_POLL_INTERVAL_S = 0.2
_TICK_INTERVAL_S = 0.2


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
    with ray_session(job.cluster, is_debug), relay(board) as mailbox:
        failure = fit_trial(job, import_paths, mailbox)
    if failure is not None:
        raise failure


def fit_trial(
    job: JobConfig, import_paths: list[str], mailbox: Any, gate: Any = None
) -> GbpError | None:
    """Runs the workers to their end; returns what they all agreed to fail with.

    Args:
        mailbox: Takes their progress.
        gate: A mailbox that takes each round and says when to go on with the next one.
    """
    with _scratch(job) as scratch:
        return _fit_in(scratch, job, trial_id(job), import_paths, mailbox, gate)


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
        yield store.objects.uri_of("ray")
        store.objects.delete([e.key for e in store.objects.entries(f"ray/{trial_id(job)}/")])


def _fit_in(
    scratch: str, job: JobConfig, name: str, import_paths: list[str], mailbox: Any, gate: Any
) -> GbpError | None:
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "import_paths": import_paths,
            "working_folder": os.getcwd(),  # noqa: PTH109
            "mailbox": mailbox,
            "gate": gate,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.cluster.num_workers,
            use_gpu=job.cluster.use_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if job.cluster.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(
                max_failures=job.cluster.max_failures, controller_failure_limit=3
            ),
        ),
    )
    try:
        result = fit_interruptibly(trainer)
    except ray.train.WorkerGroupError as error:
        raise _root_cause(error, job, name) from error
    except ray.train.ControllerError as error:
        raise TrialError(
            f"trial {name}: Ray could not run the workers: {first_line(error)}",
            trial_id=name,
            rank=None,
            cause=first_line(error),
        ) from error
    return result.return_value


def fit_interruptibly(trainer: Any) -> Any:
    """Runs fit() beside the main thread, which stays free to be interrupted.

    In the main thread Ray would take over the SIGINT handler for good and end the process with its
    own exit code; here Ctrl-C raises KeyboardInterrupt, and the session's end stops the workers.
    """
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            outcome.set_exception(error)

    threading.Thread(target=fit, name="gbp-ray-fit", daemon=True).start()
    try:
        return outcome.result()
    except BaseException:
        # The thread may still be at work when Ray has shut down, and Ray's functions would then
        # join whatever other Ray there is.
        if not outcome.done():
            auto_init_hook.enable_auto_connect = False
        raise


def _train_worker(config: dict[str, Any]) -> GbpError | None:
    """Runs on each Ray Train worker; returns rather than raises what all ranks agree on.

    A bad input stays bad: returning it spares the restarts that a raised error would trigger.
    """
    with contextlib.suppress(OSError):
        os.chdir(config["working_folder"])
    add_import_paths(config["import_paths"])
    job = JobConfig.model_validate(config["job"])
    device = ray.train.torch.get_device() if job.cluster.use_gpu else torch.device("cpu")
    ranks = Ranks.current(device)
    mailbox, gate = config["mailbox"], config["gate"]
    last_sent, last_phase = 0.0, ""

    def tell(tick: Tick) -> None:
        nonlocal last_sent, last_phase
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
        work_trial(job, ranks, tell=tell, round_done=round_done)
    except GbpError as error:
        return error
    return None


class StoppedError(GbpError):
    """A scheduler ended the trial between two rounds."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds what workers said until the driver fetches it, and what the driver has to say."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._last_allowed, self._is_ended = -1, False

    def put(self, message: Any) -> None:
        """Takes a message."""
        self._messages.append(message)

    def take(self) -> list[Any]:
        """Hands over what has come since the last time."""
        messages, self._messages = self._messages, []
        return messages

    def allow(self, number: int) -> None:
        """Lets workers go on after a round and those before it."""
        self._last_allowed = number

    def end(self) -> None:
        """Lets workers go on after no other round."""
        self._is_ended = True

    def verdict(self, number: int) -> bool | None:
        """Says whether to go on after a round; None while that is open."""
        return True if number <= self._last_allowed else False if self._is_ended else None


@contextlib.contextmanager
def relay(board: ProgressBoard) -> Iterator[Any]:
    """Carries the workers' messages to the board while the block runs."""
    mailbox = Mailbox.remote()  # type: ignore[attr-defined]
    is_over = threading.Event()

    def deliver() -> None:
        for message in ray.get(mailbox.take.remote(), timeout=30):
            if isinstance(message, Tick):
                board.show(message)
            else:
                board.show_round(*message)

    def poll() -> None:
        while not is_over.wait(_POLL_INTERVAL_S):
            # Progress is a courtesy: losing it must not lose the trial.
            with contextlib.suppress(ray.exceptions.RayError):
                deliver()

    thread = threading.Thread(target=poll, name="gbp-ray-progress", daemon=True)
    thread.start()
    try:
        yield mailbox
        is_over.set()
        thread.join(timeout=5)
        with contextlib.suppress(ray.exceptions.RayError):
            deliver()
    finally:
        is_over.set()
        thread.join(timeout=5)


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig, is_debug: bool) -> Iterator[None]:
    """Joins the cluster named by the job or starts a private one; ends what it started."""
    if ray.is_initialized():
        yield
        return
    if cluster.use_gpu and cluster.address is None and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu = true: this machine has no CUDA device; set it to false or give "
            "cluster.address"
        )
    options: dict[str, Any] = {"address": cluster.address or "local"}
    if cluster.address is None:
        # Workers that wait for each other must all be placed, even on fewer cores.
        cores = os.cpu_count() or 1
        options |= {"num_cpus": max(cores, cluster.num_workers + 1), "include_dashboard": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        _start_ray(cluster, options, is_debug)
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler aborts the process and leaves its workers behind.
            signal.signal(signal.SIGTERM, on_terminate)
        yield
    finally:
        ray.shutdown()


def _start_ray(cluster: ClusterConfig, options: dict[str, Any], is_debug: bool) -> None:
    try:
        ray.init(
            log_to_driver=is_debug,
            logging_level="INFO" if is_debug else "ERROR",
            configure_logging=is_debug,
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = cluster.address or "unset, a private one on this machine"
        raise ConfigError(
            f"cluster.address = {where}: Ray did not start or answer: {first_line(error)}"
        ) from error


def _root_cause(error: ray.train.WorkerGroupError, job: JobConfig, name: str) -> GbpError:
    """Picks the failure that explains the others: ours first, lost connections last."""
    failures: Mapping[int, BaseException] = error.worker_failures
    unwrapped = {rank: unwrap(failure) for rank, failure in sorted(failures.items())}
    for failure in unwrapped.values():
        if isinstance(failure, GbpError):
            return failure
    rank, cause = min(unwrapped.items(), key=lambda item: (_is_consequence(item[1]), item[0]))
    text = f"{type(cause).__name__}: {first_line(cause)}"
    return TrialError(
        f"trial {name}: worker {rank} failed more than cluster.max_failures = "
        f"{job.cluster.max_failures} times, the last time with {text}; run the job again to go on "
        "after its last whole round",
        trial_id=name,
        rank=rank,
        cause=text,
    )


def unwrap(error: BaseException) -> BaseException:
    """Finds the error that Ray's own wrap."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _is_consequence(error: BaseException) -> bool:
    text = str(error).lower()
    return "connection" in text or "gloo" in text or "nccl" in text


def first_line(error: BaseException) -> str:
    """Takes the first line of an error's text, or its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
