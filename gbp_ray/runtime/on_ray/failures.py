"""The failure that ended a group of Ray's workers; `runtime.failures` with Ray's own errors.

Ray reports the error that it receives first; `find_failure` picks the one that explains the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import ray

from gbp_ray.errors import GbpError
from gbp_ray.runtime import failures
from gbp_ray.runtime.failures import (
    KILLED,
    Failure,
    describe_failure,
    describe_silence,
    is_consequence,
)

__all__ = ["find_failure", "may_pass", "unwrap"]

_SILENT = re.compile(r"health check has been hanging for ([\d.]+)")


def find_failure(errors: Mapping[int, BaseException]) -> Failure:
    """Picks the failure that explains the others: ours first, lost connections last."""
    unwrapped = {rank: unwrap(error) for rank, error in errors.items()}
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


def may_pass(error: BaseException) -> bool:
    """Recognizes an error that may not occur again, Ray's own (a lost worker) among them."""
    if isinstance(error, ray.exceptions.RayError) and not isinstance(error, (GbpError, OSError)):
        return True
    return failures.may_pass(error)


def _is_preemption(error: BaseException) -> bool:
    return isinstance(error, ray.exceptions.RayActorError) and error.preempted


def _order(error: BaseException) -> int:
    if isinstance(error, GbpError) or _is_preemption(error):
        return 0
    return 2 if is_consequence(error) else 1


def _in_words(error: BaseException) -> str:
    text = str(error)
    if silent := _SILENT.search(text):
        return describe_silence(float(silent[1]))
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "low on memory" in text:
        return "was killed by Ray, because its machine ran out of memory"
    if _is_preemption(error):
        return "was lost together with its machine, which was taken away with notice"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        # Ray does not know the reason yet and no longer waits for it.
        return "is out of reach, perhaps lost together with its machine"
    if isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)):
        is_node = "node" in text.lower() and re.search(r"node (has )?(died|was terminated)", text)
        return "was lost together with its machine" if is_node else KILLED
    return describe_failure(error)
