"""A reader beside a job: reads all the while whatever there is to see, and checks that it is whole.

What is checked: every record carries its checksum and every file the record's; a finished trial
agrees with its rounds; a round, once seen, is not written again; the index holds whole trials and
never loses one.
"""

from __future__ import annotations

import threading
import time

from gbp_ray.results.query import open_results
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store

__all__ = ["WatchfulReader"]


class WatchfulReader:
    """Reads in a thread of its own while the block runs.

    Attributes:
        num_looks: How often it has been through everything.
        num_seen: Rounds that it has seen.
        failures: What it met that it should not have.
    """

    def __init__(self, storage: str, job: str, *, pause_s: float = 0.05) -> None:
        self._storage, self._job, self._pause_s = storage, job, pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._seen: dict[tuple[str, int], RoundRecord] = {}
        self._num_indexed = 0
        self.num_looks = 0
        self.failures: list[BaseException] = []

    @property
    def num_seen(self) -> int:
        return len(self._seen)

    def __enter__(self) -> WatchfulReader:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _read(self) -> None:
        store = Store(self._storage, self._job)
        try:
            while not self._is_over.is_set():
                self.num_looks += 1
                for trial in store.objects.list_folders("trials/"):
                    self._read_trial(store, trial)
                self._read_index(store)
                time.sleep(self._pause_s)
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            self.failures.append(error)

    def _read_trial(self, store: Store, trial: str) -> None:
        finished = store.read_trial(trial)
        rounds = store.read_rounds(trial)
        if finished is not None:
            assert list(finished.rounds) == rounds, f"{trial} and its rounds disagree"
        for record in rounds:
            before = self._seen.setdefault((trial, record.round), record)
            assert before == record, f"{trial} was computed again"
            if before is record:
                for name in record.files:
                    store.read_file(trial, record, name)

    def _read_index(self, store: Store) -> None:
        if not store.objects.exists("index.parquet"):
            return
        results = open_results(store.uri)
        ended = results.final().to_rows(["trial_id", "round"])
        assert len(results) == sum(row["round"] + 1 for row in ended), "a trial is there in part"
        assert len(ended) >= self._num_indexed, "the index has lost a trial"
        self._num_indexed = len(ended)
