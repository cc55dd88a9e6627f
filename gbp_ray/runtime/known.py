"""What a sweep finds done: finished trials from the index, in two requests, and stops on record."""

from __future__ import annotations

from typing import Any

from gbp_ray.config import JobConfig, SweepConfig, trial_id
from gbp_ray.errors import ConfigError
from gbp_ray.index import read_index
from gbp_ray.records import DenseReference
from gbp_ray.runtime.optuna_plan import job_at
from gbp_ray.runtime.plans import Outcome
from gbp_ray.space import parse_space
from gbp_ray.store import Store

__all__ = ["Known"]


class Known:
    """Finds how a job's trials ended before.

    Args:
        sweep: Without a scheduler nothing is weak, and what one has stopped goes on.
    """

    def __init__(self, store: Store, sweep: SweepConfig) -> None:
        table, _ = read_index(store.objects)
        phases = [name for name in table.column_names if name.startswith("seconds.")]
        measured = ["accuracy", "loss", "accuracy_recalibrated", "loss_recalibrated"]
        columns = ["trial_id", "round", "is_final", *measured, *phases]
        self._table = table
        # Folders are listed, too, since results may have been removed by hand.
        self._there = set(store.objects.list_folders("trials/"))
        self._rounds: dict[str, list[dict[str, Any]]] = {}
        for row in table.select(columns).to_pylist():
            self._rounds.setdefault(row["trial_id"], []).append(row)
        stops = [] if sweep.scheduler == "fifo" else store.list_unfinished("stopped.json")
        self._stops = {name: store.read_stop(name) for name in stops}
        self._store = store

    def __call__(self, job: JobConfig) -> Outcome | None:
        """Says how a trial ended; None where it did not, or failed."""
        name = trial_id(job)
        if name not in self._there:
            return None
        if (rows := self._rounds.get(name)) is not None:
            spent_s = sum(
                v or 0 for row in rows for k, v in row.items() if k.startswith("seconds.")
            )
            return self._outcome(job, "finished", rows[0], rows[-1], spent_s)
        if (stop := self._stops.get(name)) is not None:
            records = self._store.read_rounds(name)
            rows = [record.model_dump() for record in records[: stop.round + 1]]
            spent_s = sum(sum(record.seconds.values()) for record in records)
            return self._outcome(job, "stopped", rows[0], rows[-1], spent_s)
        return None

    def find_in(self, base: JobConfig) -> list[JobConfig]:
        """Lists the finished trials that lie in the space of a sweep."""
        fields = [field for axis in parse_space(base.sweep.space) for field in axis.fields]
        if not set(fields) <= set(self._table.column_names):
            return []
        found = []
        columns = list(dict.fromkeys(["trial_id", "is_final", *fields]))
        for row in self._table.select(columns).to_pylist():
            if row["is_final"]:
                try:
                    job = job_at(base, {field: row[field] for field in fields})
                except ConfigError:
                    continue
                # The id covers all that is not in the space.
                if trial_id(job) == row["trial_id"]:
                    found.append(job)
        return found

    def _outcome(
        self,
        job: JobConfig,
        state: Any,
        dense: dict[str, Any],
        last: dict[str, Any],
        spent_s: float,
    ) -> Outcome:
        reference = DenseReference.of(
            dense["accuracy"],
            dense["loss"],
            dense["accuracy_recalibrated"],
            dense["loss_recalibrated"],
        )
        return Outcome(
            trial_id=trial_id(job),
            job=job,
            state=state,
            round=last["round"],
            accuracy=last["accuracy"],
            loss=last["loss"],
            dense_accuracy=reference.accuracy,
            dense_is_recalibrated=reference.is_recalibrated,
            seconds=spent_s * max(1, job.cluster.max_workers),
            is_new=False,
        )
