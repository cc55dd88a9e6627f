"""Live progress from the workers to the terminal: one bar per trial, one line per finished round.

On a terminal a bar shows trial, round, phase, step, loss and time left; elsewhere plain lines come
at the start of each phase and at most every few seconds, fit for a log. All of it goes to standard
error: standard output belongs to results.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from gbp_ray.store import RoundRecord

__all__ = ["ProgressBoard", "Tick"]

_PLAIN_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Tick:
    """How far one trial is.

    Attributes:
        done: Steps done of the phase, of `total`.
        share: Of the whole trial, in [0, 1].
    """

    trial: str
    round: int
    num_rounds: int
    phase: str
    done: int
    total: int
    loss: float | None
    share: float


class ProgressBoard:
    """Shows ticks as they come; use it as a context manager.

    Args:
        is_quiet: Show nothing at all.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=is_quiet, highlight=False)
        self._is_live = self._console.is_terminal and not is_quiet
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, float]] = {}
        self._last_line: dict[str, tuple[str, int, float]] = {}

    def __enter__(self) -> ProgressBoard:
        if self._is_live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_live:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Says one line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, tick: Tick) -> None:
        """Moves the trial's bar, or prints a plain line where there is no terminal."""
        now = time.monotonic()
        start, share = self._started.setdefault(tick.trial, (now, tick.share))
        left = ""
        # The first steps say nothing about the pace of the whole.
        if tick.share - share > 0.02 and now - start > 2:
            left = f", {_clock((now - start) * (1 - tick.share) / (tick.share - share))} left"
        loss = "" if tick.loss is None else f", loss {tick.loss:.4f}"
        detail = f"{tick.phase} {tick.done}/{tick.total}{loss}{left}"
        title = f"{tick.trial}  round {tick.round}/{tick.num_rounds}"
        if self._is_live:
            if tick.trial not in self._tasks:
                self._tasks[tick.trial] = self._bars.add_task(title, total=1.0, detail="")
            self._bars.update(
                self._tasks[tick.trial], completed=tick.share, description=title, detail=detail
            )
            return
        phase, number, when = self._last_line.get(tick.trial, ("", -1, 0.0))
        if (phase, number) != (tick.phase, tick.round) or now - when > _PLAIN_INTERVAL_S:
            self._last_line[tick.trial] = (tick.phase, tick.round, now)
            self.note(f"{title}  {detail}")

    def show_round(self, trial: str, record: RoundRecord) -> None:
        """Says what a finished round reached."""
        if record.round == 0:
            self.note(f"{trial}  dense  accuracy {record.accuracy:.2%}")
            return
        pruned = ""
        if record.accuracy_pruned is not None:
            pruned = f"  ({record.accuracy_pruned:.2%} before fine-tuning)"
        self.note(
            f"{trial}  round {record.round}  sparsity {record.sparsity:.4f}  "
            f"accuracy {record.accuracy:.2%}{pruned}"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
