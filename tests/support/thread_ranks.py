"""Ranks as threads of one process: what they tell each other goes through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gbp_ray.distributed.ranks import Ranks

Result = TypeVar("Result")

_PATIENCE_S = 30.0


class Meeting:
    """Where the threads of one world hand over what they have."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=_PATIENCE_S)
        self._slots: list[Any] = [None] * world_size

    def swap(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self.barrier.wait()
        values = list(self._slots)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """One thread's place; notes the order and the size of what it took part in."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    calls: list[tuple[str, int]] = field(default_factory=list)

    def all_reduce_counts(self, counts: Tensor) -> Tensor:
        self.calls.append(("all_reduce_counts", counts.numel()))
        total = torch.stack(self.meeting.swap(self.rank, counts.clone())).sum(dim=0)
        return counts.copy_(total)

    def all_gather_objects(self, value: Result) -> list[Result]:
        self.calls.append(("all_gather_objects", 0))
        return self.meeting.swap(self.rank, value)

    def all_gather_vectors(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        self.calls.append(("all_gather_vectors", max(sizes)))
        vectors = self.meeting.swap(self.rank, vector)
        assert [len(other) for other in vectors] == list(sizes)
        return vectors


def on_threads(world_size: int, program: Callable[[ThreadRanks], Result]) -> list[Result]:
    """Runs the program on every rank; returns the results, rank 0 first.

    All ranks must have called the same collectives in the same order.
    """
    meeting = Meeting(world_size)
    ranks = [ThreadRanks(rank, world_size, meeting=meeting) for rank in range(world_size)]
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = program(ranks[rank])
        except Exception as error:  # noqa: BLE001 - told by name
            failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [e for e in failures if not isinstance(e, threading.BrokenBarrierError)]
    for failure in told or failures:
        raise failure
    assert all(other.calls == ranks[0].calls for other in ranks)
    return results
