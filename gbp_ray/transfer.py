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
        StoreError: Something is damaged, or the folder cannot be written or is another job's.
    """
    fetched = Fetched()
    for source, trial in locate_trials(uri):
        target = Store(Path(folder), source.name)
        _adopt_claim(source, target)
        for record in source.read_rounds(trial):
            if _is_there(target, trial, record):
                continue
            files = {name: source.read_file(trial, record, name) for name in record.files}
            target.write_round(trial, record, files)
            fetched.num_rounds += 1
            fetched.num_bytes += sum(map(len, files.values()))
        finished = source.read_trial(trial)
        if finished is not None and target.read_trial(trial) != finished:
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


def _is_there(target: Store, trial: str, record: RoundRecord) -> bool:
    if target.read_round(trial, record.round) != record:
        return False
    try:
        for name in record.files:
            target.read_file(trial, record, name)
    except StoreError:
        # Damaged since: copied again.
        return False
    return True
