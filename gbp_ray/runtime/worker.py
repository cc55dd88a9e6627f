"""One worker of a trial, and its driver's account of it, whether Ray or this package starts it."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import GbpError, TrialError, WorkloadError
from gbp_ray.results.records import RoundRecord
from gbp_ray.runtime.failures import Failure, is_consequence, may_pass
from gbp_ray.runtime.hang import Standstill, Watch
from gbp_ray.runtime.progress import ProgressBoard
from gbp_ray.training.progress import Progress

__all__ = [
    "AGAIN",
    "EXCHANGE_TIMEOUT_S",
    "Account",
    "Message",
    "as_lasting",
    "name_loopback",
    "refuse_restart",
    "run_worker",
]

AGAIN = "run the job again to go on after its last whole round"

EXCHANGE_TIMEOUT_S = 4 * 3600
"""Longest wait for a worker that builds the workload; `hang` notices a hung one."""

_PROGRESS_INTERVAL_S = 0.2
_GRACE_S = 5.0
"""Delay before a worker reports that it lost the others: the driver first sees which one died."""

Message = Progress | Standstill | tuple[str, RoundRecord | Failure]
"""What a driver is told; of a trial by its name: a whole round, or a failure that is survived."""


def run_worker(
    job: JobConfig,
    ranks: Ranks,
    *,
    put: Callable[[Message], None],
    compare: Callable[[Standstill], list[Standstill]],
    accuse: Callable[[Standstill], None],
    keep_error: Callable[[GbpError], Any],
    round_done: Callable[[RoundRecord], None] = lambda record: None,
    is_passing: Callable[[BaseException], bool] = may_pass,
) -> GbpError | None:
    """Runs a trial on one worker; returns an error that all ranks agree on.

    It raises only what may not occur again: the driver then starts the workers again.

    Args:
        put: Sends a message to the driver; called on rank 0.
        compare: As for `Watch`, like `accuse`.
        keep_error: Takes an error that would occur again and that the other ranks do not know of.
        round_done: Called on every rank after each committed round.
        is_passing: Recognizes what may not occur again.
    """
    # Imported here, since Ray's controller loads this module, too: it saves a second there.
    from gbp_ray.runtime.trial import work_trial

    watch = Watch(ranks, job.cluster.hang_timeout_s, compare=compare, accuse=accuse)
    last_sent, last_phase = 0.0, ""

    def send(progress: Progress) -> None:
        nonlocal last_sent, last_phase
        watch.note(progress)
        now = time.monotonic()
        is_due = now - last_sent > _PROGRESS_INTERVAL_S or progress.phase != last_phase
        if ranks.is_first and is_due:
            last_sent, last_phase = now, progress.phase
            put(progress)

    def end_round(record: RoundRecord) -> None:
        if ranks.is_first:
            put((trial_id(job), record))
        round_done(record)

    try:
        with watch:
            work_trial(job, ranks, on_progress=send, round_done=end_round)
    except Exception as error:
        if isinstance(error, GbpError) and not ranks.has_left:
            if isinstance(error, WorkloadError) and is_passing(error):
                raise  # such as one caused by a lost connection
            return error
        if is_consequence(error):
            time.sleep(_GRACE_S)
        if is_passing(error):
            raise
        # Shown with --debug.
        traceback.print_exception(error)
        agreed = ranks.in_words(error)
        if not ranks.has_left:
            return agreed
        assert agreed is not None
        keep_error(agreed)
        raise
    return None


def name_loopback() -> dict[str, str]:
    """Returns the environment by which workers exchange over this machine's loopback interface."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name) or loopback for name in names}


def refuse_restart(job: JobConfig, rank: int, words: str, is_preemption: bool) -> TrialError:
    """Returns the error of a trial whose workers are not started again, after a failure."""
    name, cluster = trial_id(job), job.cluster
    limit = f"max_failures = {cluster.max_failures}"
    if is_preemption:
        limit = f"max_preemptions = {cluster.max_preemptions}"
    text = f"worker {rank} {words}; cluster.{limit} allows no more restarts; {AGAIN}"
    return TrialError(f"trial {name}: {text}", trial_id=name, rank=rank, cause=words)


def as_lasting(job: JobConfig, agreed: GbpError | None) -> GbpError | None:
    """Words the error that all workers ended with; one of this package's input stays as it is."""
    if not isinstance(agreed, TrialError):
        return agreed
    name = trial_id(job)
    return TrialError(
        f"trial {name}: worker {agreed.rank} failed with {agreed.cause}; it would fail again, "
        f"so the workers were not started again; correct the cause and {AGAIN}",
        trial_id=name,
        rank=agreed.rank,
        cause=agreed.cause,
        is_lasting=True,
    )


class Account:
    """Shows workers' messages on the board, and counts their restarts.

    Restarts are shown only if `cluster`, with their limits, is given.
    """

    def __init__(self, board: ProgressBoard, cluster: ClusterConfig | None = None) -> None:
        self._board, self._cluster = board, cluster
        self._last_progress: Progress | None = None
        self._accused: Standstill | None = None
        self._num_restarts: Counter[str] = Counter()

    def show(self, message: Message) -> None:
        """Shows a message."""
        if isinstance(message, Progress):
            self._last_progress = message
            self._board.show(message)
        elif isinstance(message, Standstill):
            self._accused = message
        else:
            name, content = message
            if isinstance(content, RoundRecord):
                self._board.show_round(name, content)
            else:
                self._note_restart(name, content)

    def describe(self, failure: Failure) -> tuple[int, str]:
        """Describes a failure with the workers' last messages: (rank, words)."""
        if self._accused is not None:
            return self._accused.rank, self._accused.in_words()
        place = ""
        if self._last_progress is not None:
            place = f" in {self._last_progress.phase} of round {self._last_progress.round}"
        return failure.rank, f"{failure.words}{place}"

    def _note_restart(self, name: str, failure: Failure) -> None:
        if self._cluster is None:
            return
        field = "max_preemptions" if failure.is_preemption else "max_failures"
        self._num_restarts[field] += 1
        number, most = self._num_restarts[field], getattr(self._cluster, field)
        if most is not None and number > most:
            return
        rank, words = self.describe(failure)
        count = f"{number} of cluster.{field} = {'any number' if most is None else most}"
        self._board.note(f"{name}  worker {rank} {words}; starting the workers again ({count})")
        self._accused = self._last_progress = None
