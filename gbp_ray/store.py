"""Every name and byte of a result: records, checksums, commit marks.

    <storage>/<job>/job.json                         whose folder this is
    <storage>/<job>/trials/<trial_id>/round_000/     the dense network; round_001 ... pruned ones
        weights.safetensors  masks.safetensors  state.pt  round.json
    <storage>/<job>/trials/<trial_id>/trial.json     the finished trial

A result exists when its record does: `round.json` is written after the files it lists with their
sizes and SHA-256, `trial.json` after all rounds. Each file is written under a temporary name,
flushed to disk and renamed, so a reader sees whole files or none. Files are bytes here; what is in
them is the business of the floors above.

Results are read with this module alone, without torch or Ray.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field, field_validator

from gbp_ray.config import SCHEMA_VERSION, JobConfig
from gbp_ray.errors import StoreError

__all__ = [
    "CostRecord",
    "FileRecord",
    "LayerRecord",
    "RoundRecord",
    "Store",
    "TrialRecord",
    "locate_trials",
]


class _Record(BaseModel):
    # "ignore": a reader of today opens the records of a later version that added fields.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


AnyRecord = TypeVar("AnyRecord", bound=_Record)


class LayerRecord(_Record):
    """One prunable parameter, measured from its weights."""

    name: str
    shape: tuple[int, ...]
    num_weights: int
    num_nonzero: int
    macs: int
    macs_nonzero: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Zero weights / weights."""
        return 1 - self.num_nonzero / self.num_weights


class CostRecord(_Record):
    """What a network costs: the whole model, and its prunable layers."""

    num_parameters: int
    num_nonzero: int
    macs: int
    macs_nonzero: int
    num_bytes: int
    num_bytes_sparse: int
    layers: tuple[LayerRecord, ...]

    @property
    def num_units(self) -> int:
        """Prunable weights."""
        return sum(layer.num_weights for layer in self.layers)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Zero weights / prunable weights."""
        return 1 - sum(layer.num_nonzero for layer in self.layers) / self.num_units

    @computed_field  # type: ignore[prop-decorator]
    @property
    def compression(self) -> float:
        """Parameters before / parameters left, whole model."""
        return self.num_parameters / max(1, self.num_nonzero)


class FileRecord(_Record):
    """A file's size and checksum, as committed."""

    num_bytes: int
    sha256: str


class RoundRecord(_Record):
    """One whole round; round 0 is the dense network.

    Accuracies are shares of the test split, losses means over it. `accuracy_pruned` is measured
    after the prune and the BatchNorm re-estimation, before any fine-tuning.
    """

    round: int
    sparsity_target: float
    accuracy: float
    loss: float
    accuracy_pruned: float | None = None
    loss_pruned: float | None = None
    train_loss: float | None = None
    cost: CostRecord
    mask_digest: str
    held_back: tuple[str, ...] = ()
    seconds: dict[str, float] = {}
    files: dict[str, FileRecord] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """As measured from the weights."""
        return self.cost.sparsity


class TrialRecord(_Record):
    """One finished trial, dense network first."""

    schema_version: int = SCHEMA_VERSION
    trial_id: str
    job: JobConfig
    rounds: tuple[RoundRecord, ...]
    seconds: float
    num_workers: int
    versions: dict[str, str] = {}

    @field_validator("job", mode="before")
    @classmethod
    def _drop_later_fields(cls, value: object) -> object:
        # A job file must not hold unknown keys, but a record of a later version may.
        return _known_fields(JobConfig, value)

    @property
    def dense(self) -> RoundRecord:
        """The network before the first prune."""
        return self.rounds[0]

    @property
    def final(self) -> RoundRecord:
        """The network after the last round."""
        return self.rounds[-1]


class Store:
    """The results of one job in one folder.

    Args:
        storage: Folder that holds jobs.
        name: The job.
    """

    def __init__(self, storage: str | Path, name: str) -> None:
        try:
            self.folder = Path(storage).expanduser().absolute() / name
        except RuntimeError:
            raise StoreError(
                f"storage = '{storage}': there is no such home folder; give a whole path"
            ) from None

    def claim(self, job: JobConfig) -> None:
        """Makes the folder this job's, or makes sure that it is.

        Trials of one workload that differ in anything else share a folder, each under its own id;
        another workload under the same name is another job.

        Raises:
            StoreError: The folder is another job's, is not ours, or cannot be written.
        """
        mark = self.folder / "job.json"
        factory = job.workload.factory
        if _exists(mark):
            found = _parse_json(mark).get("factory")
            if found != factory:
                raise StoreError(
                    f"storage: '{self.folder}' holds results of another job, whose "
                    f"workload.factory = '{found}'; choose another name or storage"
                )
            return
        # A claim that was killed leaves its temporary file.
        if any(not name.startswith(f".{mark.name}.") for name in _list_names(self.folder)):
            raise StoreError(
                f"storage: '{self.folder}' is not empty and not a results folder; choose another "
                "name or storage"
            )
        text = json.dumps({"schema_version": SCHEMA_VERSION, "factory": factory})
        self._write(mark, f"{text}\n".encode())

    def trial_folder(self, trial_id: str) -> Path:
        """Locates a trial."""
        return self.folder / "trials" / trial_id

    def round_folder(self, trial_id: str, number: int) -> Path:
        """Locates a round; its files are there once its record is."""
        return self.trial_folder(trial_id) / f"round_{number:03d}"

    def read_trial(self, trial_id: str) -> TrialRecord | None:
        """Reads a finished trial, or None where it has not finished."""
        path = self.trial_folder(trial_id) / "trial.json"
        return _parse_record(path, TrialRecord) if _exists(path) else None

    def read_rounds(self, trial_id: str) -> list[RoundRecord]:
        """Reads the whole rounds of a trial, from 0 up to the first that is missing."""
        records: list[RoundRecord] = []
        while _exists(path := self.round_folder(trial_id, len(records)) / "round.json"):
            records.append(_parse_record(path, RoundRecord))
        return records

    def read_file(self, trial_id: str, record: RoundRecord, name: str) -> bytes:
        """Reads a file of a committed round and checks it against the record.

        Raises:
            StoreError: The file is missing, cut short or altered.
        """
        path = self.round_folder(trial_id, record.round) / name
        committed = record.files.get(name)
        if committed is None:
            raise StoreError(f"'{path}': is not part of round {record.round}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"'{path}': cannot be read: {error.strerror}") from None
        if len(data) != committed.num_bytes:
            raise StoreError(
                f"'{path}': has {len(data)} bytes, {committed.num_bytes} were written; restore it "
                "or delete its round and those after it, and run the job again"
            )
        if hashlib.sha256(data).hexdigest() != committed.sha256:
            raise StoreError(
                f"'{path}': does not match its checksum; restore it or delete its round and those "
                "after it, and run the job again"
            )
        return data

    def write_round(
        self, trial_id: str, record: RoundRecord, files: Mapping[str, bytes]
    ) -> RoundRecord:
        """Commits a round: its files, then its record. Returns the record with the checksums.

        Raises:
            StoreError: The disk is full or the folder cannot be written; the round is then not
                there, and those before it are.
        """
        folder = self.round_folder(trial_id, record.round)
        with _as_store_error(folder):
            # A record left by an interrupted rewrite must not vouch for new files.
            (folder / "round.json").unlink(missing_ok=True)
        committed = {}
        for name, data in files.items():
            self._write(folder / name, data)
            digest = hashlib.sha256(data).hexdigest()
            committed[name] = FileRecord(num_bytes=len(data), sha256=digest)
        record = record.model_copy(update={"files": committed})
        self._write(folder / "round.json", _dump_record(record))
        return record

    def write_trial(self, record: TrialRecord) -> None:
        """Commits a finished trial, whose rounds must be there, and tidies its folder."""
        folder = self.trial_folder(record.trial_id)
        self._write(folder / "trial.json", _dump_record(record))
        # Writers that were killed have left their temporary files.
        for leftover in (*folder.glob(".*"), *folder.glob("round_*/.*")):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        with _as_store_error(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)
                Path(temporary).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink(missing_ok=True)
                raise


def locate_trials(uri: str | Path) -> list[tuple[Store, str]]:
    """Finds the trials under a trial's folder, a job's folder or a storage folder.

    Returns:
        (store, trial id) pairs in name order, finished or not.

    Raises:
        StoreError: There is no such folder, or it holds no trial.
    """
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
    if folder.parent.name == "trials":
        trials = [folder]
    elif (folder / "job.json").exists():
        trials = sorted((folder / "trials").glob("*"))
    else:
        trials = sorted(folder.glob("*/trials/*"))
    trials = [trial for trial in trials if (trial / "round_000" / "round.json").exists()]
    if not trials:
        raise StoreError(f"'{uri}': holds no results; run a job with this storage first")
    return [
        (Store(trial.parent.parent.parent, trial.parent.parent.name), trial.name)
        for trial in trials
    ]


@contextlib.contextmanager
def _as_store_error(path: Path, num_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(_explain_os_error(error, path, num_bytes)) from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise StoreError(f"'{path}': cannot be read: {error.strerror}") from None


def _list_names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names alone
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(
            f"storage: '{folder}' is not a folder that can be used: {error.strerror}; choose "
            "another name or storage"
        ) from None


def _known_fields(section: type[BaseModel], tree: object) -> object:
    if not isinstance(tree, dict):
        return tree
    known = {}
    for name, field in section.model_fields.items():
        if name in tree:
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                known[name] = _known_fields(inner, tree[name])
            else:
                known[name] = tree[name]
    return known


def _dump_record(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


def _parse_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"'{path}': cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StoreError(f"'{path}': is damaged: {error}") from None
    if not isinstance(value, dict):
        raise StoreError(f"'{path}': is damaged: not a JSON object")
    return value


def _parse_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    tree = _parse_json(path)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise StoreError(f"'{path}': is damaged: {where}: {fault['msg']}") from None


def _explain_os_error(error: OSError, path: Path, num_bytes: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free"
        return (
            f"storage: no room on disk for '{path}' ({num_bytes / 1e6:.1f} MB{free}); make room or "
            "choose another storage, and run the job again"
        )
    if error.errno == errno.ENOENT and path.parent.exists():
        return (
            f"storage: '{path}' vanished while it was written; is another process running this "
            "job? Run the job again when it has ended"
        )
    return (
        f"storage: cannot write '{path}': {error.strerror}; choose a storage folder you can write"
    )
