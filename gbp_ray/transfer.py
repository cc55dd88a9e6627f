"""Results copied to a folder, each file checked on the way, committed as if made there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gbp_ray.errors import StoreError
from gbp_ray.records import RoundRecord
from gbp_ray.store import Store, locate_trials

__all__ = ["Fetched", "fetch_results"]


@dataclass
class Fetched:
    """What was copied.

    Attributes:
        num_trials: Trials that are there now.
        num_rounds: Rounds that were copied; those that were there are not copied again.
        num_bytes: Their size.
    """

    num_trials: int = 0
    num_rounds: int = 0
    num_bytes: int = 0


def fetch_results(uri: str | Path, folder: str | Path) -> Fetched:
    """Copies trials to a folder that then is a storage of its own; run again, it goes on.

    Args:
        uri: A trial's, a job's or a storage's address.
        folder: Receives `<job>/trials/...`.

    Raises:
        StoreError: Something is damaged, or the folder cannot be written, is another job's or holds
            other results of the same trial.
        BusyError: A driver is at work on the trial there.
    """
    fetched = Fetched()
    for source, trial in locate_trials(uri):
        target = Store(Path(folder), source.name)
        _adopt_claim(source, target)
        # A driver that is at work on it there would meet rounds that it has not made.
        with target.hold(trial):
            for record in source.read_rounds(trial):
                num_bytes = _copy_round(source, target, trial, record)
                fetched.num_rounds += num_bytes > 0
                fetched.num_bytes += num_bytes
            finished = source.read_trial(trial)
            if finished is not None:
                if (there := target.read_trial(trial)) not in (None, finished):
                    raise _refusal(target.trial_uri(trial))
                if there is None:
                    target.write_trial(finished)
        if (explained := source.read_shared(f"explained/{trial}")) is not None:
            shared, files = explained
            target.write_shared(f"explained/{trial}", files, shared.origin)
        fetched.num_trials += 1
    return fetched


def _adopt_claim(source: Store, target: Store) -> None:
    claim = source.read_claim()
    if claim is not None:
        target.adopt(claim)


def _copy_round(source: Store, target: Store, trial: str, record: RoundRecord) -> int:
    """Copies a round, or what is damaged of one that is there; returns how many bytes."""
    there = target.read_round(trial, record.round)
    if there not in (None, record):
        raise _refusal(target.round_uri(trial, record.round))
    num_bytes = 0
    for name in record.files:
        try:
            target.check_file(trial, record, name)
        except StoreError:
            data = source.read_file(trial, record, name)
            target.put_file(trial, record, name, data)
            num_bytes += len(data)
    if there is None:
        target.end_round(trial, record, record.files)
    return num_bytes


def _refusal(place: str) -> StoreError:
    return StoreError(
        f"storage: '{place}' holds other results of the same trial, and they stay; fetch into "
        "another folder"
    )
