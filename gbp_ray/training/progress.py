"""Progress: one value and one kind of callback, from a single step up to the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the terminal needs no torch
    from gbp_ray.distributed.ranks import Ranks

__all__ = [
    "OnProgress",
    "Progress",
    "deal_batches",
    "ignore_progress",
    "with_changes",
]


@dataclass(frozen=True)
class Progress:
    """The state of one phase of the work.

    Attributes:
        phase: Name of the phase, such as "pretrain", "score" or "evaluate".
        done: Steps or batches done, of `total`.
        loss: Of the last step, in training.
        round: Number of the round, filled in by whoever runs rounds; 0 is the dense network.
        trial: Filled in by whoever runs trials, like `num_rounds` and `share`.
        share: Part of the trial that is done, in [0, 1].
    """

    phase: str
    done: int
    total: int
    loss: float | None = None
    round: int = 0
    trial: str = ""
    num_rounds: int = 0
    share: float = 0.0


OnProgress = Callable[[Progress], None]
"""Takes the progress of one rank after each step or batch."""


def ignore_progress(progress: Progress) -> None:
    """Does nothing."""


def with_changes(on_progress: OnProgress, **changes: Any) -> OnProgress:
    """Returns a callback that passes progress on with some attributes replaced."""
    return lambda progress: on_progress(replace(progress, **changes))


def deal_batches(
    ranks: Ranks, num_batches: int, phase: str, on_progress: OnProgress
) -> Iterator[int | None]:
    """Yields this rank's batch of each turn, None where it has none; reports after each turn."""
    for turn, item in enumerate(ranks.deal(num_batches)):
        yield item
        on_progress(Progress(phase, min((turn + 1) * ranks.world_size, num_batches), num_batches))
