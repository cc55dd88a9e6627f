"""The failure that ended a group of workers, and its description, without Ray.

A worker that dies breaks the others' connections, so several report an error at once; the one that
explains the others is told.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from gbp_ray.errors import GbpError, TransientStoreError, TrialError, WorkloadError

__all__ = [
    "KILLED",
    "Failure",
    "describe_failure",
    "describe_silence",
    "first_line",
    "is_consequence",
    "may_pass",
]

KILLED = (
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


def describe_failure(error: BaseException) -> str:
    """Describes an error that a worker raised, to follow "worker N"."""
    if is_consequence(error):
        return f"lost its connection to the others ({first_line(error)})"
    return f"failed with {type(error).__name__}: {first_line(error)}"


def describe_silence(seconds: float) -> str:
    """Describes a process that gave no sign of life for so many seconds, to follow "worker N"."""
    return (
        f"did not answer for {seconds:.0f} s (its process was stopped, or is in native code that "
        "holds the interpreter lock)"
    )


def is_consequence(error: BaseException) -> bool:
    """Recognizes an error that only reports the loss of another worker."""
    # These are torch's distributed errors; a user's own ConnectionError is none.
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))


def may_pass(error: BaseException) -> bool:
    """Recognizes an error that may not occur again.

    These are a lost connection, a file system that does not answer, a faulty device and memory that
    another process took. Other errors come from the code and would occur again.
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
        isinstance(error, MemoryError)
        or is_consequence(error)
        or (isinstance(error, RuntimeError) and bool(_OF_DEVICE.search(str(error))))
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
