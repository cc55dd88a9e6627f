"""Who stands still, and who is to blame for it; what is excused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gbp_ray.results.store
import gbp_ray.workloads.loading
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.runtime.hang import Standstill, Watch, is_to_blame
from gbp_ray.training.progress import Progress

LAST = Progress("finetune", 12, 40, 0.5, round=2)


def standing(rank: int, num_exchanges: int) -> Standstill:
    return Standstill(rank, num_exchanges, 60.0, LAST, "data.py:7 in fetch")


def test_who_entered_the_fewest_exchanges_is_to_blame() -> None:
    told = [standing(0, 8), standing(1, 7), standing(2, 8)]
    assert [is_to_blame(own, told, 3) for own in told] == [False, True, False]


def test_nobody_is_to_blame_before_all_have_spoken() -> None:
    told = [standing(0, 8), standing(2, 8)]
    assert not any(is_to_blame(own, told, 3) for own in told), "worker 1 is frozen, or excused"
    assert not is_to_blame(standing(0, 8), [], 1), "the others cannot be heard"


def test_all_are_to_blame_who_wait_at_the_same_place() -> None:
    told = [standing(0, 8), standing(1, 8)]
    assert all(is_to_blame(own, told, 2) for own in told)


def test_a_standstill_says_how_long_after_what_and_where() -> None:
    assert standing(1, 7).in_words() == (
        "made no progress for 60 s after finetune 12/40 of round 2, at data.py:7 in fetch"
    )
    assert "before its first step" in Standstill(0, 1, 5.0, None, "x").in_words()


def watched(
    work: Callable[[Watch], None], limit_s: float = 0.5
) -> tuple[list[Standstill], threading.Event]:
    """Does `work` under a watch; returns whom it accused, and whether it would have ended it."""
    accused: list[Standstill] = []
    has_left = threading.Event()
    with Watch(
        Ranks(), limit_s, lambda own: [own], accuse=accused.append, leave=has_left.set
    ) as watch:
        work(watch)
    return accused, has_left


def test_a_worker_that_stands_still_is_ended_and_told_where() -> None:
    def work(watch: Watch) -> None:
        watch.note(LAST)
        time.sleep(2.0)

    accused, has_left = watched(work)
    assert has_left.is_set()
    (found,) = accused
    assert (found.rank, found.progress) == (0, LAST)
    assert 0.5 <= found.seconds < 2.0
    assert found.where.startswith("test_hang.py:")
    assert found.where.endswith("in work")


def test_the_place_is_in_the_users_code_though_a_library_waits() -> None:
    def work(watch: Watch) -> None:
        threading.Event().wait(2.0)

    (found,) = watched(work)[0]
    assert found.where.endswith("in work")


def test_a_slow_worker_that_finishes_steps_is_left_alone() -> None:
    def work(watch: Watch) -> None:
        for _ in range(10):
            time.sleep(0.2)
            watch.note(LAST)

    accused, has_left = watched(work, limit_s=1.5)
    assert accused == []
    assert not has_left.is_set()


def test_zero_watches_nothing_and_the_end_ends_the_watch() -> None:
    # Threads of others may end meanwhile.
    before = set(threading.enumerate())
    accused, _ = watched(lambda watch: time.sleep(0.2), limit_s=0.0)
    assert accused == []
    watched(lambda watch: None, limit_s=0.5)
    time.sleep(0.5)
    assert set(threading.enumerate()) <= before


def test_building_and_storing_may_take_their_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(2.0)
        raise StopIteration

    monkeypatch.setattr("gbp_ray.workloads.loading.import_attribute", slow)
    monkeypatch.setattr("gbp_ray.results.folder.FolderObjects.put", slow)
    monkeypatch.setattr("gbp_ray.results.folder.FolderObjects.put_new", slow)

    def build(watch: Watch) -> None:
        with pytest.raises(StopIteration):
            gbp_ray.workloads.loading.load_workload(
                gbp_ray.workloads.loading.WorkloadConfig(factory="a:b")
            )

    def store(watch: Watch) -> None:
        target = gbp_ray.results.store.Store(str(tmp_path), "try")
        with pytest.raises(StopIteration):
            target.objects.put("a", b"")  # not by way of the store: nothing excuses it
        with pytest.raises(StopIteration):
            target.write_round("t", Record(), {"a": b""})  # type: ignore[arg-type]

    assert watched(build)[0] == []
    assert len(watched(store)[0]) == 1


class Record:
    """As much of a round's record as comes before its files."""

    round = 0


# -- among processes -------------------------------------------------------------------------------


def _hang(rank: int, size: int, folder: Path, told: Any, way: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )

    def compare(own: Standstill) -> list[Standstill]:
        told[rank] = own
        return list(told.values())

    numbers = torch.ones(1)
    with Watch(Ranks.current(), 1.0, compare, accuse=pipe.send) as watch:
        for step in range(1000):
            watch.note(Progress("score", step + 1, 1000, round=1))
            if step == 5 and rank == 1:
                _stand_still(way)
            dist.all_reduce(numbers)
            if step == 8:
                break


def _stand_still(way: str) -> None:
    if way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while way == "busy":
        pass
    time.sleep(10_000 if way == "asleep" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["busy", "asleep"])
def test_the_one_that_the_others_wait_for_ends_itself(tmp_path: Path, way: str) -> None:
    codes, accused, told = _run_three(tmp_path, way)
    assert told == {0, 1, 2}
    assert codes[1] == 1, "the hung process did not end"
    assert [found.rank for found in accused] == [1]
    assert "after score 6/1000 of round 1, at test_hang.py:" in accused[0].in_words()
    assert 0 not in codes


@pytest.mark.slow
def test_a_stopped_process_is_not_blamed_on_the_others(tmp_path: Path) -> None:
    codes, accused, told = _run_three(tmp_path, "stopped")
    assert told == {0, 2}
    assert accused == []
    assert codes == [None, None, None], "they wait for Ray to end the frozen one"


def _run_three(folder: Path, way: str) -> tuple[list[int | None], list[Standstill], set[int]]:
    """Runs until all have ended, or the two that can have told of a standstill for a while."""
    context = multiprocessing.get_context("forkserver")
    inbox, outbox = context.Pipe(duplex=False)
    with context.Manager() as manager:
        told = manager.dict()
        processes = [
            context.Process(target=_hang, args=(r, 3, folder, told, way, outbox), daemon=True)
            for r in range(3)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and any(p.is_alive() for p in processes):
            time.sleep(0.1)
            if way == "stopped" and len(told) == 2:
                time.sleep(2.0)
                break
        codes = [process.exitcode for process in processes]
        ranks = set(told.keys())
        for process in processes:
            process.kill()
            process.join()
    accused = []
    while inbox.poll():
        accused.append(inbox.recv())
    return codes, accused, ranks
