"""Workers of one trial as processes of this machine, without Ray and by the rules of its workers.

Each worker is a new process, which works on the trial as one on Ray does. They meet in a file of a
folder that no other user may enter, and exchange over the loopback interface. Each shares a
connection with the driver: it sends progress, its end, and signs of life; it ends when the driver
does. When a worker dies, hangs or freezes, the driver kills the others and starts all of them
again after the last committed round, `cluster.max_failures` times.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import torch
import torch.distributed as dist

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.distributed.ranks import Ranks, check_devices
from gbp_ray.errors import GbpError, TrialError
from gbp_ray.runtime.failures import KILLED, Failure, describe_failure, describe_silence, first_line
from gbp_ray.runtime.hang import Standstill, is_to_blame
from gbp_ray.runtime.progress import ProgressBoard
from gbp_ray.runtime.signals import WORDS, descendants, kill
from gbp_ray.runtime.worker import (
    AGAIN,
    EXCHANGE_TIMEOUT_S,
    Account,
    as_lasting,
    name_loopback,
    refuse_restart,
    run_worker,
)

__all__ = ["main", "run_local_trial"]

_LOOK_INTERVAL_S = 0.5
_LONGEST_SILENCE_S = 5.0
"""Between two signs of life of a worker."""

_START_S = 300.0
"""Added to the limit until a worker's first sign of life: a busy machine imports for minutes."""

_END_S = 5.0
"""Longest wait for workers to exit by themselves."""

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from gbp_ray.runtime.local_workers import main; main(int(sys.argv[1]))"
)
"""Not the caller's own script: a script without a main guard would run again in each worker."""


@dataclass(frozen=True)
class _Setup:
    """What a worker is told first: the job as plain values, and where the ranks meet."""

    job: dict[str, Any]
    meeting: str
    rank: int
    world_size: int


@dataclass(frozen=True)
class _End:
    """What a worker sends last: the error that all ranks agree on, if any."""

    error: GbpError | None


def run_local_trial(job: JobConfig, board: ProgressBoard, *, is_debug: bool = False) -> None:
    """Runs a trial's missing rounds on workers of this machine, which import from `sys.path`.

    Raises:
        ConfigError: There are fewer GPUs than workers.
        GbpError: As a worker raised it.
        TrialError: The workers failed for another reason; names trial, rank and root cause.
    """
    if job.cluster.use_gpu:
        check_devices(job.cluster)
    board.pass_checks()
    name, account = trial_id(job), Account(board, job.cluster)
    num_failures = 0
    while True:
        with _start_group(job, is_debug) as group:
            end = group.attend(account)
        if not isinstance(end, Failure):
            break
        num_failures += 1
        if num_failures > job.cluster.max_failures:
            if end.cause is not None:
                raise end.cause
            raise refuse_restart(job, *account.describe(end), is_preemption=False)
        account.show((name, end))
    if (refusal := as_lasting(job, end)) is not None:
        raise refusal


# -- the driver ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _start_group(job: JobConfig, is_debug: bool) -> Iterator[_Group]:
    """Starts all workers; no process of them is left after the block."""
    group, num_workers = _Group(job.cluster.hang_timeout_s), job.cluster.max_workers
    with tempfile.TemporaryDirectory(prefix="gbp-ray-") as folder:
        try:
            for rank in range(num_workers):
                tree, meeting = job.model_dump(mode="json"), f"file://{folder}/meeting"
                group.start(_Setup(tree, meeting, rank, num_workers), is_debug)
            yield group
        finally:
            group.end()


class _Group:
    """The processes of a trial and their connections, by rank."""

    def __init__(self, hang_timeout_s: float) -> None:
        self._limit_s = hang_timeout_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._heard_s: list[float] = []
        self._standstills: dict[int, Standstill] = {}
        self._num_ended = 0

    def start(self, setup: _Setup, is_debug: bool) -> None:
        """Starts the next worker; raises a TrialError if the system does not."""
        ours, theirs = Pipe()
        self._connections.append(ours)
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *map(str, sys.path)]
        defaults = {"OMP_NUM_THREADS": str(setup.job["cluster"]["threads_per_worker"])}
        if is_debug:
            # A worker is ended before it would write what it has printed last.
            defaults["PYTHONUNBUFFERED"] = "1"
        # As on Ray, --debug shows what they print; standard output is the result's.
        output = 2 if is_debug else subprocess.DEVNULL
        try:
            with theirs:
                process = subprocess.Popen(
                    command,
                    env=defaults | dict(os.environ) | name_loopback(),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
        except OSError as error:
            cause = f"worker {setup.rank} of {setup.world_size} did not start: {first_line(error)}"
            text = f"{cause}; lower cluster.num_workers or free some memory, and {AGAIN}"
            raise TrialError(text, rank=setup.rank, cause=cause) from error
        self._processes.append(process)
        self._heard_s.append(time.monotonic() + _START_S)
        # One that has died already is found when its connection is read.
        with contextlib.suppress(OSError):
            ours.send(setup)

    def attend(self, account: Account) -> GbpError | Failure | None:
        """Shows messages until all have ended, or one has failed for all."""
        looked_s = time.monotonic()
        while self._num_ended < len(self._processes):
            ready = wait(self._connections, timeout=_LOOK_INTERVAL_S)
            now_s = time.monotonic()
            if now_s - looked_s > _LOOK_INTERVAL_S + self._limit_s / 2:
                # This process was stopped, perhaps together with its workers.
                self._heard_s = [max(heard_s, now_s) for heard_s in self._heard_s]
            looked_s = now_s
            for rank, connection in enumerate(self._connections):
                if connection in ready:
                    try:
                        message = connection.recv()
                    except (EOFError, OSError):
                        return Failure(rank, self._describe_end(rank))
                    self._heard_s[rank] = now_s
                    end = self._take(message, account)
                    if end is not None:
                        return end
                elif self._processes[rank].poll() is not None and not connection.poll():
                    # A child of its own may still hold its end of the connection.
                    return Failure(rank, self._describe_end(rank))
                silence_s = now_s - self._heard_s[rank]
                if 0 < self._limit_s < silence_s:
                    return Failure(rank, describe_silence(silence_s))
        return None

    def _describe_end(self, rank: int) -> str:
        """Words the end of a worker that has not told of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._processes[rank].wait(_LOOK_INTERVAL_S)
            if code > 0:
                return f"ended with exit code {code} before it could tell why; see --debug"
        return KILLED

    def _take(self, message: Any, account: Account) -> GbpError | Failure | None:
        if isinstance(message, Failure):
            return message
        if isinstance(message, _End):
            self._num_ended += 1
            return message.error
        if isinstance(message, Standstill):
            self._standstills[message.rank] = message
            known = list(self._standstills.values())
            if not is_to_blame(message, known, len(self._processes)):
                return None
            account.show(message)
            return Failure(message.rank, message.in_words())
        if message is not None:
            account.show(message)
        return None

    def end(self) -> None:
        """Ends all processes and what they started: by themselves if the trial has ended."""
        # Those that end by themselves leave what they started behind.
        below = descendants({process.pid for process in self._processes})
        if self._num_ended == len(self._processes):
            for connection in self._connections:
                connection.close()
            deadline_s = time.monotonic() + _END_S
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline_s - time.monotonic()))
        alive = [process for process in self._processes if process.poll() is None]
        below |= descendants({process.pid for process in alive})
        for process in alive:
            process.kill()
        kill(below)
        for process in alive:
            process.wait()
        for connection in self._connections:
            connection.close()


# -- a worker --------------------------------------------------------------------------------------


def main(handle: int) -> None:
    """Runs the worker whose connection has this file handle; returns when the driver ends it."""
    _pass_over_signals()
    if sys.platform == "linux":
        # A process that is stopped does not notice that its connection closes.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    link = _Link(Connection(handle))
    try:
        link.send(_End(_work(link.setup, link)))
    except BaseException as error:  # noqa: BLE001 - told by the driver
        traceback.print_exception(error)
        cause = error if isinstance(error, GbpError) else None
        link.send(Failure(link.setup.rank, describe_failure(error), cause))
    # The others may still read what this one has sent.
    threading.Event().wait()


def _pass_over_signals() -> None:
    """Leaves what a terminal or a supervisor sends to the driver, which ends its workers."""
    before = {code - 128: signal.signal(code - 128, lambda number, frame: None) for code in WORDS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    # A pool of processes that a user's code has started is ended by such a signal: a program that
    # is executed forgets handlers, and a forked one is told to.
    os.register_at_fork(after_in_child=restore)


class _Link:
    """A worker's end of its connection; a thread beside the work gives signs of life."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        try:
            self.setup: _Setup = connection.recv()
        except (EOFError, OSError):
            os._exit(1)
        limit_s: float = self.setup.job["cluster"]["hang_timeout_s"]
        self._interval_s = min(_LONGEST_SILENCE_S, limit_s / 4 or _LONGEST_SILENCE_S)
        self.send(None)
        threading.Thread(target=self._live, name="gbp-ray-link", daemon=True).start()

    def send(self, message: Any) -> None:
        """Sends a message to the driver; ends this process if there is none."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            os._exit(1)

    def _live(self) -> None:
        # The driver sends nothing more: what can be read is the end of the connection.
        while not self._connection.poll(self._interval_s):
            self.send(None)
        os._exit(0)


def _work(setup: _Setup, link: _Link) -> GbpError | None:
    job = JobConfig.model_validate(setup.job)
    device = torch.device("cpu")
    if job.cluster.use_gpu:
        device = torch.device("cuda", setup.rank)
        # Weights that a workload draws on the GPU follow the seed only once CUDA is initialised.
        torch.cuda.init()
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if job.cluster.use_gpu else "gloo",
        init_method=setup.meeting,
        rank=setup.rank,
        world_size=setup.world_size,
        timeout=timedelta(seconds=EXCHANGE_TIMEOUT_S),
    )

    def report(own: Standstill) -> list[Standstill]:
        link.send(own)
        return []  # The driver compares them, and ends who is to blame.

    return run_worker(
        job,
        Ranks.current(device),
        put=link.send,
        compare=report,
        accuse=link.send,
        keep_error=lambda error: link.send(_End(error)),
    )
