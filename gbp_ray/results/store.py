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
files or none. Files are bytes here.

Reading results needs only this module, neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
import re
import uuid
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import BaseModel

from gbp_ray.config.job import JobConfig
from gbp_ray.errors import StoreError
from gbp_ray.results.folder import FolderObjects
from gbp_ray.results.lease import MARKS, Lease, await_lease, hold_lease, read_driver
from gbp_ray.results.objects import Objects, is_key
from gbp_ray.results.records import (
    AnyRecord,
    FailureRecord,
    FileRecord,
    FinalTest,
    JobRecord,
    RoundRecord,
    SharedRecord,
    StopRecord,
    TrialRecord,
    locate_files,
    read_record,
    seal_record,
)

__all__ = [
    "REMEDY",
    "Store",
    "locate_finished",
    "locate_jobs",
    "locate_round",
    "locate_trial",
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
        """Address of the job's results."""
        return self.objects.uri_of()

    @property
    def folder(self) -> Path | None:
        """Folder of the job's results; None on an object store."""
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
        """Return whether the folder is claimed for this job; False if it may be claimed.

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
        """Return the address of a trial."""
        return self.objects.uri_of(f"trials/{trial_id}")

    def round_uri(self, trial_id: str, number: int) -> str:
        """Return the address of a round; its files are complete once its record is there."""
        return self.objects.uri_of(_round_key(trial_id, number))

    def read_trial(self, trial_id: str) -> TrialRecord | None:
        """Reads a finished trial, or None where it has not finished."""
        return self._read(f"trials/{trial_id}/trial.json", TrialRecord, trial_id=trial_id)

    def _read(self, key: str, kind: type[AnyRecord], **place: object) -> AnyRecord | None:
        """Reads a record and makes sure that it is of the place where it lies."""
        record = read_record(self.objects, key, kind)
        for name, value in ({} if record is None else place).items():
            if getattr(record, name) != value:
                raise StoreError(
                    f"'{self.objects.uri_of(key)}': is damaged: {name} is {getattr(record, name)}"
                )
        return record

    def read_rounds(self, trial_id: str) -> list[RoundRecord]:
        """Reads the whole rounds of a trial, from 0 up to the first that is missing."""
        records: list[RoundRecord] = []
        while record := self.read_round(trial_id, len(records)):
            records.append(record)
        return records

    def read_round(self, trial_id: str, number: int) -> RoundRecord | None:
        """Reads the record of a round, or None where it is not whole."""
        return self._read(f"{_round_key(trial_id, number)}/round.json", RoundRecord, round=number)

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

    def check_file(self, trial_id: str, record: RoundRecord, name: str) -> None:
        """Makes sure that a file of a committed round is as it was written; holds none of it.

        Raises:
            StoreError: The file is missing, cut short or altered.
        """
        committed, folder = record.files[name], _round_key(trial_id, record.round)
        found = self.objects.measure(f"{folder}/{committed.stored_as or name}")
        if found != (committed.num_bytes, committed.sha256):
            # Read again as often as it is worth, for what is wrong with it.
            self._read_committed(folder, name, committed)

    def _read_committed(self, folder: str, name: str, committed: FileRecord) -> bytes:
        key = f"{folder}/{committed.stored_as or name}"
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
        self,
        trial_id: str,
        record: RoundRecord,
        files: Mapping[str, bytes],
        twins: Mapping[str, str] | None = None,
    ) -> RoundRecord:
        """Commits a round: its files, then its record. Returns the record with the checksums.

        Args:
            twins: Objects that hold the same bytes, by file, such as what trials share.

        Raises:
            StoreError: The disk is full, the storage cannot be written, or the round is there
                already; it is then not there or as it was, and those before it are.
        """
        self.begin_round(trial_id, record.round)
        written = self._put_files(_round_key(trial_id, record.round), files.items(), twins)
        return self.end_round(trial_id, record, written)

    def begin_round(self, trial_id: str, number: int) -> None:
        """Makes sure that a round is still to be written: the first of three steps.

        Nothing of a round is ever replaced, neither its record nor a file that it may list: a
        driver that was taken for dead and comes back writes beside them.

        Raises:
            StoreError: It has been committed.
        """
        key = f"{_round_key(trial_id, number)}/round.json"
        if self.objects.exists(key):
            raise self._too_late(key)

    def _too_late(self, key: str) -> StoreError:
        return StoreError(
            f"storage: '{self.objects.uri_of(key)}' is there already, by another driver, and stays "
            "as it is; run the job again to go on after it"
        )

    def _commit(self, key: str, record: BaseModel) -> None:
        """Writes a record that is never replaced by another one."""
        data = seal_record(record)
        if self.objects.put_if(key, data, None) is None and self.objects.get(key) != data:
            raise self._too_late(key)

    def read_driver(self, trial_id: str) -> str:
        """Reads the token of the driver that holds a trial, or ""."""
        return read_driver(self.objects, f"trials/{trial_id}")

    def check_driver(self, trial_id: str, driver: str) -> None:
        """Makes sure that a trial is still held by the driver that held it, where one did.

        Raises:
            StoreError: Another one has taken it over.
        """
        if driver and self.read_driver(trial_id) != driver:
            raise StoreError(
                f"storage: '{self.trial_uri(trial_id)}': another driver has taken this trial over, "
                "and this one stops; wait for that one"
            )

    def put_files(
        self, trial_id: str, number: int, files: Iterable[tuple[str, bytes]]
    ) -> dict[str, FileRecord]:
        """Writes one writer's files of a round that has begun, each let go before the next is made.

        Args:
            files: Name and bytes of each.

        Returns:
            What the record holds, by name.
        """
        return self._put_files(_round_key(trial_id, number), files)

    def _put_files(
        self,
        folder: str,
        files: Iterable[tuple[str, bytes]],
        twins: Mapping[str, str] | None = None,
    ) -> dict[str, FileRecord]:
        written = {}
        for name, data in files:
            stored_as = ""
            if not self.objects.put_new(f"{folder}/{name}", data, (twins or {}).get(name, "")):
                stem, _, suffix = name.rpartition(".")
                stored_as = f"{stem}.{uuid.uuid4().hex[:8]}.{suffix}"
                self.objects.put(f"{folder}/{stored_as}", data)
            digest = hashlib.sha256(data).hexdigest()
            written[name] = FileRecord(num_bytes=len(data), sha256=digest, stored_as=stored_as)
            del data
        self.objects.flush(f"{folder}/{name}".rpartition("/")[0] for name in written)
        return written

    def _remove_unlisted(self, folder: str, record: str, files: Mapping[str, FileRecord]) -> None:
        """Removes what earlier drivers have left beside a record that was just committed."""
        kept = {*locate_files(folder, files).values()}
        kept |= {f"{folder}/{name}" for name in (record, *MARKS)}
        found = [entry.key for entry in self.objects.entries(f"{folder}/")]
        self.objects.delete([key for key in found if key not in kept and is_key(key)])

    def put_file(self, trial_id: str, record: RoundRecord, name: str, data: bytes) -> None:
        """Puts a file of a round where its record says that it is."""
        place = record.files[name].stored_as or name
        self.objects.put(f"{_round_key(trial_id, record.round)}/{place}", data)

    def end_round(
        self, trial_id: str, record: RoundRecord, files: Mapping[str, FileRecord]
    ) -> RoundRecord:
        """Commits a round when all writers have put their files.

        Raises:
            StoreError: It has been committed by another driver.
        """
        record = record.model_copy(update={"files": dict(files)})
        folder = _round_key(trial_id, record.round)
        self._commit(f"{folder}/round.json", record)
        if any(file.stored_as for file in files.values()):
            self._remove_unlisted(folder, "round.json", files)
        return record

    def read_failure(self, trial_id: str) -> FailureRecord | None:
        """Reads why a trial of a sweep ended without a result, or None."""
        return self._read(f"trials/{trial_id}/{_FAILURE}", FailureRecord, trial_id=trial_id)

    def write_failure(self, record: FailureRecord) -> None:
        """Notes why a trial ended without a result."""
        self.objects.put(f"trials/{record.trial_id}/{_FAILURE}", seal_record(record))

    def read_stop(self, trial_id: str) -> StopRecord | None:
        """Reads where a scheduler ended a trial, or None."""
        return self._read(f"trials/{trial_id}/{_STOP}", StopRecord, trial_id=trial_id)

    def write_stop(self, record: StopRecord) -> None:
        """Notes where a scheduler ended a trial."""
        self.objects.put(f"trials/{record.trial_id}/{_STOP}", seal_record(record))

    def read_test(self, trial_id: str) -> FinalTest | None:
        """Reads what a trial's last step found on the test split, or None."""
        return read_record(self.objects, f"trials/{trial_id}/{_TEST}", FinalTest)

    def write_test(self, trial_id: str, record: FinalTest) -> None:
        """Commits what was found on the test split.

        Raises:
            StoreError: Another driver has found something else.
        """
        self._commit(f"trials/{trial_id}/{_TEST}", record)

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
        twins: Mapping[str, str] | None = None,
    ) -> None:
        """Commits what trials share like a round, in place of an earlier one.

        Raises:
            StoreError: Another driver was faster.
        """
        key = f"{folder}/shared.json"
        found = self.objects.get_version(key)
        committed = self._put_files(folder, files.items(), twins)
        record = SharedRecord(files=committed, origin=dict(origin), round=round_record)
        seen = None if found is None else found[1]
        if self.objects.put_if(key, seal_record(record), seen) is None:
            raise self._too_late(key)
        if seen is not None or any(file.stored_as for file in committed.values()):
            self._remove_unlisted(folder, "shared.json", committed)

    def write_trial(self, record: TrialRecord) -> None:
        """Commits a finished trial, whose rounds must be there, and tells the index.

        Raises:
            StoreError: The record cannot be written, or another one is there; the trial has then
                not finished, or as that one says.
        """
        # pyarrow takes a third of a second to import, and readers of one record do without.
        from gbp_ray.results.index import UNINDEXED, refresh_index

        self.objects.put(f"{UNINDEXED}{record.trial_id}", b"")
        folder = f"trials/{record.trial_id}"
        self._commit(f"{folder}/trial.json", record)
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


def locate_trial(uri: str | Path) -> tuple[Store, str]:
    """Find the one trial that an address is about, finished or not.

    Raises:
        StoreError: There is none, or there are several.
    """
    trials = locate_trials(uri)
    if len(trials) > 1:
        names = ", ".join(store.trial_uri(name) for store, name in trials[:9])
        raise StoreError(f"'{uri}': holds {len(trials)} trials; name one of {names}")
    return trials[0]


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
    store, name = locate_trial(f"{parts[1]}{parts[3] or ''}" if parts else uri)
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
        StoreError: The address is malformed.
    """
    text = str(uri)
    if text.startswith("s3://"):
        # boto3 takes a third of a second to import, and folders do without.
        from gbp_ray.results.s3 import S3Objects

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
