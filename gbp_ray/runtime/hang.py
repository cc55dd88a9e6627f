"""Detection of a worker that hangs, by a thread beside the work of each.

Progress is a finished step or an entered collective. Ranks work in lock step, so one that hangs
stops all: each compares its number of collectives with the others, and the rank with the fewest is
the one that they wait for. It is ended, and the workers are started again.

Building the workload, which may download data, and accessing the storage, which has deadlines of
its own, may take any time. A frozen process (stopped, or in native code that holds the interpreter
lock) cannot run this thread and reports nothing, so no other rank is blamed; Ray's health check, or
the driver of local workers, ends it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.training.progress import Progress

__all__ = ["Standstill", "Watch", "is_to_blame"]

_LONGEST_INTERVAL_S = 5.0

_EXCUSED = {
    ("gbp_ray.workloads.loading", "load_workload"),
    ("gbp_ray.workloads.loading", "build_network"),
    ("gbp_ray.results.store", None),
}
"""Callers, as (module, function or None for all), under which a worker may stand still."""


@dataclass(frozen=True)
class Standstill:
    """The report of a worker that stands still: `num_exchanges` counts its collectives.

    Attributes:
        progress: Its last one, if any.
        where: The line of code that it is at.
    """

    rank: int
    num_exchanges: int
    seconds: float
    progress: Progress | None
    where: str

    def in_words(self) -> str:
        """Describes it by duration, phase and line of code, without the rank."""
        after = "before its first step"
        if (last := self.progress) is not None:
            after = f"after {last.phase} {last.done}/{last.total} of round {last.round}"
        return f"made no progress for {self.seconds:.0f} s {after}, at {self.where}"


def is_to_blame(own: Standstill, reports: list[Standstill], world_size: int) -> bool:
    """Decides if the others wait for this worker; False until all ranks have reported."""
    if len({other.rank for other in reports}) < world_size:
        return False
    return own.num_exchanges == min(other.num_exchanges for other in reports)


class Watch:
    """Watches the thread that enters the block.

    Args:
        limit_s: Longest time without progress; 0 for no watch.
        compare: Reports to the other workers and returns the last report of every one.
        accuse: Called with the standstill before the process ends.
        leave: Ends the process.
    """

    def __init__(
        self,
        ranks: Ranks,
        limit_s: float,
        compare: Callable[[Standstill], list[Standstill]],
        accuse: Callable[[Standstill], None],
        leave: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self._ranks, self._limit_s = ranks, limit_s
        self._compare, self._accuse, self._leave = compare, accuse, leave
        self._interval_s = min(_LONGEST_INTERVAL_S, limit_s / 10)
        self._last_progress: Progress | None = None
        self._num_noted = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gbp-ray-watch", daemon=True)

    def note(self, progress: Progress) -> None:
        """Notes progress."""
        self._last_progress = progress
        self._num_noted += 1

    def __enter__(self) -> Watch:
        self._watched = threading.get_ident()
        if self._limit_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()

    def _run(self) -> None:
        seen = (self._num_noted, _num_exchanges())
        looked = since = time.monotonic()
        while not self._is_over.wait(self._interval_s):
            now, found = time.monotonic(), (self._num_noted, _num_exchanges())
            frame = sys._current_frames().get(self._watched)
            # A process that was stopped and goes on counts from zero.
            has_slept = now - looked > self._interval_s + self._limit_s / 2
            looked = now
            if found != seen or has_slept or _is_excused(frame):
                seen, since = found, now
            elif now - since >= self._limit_s:
                own = Standstill(
                    self._ranks.rank, found[1], now - since, self._last_progress, _where(frame)
                )
                if is_to_blame(own, self._compare(own), self._ranks.world_size):
                    self._accuse(own)
                    self._leave()
                    return


def _num_exchanges() -> int:
    if not dist.is_initialized():
        return 0
    group = dist.distributed_c10d._get_default_group()
    number: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return number


def _is_excused(frame: FrameType | None) -> bool:
    while frame is not None:
        module, function = frame.f_globals.get("__name__"), frame.f_code.co_name
        if (module, function) in _EXCUSED or (module, None) in _EXCUSED:
            return True
        frame = frame.f_back
    return False


def _where(frame: FrameType | None) -> str:
    """Names the innermost line of code outside libraries."""
    libraries = tuple(
        {str(Path(os.__file__).parent), "<frozen", str(Path(dist.__file__).parents[2])}
    )
    innermost = frame
    while frame is not None and frame.f_code.co_filename.startswith(libraries):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "an unknown place"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
