"""The results of a job by name: claimed, committed in order, read back and checked.

    <storage>/<job>/job.json                         whose folder this is
    <storage>/<job>/trials/<trial_id>/round_000/     the dense network; round_001 ... pruned ones
        weights.safetensors  masks.safetensors  state.pt  round.json
    <storage>/<job>/trials/<trial_id>/trial.json     the finished trial
                                      failure.json   why one ended without, in a sweep
                                      stopped.json   that a sweep's scheduler ended it
                                      test.json      the one use of the test split, if rounds were
                                                     judged by other examples
    <storage>/<job>/dense/<hash>/  scores/<hash>/    what trials share; shared.json is the record
    <storage>/<job>/unindexed/<trial_id>             announces a trial to the index
    <storage>/<job>/index.parquet                    all finished trials, from their records

The storage is a folder or `s3://bucket/prefix`. A result exists when its record does: `round.json`
is written after the files it lists with their sizes and SHA-256, `trial.json` after all rounds.
Nothing is ever written as a stream: an object is put whole or not at all, so a reader sees whole
files or none. Files are bytes here; what is in them is the business of the floors above.

Results are read with this module alone, without torch or Ray.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from gbp_ray.config import JobConfig
from gbp_ray.errors import StoreError
from gbp_ray.files import FolderObjects
from gbp_ray.lease import Lease, await_lease, hold_lease
from gbp_ray.objects import Objects
from gbp_ray.records import (
    CostRecord,
    FailureRecord,
    FileRecord,
    FinalTest,
    JobRecord,
    LayerRecord,
    RoundRecord,
    SharedRecord,
    StopRecord,
    TrialRecord,
    read_record,
    seal_record,
)

__all__ = [
    "REMEDY",
    "CostRecord",
    "FailureRecord",
    "FileRecord",
    "LayerRecord",
    "RoundRecord",
    "SharedRecord",
    "StopRecord",
    "Store",
    "TrialRecord",
    "locate_finished",
    "locate_jobs",
    "locate_round",
    "locate_trials",
    "open_objects",
]


_FAILURE = "failure.json"
_STOP = "stopped.json"
_TEST = "test.json"

REMEDY = "restore it, or delete its round, those after it and trial.json, and run the job again"


class Store:
    """The results of one job.

    Args:
        storage: Folder or `s3://bucket/prefix` that holds jobs.
        name: The job.

    Attributes:
        objects: Its bytes.
    """

    def __init__(self, storage: str | Path | Objects, name: str) -> None:
        self.objects = (storage if isinstance(storage, Objects) else open_objects(storage)).child(
            name
        )
        self.name = name

    @property
    def uri(self) -> str:
        """Where the job's results are."""
        return self.objects.uri_of()

    @property
    def folder(self) -> Path | None:
        """The same as a folder, or None on an object store."""
        return self.objects.folder if isinstance(self.objects, FolderObjects) else None

    def preflight(self) -> None:
        """Makes sure that results can be written, before there are any.

        Raises:
            StoreError: They cannot; says which bucket or permission is missing.
        """
        self.objects.preflight()

    def claim(self, job: JobConfig) -> None:
        """Makes the folder this job's, or makes sure that it is.

        Trials of one workload that differ in anything else share a folder, each under its own id;
        another workload under the same name is another job.

        Raises:
            StoreError: The folder is another job's, is not ours, or cannot be written.
        """
        self.adopt(JobRecord(factory=job.workload.factory))

    def adopt(self, claim: JobRecord) -> None:
        """Claims the folder for a job that is known by its claim elsewhere; see `claim`."""
        if self.check_claim(claim) or self.objects.put_if("job.json", seal_record(claim), None):
            return
        # Another driver was faster; whether it does the same job is in its claim.
        if not self.check_claim(claim):
            raise self._not_ours("has vanished")

    def check_claim(self, claim: JobRecord) -> bool:
        """Says whether the folder is claimed for the same job; one that may be claimed is not.

        Raises:
            StoreError: The folder is another job's, or is not ours.
        """
        found = self.read_claim()
        if found is None:
            if next(self.objects.entries(), None) is not None:
                raise StoreError(
                    f"storage: '{self.uri}' is not empty and not a results folder; choose another "
                    "name or storage"
                )
            return False
        if found.factory != claim.factory:
            raise self._not_ours(f"= '{found.factory}'")
        return True

    def _not_ours(self, owner: str) -> StoreError:
        return StoreError(
            f"storage: '{self.uri}' holds results of another job, whose workload.factory {owner}; "
            "choose another name or storage"
        )

    def read_claim(self) -> JobRecord | None:
        """Reads whose folder this is, or None where it is nobody's."""
        return read_record(self.objects, "job.json", JobRecord)

    def hold(self, trial_id: str) -> AbstractContextManager[Lease]:
        """Keeps a trial from other drivers while the block runs.

        Raises:
            StoreError: Another driver is at work on it.
        """
        return hold_lease(self.objects, f"trials/{trial_id}")

    def await_lease(self, folder: str) -> AbstractContextManager[Lease]:
        """Keeps a trial or what trials share from others, and waits for those who have it."""
        return await_lease(self.objects, folder)

    def trial_uri(self, trial_id: str) -> str:
        """Says where a trial is."""
        return self.objects.uri_of(f"trials/{trial_id}")

    def round_uri(self, trial_id: str, number: int) -> str:
        """Says where a round is; its files are there once its record is."""
        return self.objects.uri_of(_round_key(trial_id, number))

    def read_trial(self, trial_id: str) -> TrialRecord | None:
        """Reads a finished trial, or None where it has not finished."""
        return read_record(self.objects, f"trials/{trial_id}/trial.json", TrialRecord)

    def read_rounds(self, trial_id: str) -> list[RoundRecord]:
        """Reads the whole rounds of a trial, from 0 up to the first that is missing."""
        records: list[RoundRecord] = []
        while record := self.read_round(trial_id, len(records)):
            records.append(record)
        return records

    def read_round(self, trial_id: str, number: int) -> RoundRecord | None:
        """Reads the record of a round, or None where it is not whole."""
        return read_record(self.objects, f"{_round_key(trial_id, number)}/round.json", RoundRecord)

    def read_file(self, trial_id: str, record: RoundRecord, name: str) -> bytes:
        """Reads a file of a committed round and checks it against the record.

        Raises:
            StoreError: The file is missing, cut short or altered.
        """
        folder = _round_key(trial_id, record.round)
        if name not in record.files:
            uri = self.objects.uri_of(f"{folder}/{name}")
            raise StoreError(f"'{uri}': is not part of round {record.round}")
        return self._read_committed(folder, name, record.files[name])

    def _read_committed(self, folder: str, name: str, committed: FileRecord) -> bytes:
        key = f"{folder}/{name}"
        uri, fault = self.objects.uri_of(key), ""
        for _ in range(self.objects.num_reads):
            data = self.objects.get(key)
            if data is None:
                raise StoreError(f"'{uri}': cannot be read: there is no such file; {REMEDY}")
            if len(data) != committed.num_bytes:
                fault = f"has {len(data)} bytes, {committed.num_bytes} were written"
            elif hashlib.sha256(data).hexdigest() != committed.sha256:
                fault = "does not match its checksum"
            else:
                return data
        raise StoreError(f"'{uri}': {fault}; {REMEDY}")

    def write_round(
        self, trial_id: str, record: RoundRecord, files: Mapping[str, bytes]
    ) -> RoundRecord:
        """Commits a round: its files, then its record. Returns the record with the checksums.

        Raises:
            StoreError: The disk is full or the storage cannot be written; the round is then not
                there, and those before it are.
        """
        self.begin_round(trial_id, record.round)
        return self.end_round(trial_id, record, self.put_files(trial_id, record.round, files))

    def begin_round(self, trial_id: str, number: int) -> None:
        """Makes room for a round: the first of three steps where several writers share it.

        A record left by an interrupted rewrite must not vouch for new files.
        """
        self.objects.delete([f"{_round_key(trial_id, number)}/round.json"])

    def put_files(
        self, trial_id: str, number: int, files: Mapping[str, bytes]
    ) -> dict[str, FileRecord]:
        """Writes one writer's files of a round that has begun; returns what the record holds."""
        return self._put_files(_round_key(trial_id, number), files)

    def _put_files(self, folder: str, files: Mapping[str, bytes]) -> dict[str, FileRecord]:
        written = {}
        for name, data in files.items():
            self.objects.put(f"{folder}/{name}", data)
            digest = hashlib.sha256(data).hexdigest()
            written[name] = FileRecord(num_bytes=len(data), sha256=digest)
        return written

    def end_round(
        self, trial_id: str, record: RoundRecord, files: Mapping[str, FileRecord]
    ) -> RoundRecord:
        """Commits a round when all writers have put their files."""
        record = record.model_copy(update={"files": dict(files)})
        key = f"{_round_key(trial_id, record.round)}/round.json"
        self.objects.put(key, seal_record(record))
        return record

    def read_failure(self, trial_id: str) -> FailureRecord | None:
        """Reads why a trial of a sweep ended without a result, or None."""
        return read_record(self.objects, f"trials/{trial_id}/{_FAILURE}", FailureRecord)

    def write_failure(self, record: FailureRecord) -> None:
        """Notes why a trial ended without a result."""
        self.objects.put(f"trials/{record.trial_id}/{_FAILURE}", seal_record(record))

    def read_stop(self, trial_id: str) -> StopRecord | None:
        """Reads where a scheduler ended a trial, or None."""
        return read_record(self.objects, f"trials/{trial_id}/{_STOP}", StopRecord)

    def write_stop(self, record: StopRecord) -> None:
        """Notes where a scheduler ended a trial."""
        self.objects.put(f"trials/{record.trial_id}/{_STOP}", seal_record(record))

    def read_test(self, trial_id: str) -> FinalTest | None:
        """Reads what a trial's last step found on the test split, or None."""
        return read_record(self.objects, f"trials/{trial_id}/{_TEST}", FinalTest)

    def write_test(self, trial_id: str, record: FinalTest) -> None:
        """Commits what was found on the test split."""
        self.objects.put(f"trials/{trial_id}/{_TEST}", seal_record(record))

    def list_unfinished(self, name: str) -> list[str]:
        """Lists the trials that have a failure or a stop on record; costs a listing of all."""
        keys = (entry.key.split("/") for entry in self.objects.entries("trials/"))
        return [parts[1] for parts in keys if len(parts) == 3 and parts[2] == name]

    def read_shared(self, folder: str) -> tuple[SharedRecord, dict[str, bytes]] | None:
        """Reads what trials share under `dense/<hash>` or `scores/<hash>`, or None.

        Raises:
            StoreError: It is damaged.
        """
        record = self.read_shared_record(folder)
        if record is None:
            return None
        return record, {name: self.read_shared_file(folder, record, name) for name in record.files}

    def read_shared_record(self, folder: str) -> SharedRecord | None:
        """Reads the record of what trials share, or None where it was never committed.

        Raises:
            StoreError: It is damaged.
        """
        return read_record(self.objects, f"{folder}/shared.json", SharedRecord)

    def read_shared_file(self, folder: str, record: SharedRecord, name: str) -> bytes:
        """Reads one file of what trials share.

        Raises:
            StoreError: It is missing or not as it was written.
        """
        return self._read_committed(folder, name, record.files[name])

    def write_shared(
        self,
        folder: str,
        files: Mapping[str, bytes],
        origin: Mapping[str, object],
        round_record: RoundRecord | None = None,
    ) -> None:
        """Commits what trials share: the files, then their record."""
        self.objects.delete([f"{folder}/shared.json"])
        committed = self._put_files(folder, files)
        record = SharedRecord(files=committed, origin=dict(origin), round=round_record)
        self.objects.put(f"{folder}/shared.json", seal_record(record))

    def write_trial(self, record: TrialRecord) -> None:
        """Commits a finished trial, whose rounds must be there, and tells the index.

        Raises:
            StoreError: The record cannot be written; the trial has then not finished.
        """
        # pyarrow takes a third of a second to import, and readers of one record do without.
        from gbp_ray.index import UNINDEXED, refresh_index

        self.objects.put(f"{UNINDEXED}{record.trial_id}", b"")
        folder = f"trials/{record.trial_id}"
        self.objects.put(f"{folder}/trial.json", seal_record(record))
        # From here on the trial is finished, whatever becomes of the rest.
        try:
            refresh_index(self.objects, is_lazy=True)
            self.objects.delete([f"{folder}/{_FAILURE}", f"{folder}/{_STOP}"])
            # Writers that were killed have left what they were writing.
            for leftover in list(self.objects.find_leftovers(f"{folder}/")):
                self.objects.discard(leftover)
        except StoreError as error:
            warnings.warn(
                f"trial {record.trial_id} has finished, tidying up after it failed: {error}",
                stacklevel=2,
            )


def locate_jobs(uri: str | Path) -> tuple[list[Store], str | None]:
    """Finds the jobs that a trial's, a job's or a storage's address is about.

    Returns:
        The jobs in name order, and the trial's id where the address is a trial's.

    Raises:
        StoreError: There is no such folder.
    """
    if not str(uri).strip():
        raise StoreError("URI = '': must name a folder or an s3:// address")
    objects = _open_existing(uri)
    if (place := objects.parent()) is None:
        return [Store(objects, job) for job in objects.list_folders()], None
    if (trials := place[0].parent()) and trials[1] == "trials" and (job := trials[0].parent()):
        return [Store(*job)], place[1]
    if objects.exists("job.json"):
        return [Store(*place)], None
    return [Store(objects, job) for job in objects.list_folders()], None


def locate_trials(uri: str | Path) -> list[tuple[Store, str]]:
    """Finds the trials under a trial's folder, a job's folder or a storage folder.

    Returns:
        (store, trial id) pairs in name order, finished or not.

    Raises:
        StoreError: There is no such folder, or it holds no trial.
    """
    stores, trial = locate_jobs(uri)
    trials = [
        (store, name)
        for store in stores
        for name in ([trial] if trial else store.objects.list_folders("trials/"))
        if store.objects.exists(f"{_round_key(name, 0)}/round.json")
    ]
    if not trials:
        raise StoreError(f"'{uri}': holds no results; run a job with this storage first")
    return trials


def locate_round(uri: str | Path) -> tuple[Store, str, RoundRecord]:
    """Finds the one round that an address is about.

    Args:
        uri: Of a round, or of a trial or of what holds just one: that gives the round which the
            trial is for, and of an unfinished one the last.

    Returns:
        The job, the trial's id and the round's record.

    Raises:
        StoreError: There is no such round, or there are several trials.
    """
    parts = re.fullmatch(r"(.+)/round_(\d+)/*(\?.*)?", str(uri))
    trials = locate_trials(f"{parts[1]}{parts[3] or ''}" if parts else uri)
    if len(trials) > 1:
        names = ", ".join(store.trial_uri(name) for store, name in trials[:9])
        raise StoreError(f"'{uri}': holds {len(trials)} trials; name one of {names}")
    ((store, name),) = trials
    if parts is None:
        finished = store.read_trial(name)
        return store, name, finished.chosen if finished else store.read_rounds(name)[-1]
    record = store.read_round(name, int(parts[2]))
    if record is None:
        raise StoreError(f"'{uri}': there is no such round, or it was never committed")
    return store, name, record


def locate_finished(uri: str | Path) -> tuple[Store, TrialRecord, RoundRecord]:
    """Finds the one round that an address is about, as `locate_round`, and its finished trial.

    Raises:
        StoreError: Likewise, or the trial has not finished.
    """
    store, name, record = locate_round(uri)
    trial = store.read_trial(name)
    if trial is None:
        raise StoreError(
            f"'{uri}': the trial has not finished; run the same job again to go on with it"
        )
    return store, trial, record


def open_objects(uri: str | Path) -> Objects:
    """Opens a folder or `s3://bucket/prefix`; asks neither anything.

    Raises:
        StoreError: The address is none.
    """
    text = str(uri)
    if text.startswith("s3://"):
        # boto3 takes a third of a second to import, and folders do without.
        from gbp_ray.s3 import S3Objects

        return S3Objects.open(text)
    try:
        return FolderObjects(Path(text.removeprefix("file://")).expanduser().absolute())
    except RuntimeError:
        raise StoreError(
            f"storage = '{uri}': there is no such home folder; give a whole path"
        ) from None


def _open_existing(uri: str | Path) -> Objects:
    if str(uri).startswith("s3://"):
        return open_objects(uri)
    try:
        # Resolved, because "." and ".." have no name to go by.
        folder = Path(str(uri).removeprefix("file://")).expanduser().resolve()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"'{uri}': cannot be read: {error}") from None
    if not is_folder:
        raise StoreError(
            f"'{uri}': there is no such folder; give a trial's, a job's or a storage's"
        )
    return FolderObjects(folder)


def _round_key(trial_id: str, number: int) -> str:
    return f"trials/{trial_id}/round_{number:03d}"
