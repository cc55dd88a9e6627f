"""Notices that a worker stands still, and which of them is to blame: one thread beside the work.

Progress is a finished step or batch (a tick) or an exchange entered with the other workers. Ranks
work in lock step, so that one that hangs makes all stand still: each that does tells the others how
many exchanges it has entered, and whoever entered the fewest is the one the others wait for. It
ends its own process, which Ray answers by starting the workers again.

Building the workload and reading or writing storage are excused, however long they take: the first
may download data, the second has deadlines of its own. A frozen process (stopped, or in native code
that holds the interpreter) cannot run this thread; it tells nothing, which clears the others, and
Ray's health check ends it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.runtime.progress import Tick

__all__ = [
    "Standstill",
    "Watch",
    "is_to_blame",
]

_LONGEST_INTERVAL_S = 5.0

_EXCUSED = {
    ("gbp_ray.workloads.loading", "load_workload"),
    ("gbp_ray.workloads.loading", "build_network"),
    ("gbp_ray.results.store", None),
}
"""(module, function or None for all) under which a worker may be silent."""


@dataclass(frozen=True)
class Standstill:
    """What a worker that stands still says of itself.

    Attributes:
        num_exchanges: With the other workers, entered so far.
        tick: The last thing it finished, if anything.
        where: The line of code it is at.
    """

    rank: int
    num_exchanges: int
    seconds: float
    tick: Tick | None
    where: str

    def in_words(self) -> str:
        """Says what, for how long, in which phase and where, without the rank."""
        after = "before its first step"
        if self.tick is not None:
            tick = self.tick
            after = f"after {tick.phase} {tick.done}/{tick.total} of round {tick.round}"
        return f"made no progress for {self.seconds:.0f} s {after}, at {self.where}"


def is_to_blame(own: Standstill, told: list[Standstill], world_size: int) -> bool:
    """Decides whether the others wait for this worker; not before all have said where they are."""
    if len({other.rank for other in told}) < world_size:
        return False
    return own.num_exchanges == min(other.num_exchanges for other in told)


class Watch:
    """Watches the thread that enters the block.

    Args:
        limit_s: Longest time without progress; 0 watches nothing.
        compare: Tells the other workers, and returns what each, this one too, told last.
        accuse: Given the standstill before the process ends.
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
        self._last_tick: Tick | None = None
        self._num_ticks = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gbp-ray-watch", daemon=True)

    def note(self, tick: Tick) -> None:
        """Takes note of a finished step."""
        self._last_tick = tick
        self._num_ticks += 1

    def __enter__(self) -> Watch:
        self._watched = threading.get_ident()
        if self._limit_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()

    def _run(self) -> None:
        seen = (self._num_ticks, _num_exchanges())
        looked = since = time.monotonic()
        while not self._is_over.wait(self._interval_s):
            now, found = time.monotonic(), (self._num_ticks, _num_exchanges())
            frame = sys._current_frames().get(self._watched)
            # Whoever was stopped and goes on starts counting anew.
            has_slept = now - looked > self._interval_s + self._limit_s / 2
            looked = now
            if found != seen or has_slept or _is_excused(frame):
                seen, since = found, now
            elif now - since >= self._limit_s:
                own = Standstill(
                    self._ranks.rank, found[1], now - since, self._last_tick, _where(frame)
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
    """Names the innermost line outside of libraries: theirs say little."""
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
