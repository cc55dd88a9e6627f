"""Checks of results, garbage of dead jobs, and copies of results.

`find_faults` reads everything: each checksum, and each sparsity as counted in the stored weights.
`find_garbage` lists what no record refers to and no live driver is writing; removing it is a second
step, which looks again under the trial's lease, so that nothing that has come to life is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gbp_ray.errors import StoreError
from gbp_ray.results.index import (
    INDEX,
    UNINDEXED,
    is_current,
    is_sound,
    read_stored,
    stream_in_threads,
    tabulate,
)
from gbp_ray.results.lease import DEAD_S, MARKS, hold_lease, is_held
from gbp_ray.results.objects import Entry, Leftover, Objects, is_key
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store, locate_jobs, locate_trials
from gbp_ray.results.tensors import (
    MASKS,
    WEIGHTS,
    count_nonzero,
    digest_masks,
    find_revived,
    read_mask_file,
)

__all__ = [
    "Audit",
    "Fetched",
    "Garbage",
    "fetch_results",
    "find_faults",
    "find_garbage",
    "remove_garbage",
]

_PROBE = ".probe-"
_ROUND = re.compile(r"trials/[^/]+/round_[0-9]+/")
_ROUND_NAME = re.compile(r"round_([0-9]{3}|[1-9][0-9]{3,5})")
_SHARED = ("dense/", "scores/", "explained/")

_FILES = (
    r"((weights|masks|scores|pictures)(\.[0-9a-f]{8})?\.safetensors|state(\.[0-9a-f]{8})?\.pt"
    r"|findings(\.[0-9a-f]{8})?\.json|shards/[^/]+)"
)

_OWN = re.compile(
    rf"(dense|scores|explained)/[^/]+/({_FILES}|(shared|driver)\.json|driver\.lock)"
    r"|trials/[^/]+/((trial|failure|stopped|test|driver)\.json|driver\.lock)"
    rf"|trials/[^/]+/round_[0-9]+/({_FILES}|round\.json)"
)
"""The names that this package writes; all else is somebody else's."""


@dataclass
class Audit:
    """Counts of what was checked, and the faults.

    Attributes:
        faults: (address, fault).
    """

    num_jobs: int = 0
    num_trials: int = 0
    num_rounds: int = 0
    num_files: int = 0
    num_bytes: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Garbage:
    """Something that may be removed.

    Attributes:
        uri: Where it is.
        num_bytes: Its size.
        why: The reason.
        until: The name of an object that keeps it, or "".
    """

    uri: str
    num_bytes: int
    why: str
    objects: Objects
    trial: str
    key: str
    until: str = ""
    leftover: Leftover | None = None


# -- faults ----------------------------------------------------------------------------------------


def find_faults(uri: str | Path) -> Audit:
    """Reads and checks everything under an address.

    Checked are the checksums of all records, files and indexes; that each round's sparsity is the
    one counted in its weights, layer by layer; that its masks have the digest on record and remove
    what is zero; that a trial's record agrees with its rounds, and the index with the records.

    Raises:
        StoreError: There is nothing to check, or the storage cannot be read.
    """
    stores, only = locate_jobs(uri)
    audit = Audit()
    for store in stores:
        trials = [only] if only else store.objects.list_folders("trials/")
        if not trials:
            continue
        audit.num_jobs += 1
        with _noted(audit, store.objects.uri_of("job.json")):
            store.read_claim()
        if only is None:
            _audit_shared(audit, store)
        finished: dict[str, str] = {}
        damaged = set()
        audits = stream_in_threads(store.objects, partial(_audit_trial, store), trials)
        for trial, (part, digest) in zip(trials, audits, strict=True):
            audit.num_trials += 1
            for count in ("num_rounds", "num_files", "num_bytes", "faults"):
                setattr(audit, count, getattr(audit, count) + getattr(part, count))
            if digest:
                finished[trial] = digest
            if part.faults:
                damaged.add(trial)
        _audit_index(audit, store, finished, damaged, only)
    if not audit.num_trials:
        raise StoreError(f"'{uri}': holds no results; run a job with this storage first")
    return audit


def _audit_trial(store: Store, trial: str) -> tuple[Audit, str]:
    """Checks a trial; returns what its rows in an index must come to, or "" if it is unfinished."""
    audit = Audit()
    rounds: dict[int, RoundRecord] = {}
    folders = store.objects.list_folders(f"trials/{trial}/")
    numbers = [int(folder[6:]) for folder in folders if _ROUND_NAME.fullmatch(folder)]
    for number in numbers:
        with _noted(audit, store.round_uri(trial, number)):
            record = store.read_round(trial, number)
            if record is not None:
                rounds[number] = record
                audit.num_rounds += 1
                _audit_round(audit, store, trial, record)
    finished, uri = None, store.objects.uri_of(f"trials/{trial}/trial.json")
    with _noted(audit, uri):
        finished = store.read_trial(trial)
    if finished is None:
        for read in (store.read_failure, store.read_stop):
            with _noted(audit, uri):
                read(trial)
    if not audit.faults:
        wanted = range(len(finished.rounds) if finished else len(rounds))
        for number in wanted:
            if number not in rounds:
                audit.faults.append((store.round_uri(trial, number), "is missing"))
            elif finished and rounds[number] != finished.rounds[number]:
                audit.faults.append((uri, f"does not agree with the record of round {number}"))
    rows = tabulate([finished]).to_pylist() if finished is not None else []
    return audit, _digest_rows(rows) if rows else ""


def _audit_round(audit: Audit, store: Store, trial: str, record: RoundRecord) -> None:
    files: dict[str, bytes] = {}
    for name, committed in record.files.items():
        uri = store.objects.uri_of(f"trials/{trial}/round_{record.round:03d}/{name}")
        with _noted(audit, uri):
            if name in (MASKS, WEIGHTS):
                files[name] = store.read_file(trial, record, name)
            else:
                store.check_file(trial, record, name)
            audit.num_files += 1
            audit.num_bytes += committed.num_bytes
    folder = store.round_uri(trial, record.round)
    masks = None
    if (data := files.get(MASKS)) is not None:
        masks = read_mask_file(data, folder).masks
        if digest_masks(masks) != record.mask_digest:
            audit.faults.append((folder, "its masks do not have the digest on record"))
    if (data := files.get(WEIGHTS)) is not None:
        found = count_nonzero(data, folder)
        for layer in record.cost.layers:
            # Of tied parameters one is stored, under another name at times.
            shape, num_nonzero = found.get(layer.name, (layer.shape, layer.num_nonzero))
            if shape != layer.shape or num_nonzero != layer.num_nonzero:
                audit.faults.append(
                    (
                        folder,
                        f"'{layer.name}' has {num_nonzero} weights other than zero, "
                        f"{layer.num_nonzero} are claimed",
                    )
                )
        if masks is not None and (revived := find_revived(data, masks, folder)):
            audit.faults.append((folder, f"'{revived}' has weights that its mask removes"))


def _audit_shared(audit: Audit, store: Store) -> None:
    for kind in _SHARED:
        for folder in (f"{kind}{name}" for name in store.objects.list_folders(kind)):
            record = None
            with _noted(audit, store.objects.uri_of(folder)):
                record = store.read_shared_record(folder)
            if record is None:
                continue
            for name in record.files:
                with _noted(audit, store.objects.uri_of(f"{folder}/{name}")):
                    audit.num_bytes += len(store.read_shared_file(folder, record, name))
                    audit.num_files += 1


def _audit_index(
    audit: Audit, store: Store, finished: dict[str, str], damaged: set[str], only: str | None
) -> None:
    uri = store.objects.uri_of(INDEX)
    with _noted(audit, uri):
        announced = {e.key.removeprefix(UNINDEXED) for e in store.objects.entries(UNINDEXED)}
        table = read_stored(store.objects)
        if table is None:
            return
        if not is_current(table):
            # Readers make that of an earlier version anew.
            if not is_sound(table):
                fault = "has columns that no version writes; gbp-ray index makes it anew"
                audit.faults.append((uri, fault))
            return
        indexed = _digest_trials(table.to_batches(max_chunksize=1000))
        for trial, digest in finished.items():
            if trial in indexed:
                if indexed[trial] != digest:
                    fault = f"does not agree with the record of trial {trial}"
                    audit.faults.append((uri, f"{fault}; gbp-ray index makes it anew"))
            elif trial not in announced:
                audit.faults.append((uri, f"lacks trial {trial}; gbp-ray index makes it anew"))
        for trial in set(indexed) - set(finished) - damaged if only is None else ():
            fault = f"lists trial {trial}, which has no record; gbp-ray index makes it anew"
            audit.faults.append((uri, fault))


def _digest_trials(parts: Iterable[Any]) -> dict[str, str]:
    """Hashes the rows of each trial of a sorted index, some at a time."""
    rows = (row for part in parts for row in part.to_pylist())
    by_trial = itertools.groupby(rows, key=lambda row: row["trial_id"])
    return {trial: _digest_rows(rows) for trial, rows in by_trial}


def _digest_rows(rows: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_plain(row).encode() + b"\n")
    return digest.hexdigest()


def _plain(row: dict[str, Any]) -> str:
    # As text, in which NaN equals itself; whole numbers may be stored as floats.
    return json.dumps(
        {k: float(v) if isinstance(v, int) else v for k, v in row.items() if v is not None},
        sort_keys=True,
    )


@contextlib.contextmanager
def _noted(audit: Audit, uri: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        if type(error) is not StoreError:
            # The storage does not answer; the results may be sound.
            raise
        named = re.match(r"'(.+?)': (.*)", str(error))
        audit.faults.append((named[1], named[2]) if named else (uri, str(error)))


# -- garbage ---------------------------------------------------------------------------------------


def find_garbage(uri: str | Path, *, is_unfinished_too: bool = False) -> list[Garbage]:
    """Lists what dead jobs have left under an address; changes nothing.

    Args:
        is_unfinished_too: Counts unfinished trials as garbage, whole rounds and all; without it
            they stay, for the job to go on with.

    Raises:
        StoreError: The storage cannot be read.
    """
    stores, only = locate_jobs(uri)
    whole = f"trials/{only}/" if only else ""
    # What merely looks like results may be somebody else's; a job that never began left a probe.
    are_own = [store.objects.exists("job.json") for store in stores]
    found = [
        item
        for store, is_own in zip(stores, are_own, strict=True)
        for item in _garbage_of(store, whole if is_own else _PROBE, is_unfinished_too)
    ]
    if not found and not any(are_own):
        raise StoreError(
            f"'{uri}': holds no results of gbp-ray; give a trial's, a job's or a storage's folder"
        )
    return found


def remove_garbage(items: Iterable[Garbage]) -> list[Garbage]:
    """Removes what is still garbage; returns that.

    What belongs to a trial goes under the trial's lease, after a look whether it has been committed
    in the meantime; a trial that a driver has taken up again is left as it is.

    Raises:
        StoreError: The storage cannot be written.
    """
    removed: list[Garbage] = []
    by_trial: dict[tuple[str, str], list[Garbage]] = {}
    for item in items:
        by_trial.setdefault((item.objects.uri_of(), item.trial), []).append(item)
    for group in by_trial.values():
        objects, folder = group[0].objects, _folder_of(group[0].trial)
        if not group[0].trial:
            removed += [item for item in group if _remove(item)]
        elif not is_held(objects, folder):
            with hold_lease(objects, folder):
                removed += [item for item in group if _remove(item)]
    return removed


def _remove(item: Garbage) -> bool:
    if item.leftover is not None:
        item.objects.discard(item.leftover)
        return True
    if item.until and item.objects.exists(item.until):
        return False
    # The mark of a lease is removed by whoever held it last, which by now is us.
    if item.key.rpartition("/")[2] not in MARKS:
        item.objects.delete([item.key])
    return True


def _garbage_of(store: Store, prefix: str, is_unfinished_too: bool) -> Iterator[Garbage]:
    objects = store.objects
    # What no writer of ours could have named is somebody else's.
    entries = [entry for entry in objects.entries(prefix) if is_key(entry.key)]
    leftovers = [item for item in objects.find_leftovers(prefix) if is_key(item.key)]
    keys = {entry.key for entry in entries}
    held: dict[str, bool] = {}

    def is_live(trial: str) -> bool:
        if trial not in held:
            held[trial] = is_held(objects, _folder_of(trial))
        return held[trial]

    for entry in entries:
        trial, why, until = _judge(entry, is_unfinished_too)
        if why and until not in keys and not (trial and is_live(trial)):
            uri = objects.uri_of(entry.key)
            yield Garbage(uri, entry.num_bytes, why, objects, trial, entry.key, until)
    for leftover in leftovers:
        trial = _trial_of(leftover.key)
        if not (is_live(trial) if trial else leftover.age_s < DEAD_S):
            uri, why = objects.uri_of(leftover.key), "its writing never ended"
            yield Garbage(
                uri, leftover.num_bytes, why, objects, trial, leftover.key, leftover=leftover
            )


def _judge(entry: Entry, is_unfinished_too: bool) -> tuple[str, str, str]:
    """Return the owner of an object, why it is garbage ("" if not), and what would keep it."""
    key = entry.key
    folder, name = "/".join(key.split("/")[:2]), key.rpartition("/")[2]
    if key.startswith(_PROBE):
        return "", "a preflight never removed it" if entry.age_s > DEAD_S else "", ""
    if key.startswith("ray/"):
        return key.split("/")[1], "it is Ray's own", ""
    if key.startswith(UNINDEXED):
        return name, "it announces a trial that never finished", f"trials/{name}/trial.json"
    if not _OWN.fullmatch(key):
        # Somebody's notes, say.
        return "", "", ""
    if key.startswith(_SHARED):
        if name in MARKS:
            return folder, "its driver is dead", ""
        why = "" if name == "shared.json" else "it was never committed"
        return folder, why, f"{folder}/shared.json"
    trial = _trial_of(key)
    if name in MARKS:
        return trial, "its driver is dead", ""
    if is_unfinished_too:
        return trial, "its trial never finished", f"trials/{trial}/trial.json"
    if (round_folder := _ROUND.match(key)) and name != "round.json":
        return trial, "its round was never committed", f"{round_folder[0]}round.json"
    return trial, "", ""


def _folder_of(trial: str) -> str:
    """Finds the folder whose lease covers a trial, or what trials share."""
    return trial if trial.startswith(_SHARED) else f"trials/{trial}"


def _trial_of(key: str) -> str:
    parts = key.split("/")
    return parts[1] if parts[0] == "trials" and len(parts) > 2 else ""


@dataclass
class Fetched:
    """Counts of what was copied.

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
        if (claim := source.read_claim()) is not None:
            target.adopt(claim)
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
