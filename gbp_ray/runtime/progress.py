"""Live progress on the terminal: one bar per trial, one line per finished round.

On a terminal a bar shows trial, round, phase, step, loss and time left; elsewhere plain lines come
at the start of each phase and at most every few seconds. All of it goes to standard error.

A sweep shows how many trials are done, running and failed, the time left and the best so far, above
a bar per running trial; elsewhere a line per trial that has ended and, where none does for a
minute, one on those that run.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.errors import printable
from gbp_ray.results.records import RoundRecord
from gbp_ray.runtime.bootstrap import SUBMITTED
from gbp_ray.training.progress import Progress

__all__ = ["CHECKED", "ProgressBoard", "Screen", "SweepBoard"]

CHECKED = "all checks passed"
"""Message of a submitted job's driver after its checks; the submitting process waits for it."""

_PLAIN_INTERVAL_S = 10.0
_SWEEP_INTERVAL_S = 60.0
_MOST_NAMED = 4  # trials in such a line


class ProgressBoard:
    """Shows the progress of one trial; a context manager, silent with `is_quiet`."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._console = Screen(stderr=True, quiet=is_quiet, highlight=False)
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._is_live = is_live and not is_quiet
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=24),
            bars.TextColumn("{task.percentage:>3.0f}%"),
            bars.TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, bars.TaskID] = {}
        self._started: dict[str, tuple[float, float]] = {}
        self._last_line: dict[str, tuple[tuple[str, int], float]] = {}

    def __enter__(self) -> Self:
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
        """Prints a line."""
        self._console.print(text, soft_wrap=True)

    def pass_checks(self) -> None:
        """Prints `CHECKED` in a submitted job, whose work begins."""
        if SUBMITTED in os.environ:
            self.note(CHECKED)

    def show(self, progress: Progress) -> None:
        """Moves the trial's bar, or prints a plain line where there is no terminal."""
        trial, number, share = progress.trial, progress.round, progress.share
        now = time.monotonic()
        start, first = self._started.setdefault(trial, (now, share))
        left = ""
        # The first steps say nothing about the pace of the whole.
        if share - first > 0.02 and now - start > 2:
            left = f", {_clock((now - start) * (1 - share) / (share - first))} left"
        loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
        detail = f"{progress.phase} {progress.done}/{progress.total}{loss}{left}"
        title = f"{trial}  round {number}/{progress.num_rounds}"
        if self._is_live:
            if trial not in self._tasks:
                self._tasks[trial] = self._bars.add_task(title, total=1.0, detail="")
            task = self._tasks[trial]
            self._bars.update(task, completed=share, description=title, detail=detail)
            return
        place = (progress.phase, number)
        last, when = self._last_line.get(trial, (("", -1), 0.0))
        if place != last or now - when > _PLAIN_INTERVAL_S:
            self._last_line[trial] = (place, now)
            self.note(f"{title}  {detail}")

    def show_round(self, trial: str, record: RoundRecord) -> None:
        """Prints the result of a finished round."""
        metric = record.metric
        if record.round == 0:
            dense = record.reference
            is_telling = not metric.find_fault([dense.score])
            reached = f"{metric.name} {dense.text}" if is_telling else f"loss {dense.loss:.4f}"
            self.note(f"{trial}  dense  {reached}{_attacked(record)}")
            if record.metric_fault:
                self.note(f"{trial}  {record.metric_fault}")
            return
        # Where accuracy is 0, such as where nothing measures it, the loss says more.
        pruned, reached = "", f"loss {record.loss:.4f}"
        if not metric.find_fault([record.score]):
            reached = f"{metric.name} {metric.write(record.score)}"
            # Without fine-tuning both are one measurement.
            is_tuned = record.train_loss is not None or record.score_pruned != record.score
            if record.score_pruned is not None and is_tuned:
                pruned = f"  ({metric.write(record.score_pruned)} before fine-tuning)"
        left = f"sparsity {record.sparsity:.4f}" if record.cost.units is None else record.reached
        self.note(f"{trial}  round {record.round}  {left}  {reached}{pruned}{_attacked(record)}")


def _attacked(record: RoundRecord) -> str:
    robust = record.robust_accuracy
    return "" if robust is None else f"  {robust:.2%} under attack"


class SweepBoard(ProgressBoard):
    """Shows the progress of a sweep."""

    def __init__(self, is_quiet: bool = False) -> None:
        super().__init__(is_quiet)
        self._judge = ACCURACY
        self._total: int | None = None
        self._num_known, self._ended = 0, Counter[str]()
        self._begun = time.monotonic()
        self._best: tuple[float, str] | None = None
        self._summary: bars.TaskID | None = None
        self._running: dict[str, Progress] = {}
        self._last_note_s = self._begun

    def begin(
        self,
        total: int | None,
        known: Iterable[tuple[str, float | None]],
        judge: MetricSpec = ACCURACY,
    ) -> None:
        """Starts the clock.

        Args:
            total: Number of trials, or None where it is not known yet.
            known: (trial, metric) of those that are finished already.
            judge: The metric, which decides on the best trial.
        """
        self._judge = judge
        self._total, self._begun = total, time.monotonic()
        self._last_note_s = self._begun
        for trial, value in known:
            self._num_known += 1
            self._rank(trial, value)
        if self._is_live:
            self._summary = self._bars.add_task("", total=1.0, detail="")
        self._refresh()

    def show(self, progress: Progress) -> None:
        """Moves the trial's bar; elsewhere prints now and then which trials run."""
        self._running[progress.trial] = progress
        if self._is_live:
            super().show(progress)
            self._refresh()
        elif time.monotonic() - self._last_note_s > _SWEEP_INTERVAL_S:
            self._note_running()

    def show_round(self, trial: str, record: RoundRecord) -> None:
        """Prints nothing: a sweep has too many rounds."""

    def end_trial(self, trial: str, state: str, detail: str, value: float | None = None) -> None:
        """Prints how a trial ended.

        Args:
            state: finished, stopped or failed.
            detail: Its result, or the reason of the failure.
            value: The metric of a finished one.
        """
        self._running.pop(trial, None)
        self._last_note_s = time.monotonic()
        self._ended[state] += 1
        self._rank(trial, value)
        self.note(f"{self._count()}  {trial}  {state}  {detail}{self._left()}")
        if self._is_live and (task := self._tasks.pop(trial, None)) is not None:
            self._bars.remove_task(task)
        self._refresh()

    def _note_running(self) -> None:
        self._last_note_s = time.monotonic()
        named = [
            f"{progress.trial}  round {progress.round}/{progress.num_rounds} ({progress.share:.0%})"
            for progress in list(self._running.values())[:_MOST_NAMED]
        ]
        more = len(self._running) - len(named)
        listed = ", ".join(named) + (f" and {more} more" if more else "")
        self.note(f"{self._count()}  {len(self._running)} running: {listed}{self._left()}")

    def _rank(self, trial: str, value: float | None) -> None:
        if value is None:
            return
        rank = self._judge.rank
        if self._best is None or rank(value) > rank(self._best[0]):
            self._best = (value, trial)

    @property
    def _num_ended(self) -> int:
        return self._num_known + self._ended.total()

    def _count(self) -> str:
        return f"{self._num_ended}/{'?' if self._total is None else self._total}"

    def _left(self) -> str:
        num_now = self._ended.total()
        # The first trials pay for the start.
        if self._total is None or num_now < 2 or self._num_ended >= self._total:
            return ""
        pace = (time.monotonic() - self._begun) / num_now
        return f", {_clock(pace * (self._total - self._num_ended))} left"

    def _refresh(self) -> None:
        if self._summary is None:
            return
        parts = [f"{self._num_known + self._ended['finished']} done", f"{len(self._tasks)} running"]
        parts += [f"{self._ended['stopped']} stopped"] if self._ended["stopped"] else []
        parts += [f"{self._ended['failed']} failed"]
        best = ""
        if self._best is not None:
            value, trial = self._best
            best = f", best {self._judge.write(value)} by {trial}"
        self._bars.update(
            self._summary,
            completed=self._num_ended / self._total if self._total else 0.0,
            description=f"sweep {self._count()}: {', '.join(parts)}",
            detail=f"{self._left().removeprefix(', ')}{best}",
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Screen(Console):
    """A terminal that shows text without markup and control sequences."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Converts the text of a line, a cell or a heading."""
        return super().render_str(printable(text), **options)
