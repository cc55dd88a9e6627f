"""The failure that ended a group of workers, and its description.

A worker that dies breaks the others' connections, and Ray reports the error that it receives first.
`find_failure` picks the one that explains the others.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from gbp_ray.errors import GbpError, TransientStoreError, TrialError, WorkloadError

__all__ = ["Failure", "find_failure", "first_line", "is_consequence", "may_pass", "unwrap"]

_KILLED = (
    "was killed, perhaps for memory (its process ended without a word: SIGKILL, the system's "
    "out-of-memory killer, or a crash in native code)"
)

_LOST_CONNECTION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset) by peer|broken pipe|process group|socket",
    re.IGNORECASE,
)

_LASTING = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.EBADF, errno.ENODEV, errno.ENXIO),
}

_OF_DEVICE = re.compile(r"CUDA (driver )?error|cuDNN|cuBLAS|ECC|device-side", re.IGNORECASE)
_SILENT = re.compile(r"health check has been hanging for ([\d.]+)")


@dataclass(frozen=True)
class Failure:
    """The failure that explains a group's end.

    `words` continue "worker N"; `cause` is an error of this package. `is_preemption` marks a
    machine that was taken away with notice, which Ray counts separately.
    """

    rank: int
    words: str
    cause: GbpError | None = None
    is_preemption: bool = False


def find_failure(failures: Mapping[int, BaseException]) -> Failure:
    """Picks the failure that explains the others: ours first, lost connections last."""
    unwrapped = {rank: unwrap(error) for rank, error in failures.items()}
    rank, error = min(unwrapped.items(), key=lambda item: (_order(item[1]), item[0]))
    return Failure(
        rank,
        _in_words(error),
        error if isinstance(error, GbpError) else None,
        # Ray counts a preemption if any worker of the group had one.
        any(map(_is_preemption, unwrapped.values())),
    )


def unwrap(error: BaseException) -> BaseException:
    """Returns the error inside Ray's wrappers."""
    while True:
        # Not __cause__: an error that a user raises from another one says more than that.
        inner = (
            getattr(error, "health_check_failure", None)
            or getattr(error, "controller_failure", None)
            or (isinstance(error, ray.exceptions.RayTaskError) and error.cause)
        )
        if not isinstance(inner, BaseException):
            return error
        error = inner


def is_consequence(error: BaseException) -> bool:
    """Recognizes an error that only reports the loss of another worker."""
    # These are torch's distributed errors; a user's own ConnectionError is none.
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))


def may_pass(error: BaseException) -> bool:
    """Recognizes an error that may not occur again.

    These are a lost worker or connection, a file system that does not answer, a faulty device and
    memory that another process took. Other errors come from the code and would occur again.
    """
    if isinstance(error, TrialError):
        return not error.is_lasting
    if isinstance(error, WorkloadError) and isinstance(error.__cause__, OSError):
        return may_pass(error.__cause__)
    if isinstance(error, GbpError):
        return isinstance(error, TransientStoreError)
    if isinstance(error, OSError):
        # Libraries raise it without a number for unusable contents.
        return isinstance(error, (ConnectionError, TimeoutError)) or (
            error.errno is not None and error.errno not in _LASTING
        )
    return (
        isinstance(error, (MemoryError, ray.exceptions.RayError))
        or is_consequence(error)
        or (isinstance(error, RuntimeError) and bool(_OF_DEVICE.search(str(error))))
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def _is_preemption(error: BaseException) -> bool:
    return isinstance(error, ray.exceptions.RayActorError) and error.preempted


def _order(error: BaseException) -> int:
    if isinstance(error, GbpError) or _is_preemption(error):
        return 0
    return 2 if is_consequence(error) else 1


def _in_words(error: BaseException) -> str:
    text = str(error)
    if silent := _SILENT.search(text):
        return (
            f"did not answer for {float(silent[1]):.0f} s (its process was stopped, or is in "
            "native code that holds the interpreter lock)"
        )
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "low on memory" in text:
        return "was killed by Ray, because its machine ran out of memory"
    if _is_preemption(error):
        return "was lost together with its machine, which was taken away with notice"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        # Ray does not know the reason yet and no longer waits for it.
        return "is out of reach, perhaps lost together with its machine"
    if isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)):
        is_node = "node" in text.lower() and re.search(r"node (has )?(died|was terminated)", text)
        return "was lost together with its machine" if is_node else _KILLED
    if is_consequence(error):
        return f"lost its connection to the others ({first_line(error)})"
    return f"failed with {type(error).__name__}: {first_line(error)}"
