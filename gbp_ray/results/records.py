"""The records: what is known of a job, a round and a trial, and how each is written.

A record is one JSON object whose last line is its checksum:

    {
     "round": 1,
     ...,
     "sha256": "<SHA-256, in hex, of all bytes before the comma above this line>"
    }

so that a flipped byte anywhere in it is noticed without asking anyone else. What is in the other
files of a round is decided elsewhere; a record holds their sizes and checksums.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    SerializerFunctionWrapHandler,
    ValidationError,
    computed_field,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from gbp_ray.config.job import SCHEMA_VERSION, JobConfig
from gbp_ray.config.metrics import LOSS, MetricSpec, find_constant
from gbp_ray.errors import GbpError, StoreError, printable
from gbp_ray.results.costs import (
    CostRecord,
    Count,
    LayerRecord,
    Record,
    UnitsRecord,
    WidthRecord,
    describe_unpruned,
    without_empty,
)
from gbp_ray.results.objects import Objects, is_key
from gbp_ray.results.scores import DenseReference, Scored, as_accuracy, get_name

__all__ = [
    "AnyRecord",
    "CostRecord",
    "FailureRecord",
    "FileRecord",
    "FinalTest",
    "JobRecord",
    "LayerRecord",
    "RoundRecord",
    "SharedRecord",
    "StopRecord",
    "TrialRecord",
    "UnitsRecord",
    "WidthRecord",
    "choose_round",
    "describe_unpruned",
    "dump_job",
    "locate_files",
    "parse_record",
    "read_record",
    "seal_record",
    "write_value",
]

_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _check_name(name: str) -> str:
    if not is_key(name):
        raise ValueError("must be the name of something inside its folder")
    return name


def _check_part(name: str) -> str:
    if "/" in name:
        raise ValueError("must be the name of something directly inside its folder")
    return _check_name(name)


Name = Annotated[str, AfterValidator(_check_name)]
"""Name of a file: one relative path, see `check_key`."""

Part = Annotated[str, AfterValidator(_check_part)]
"""Id of a trial: the same without "/"."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


class FileRecord(Record):
    """A file's size and checksum, as committed.

    Attributes:
        stored_as: The name that it has where its own was taken by other bytes, those of a driver
            that was killed or came too late; else "".
    """

    num_bytes: Count
    sha256: str
    stored_as: Name | Literal[""] = ""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value != ""}


def write_value(value: Any) -> str:
    """Writes the value of a field for people to read; nothing for one that is not set."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def locate_files(folder: str, files: Mapping[str, FileRecord]) -> dict[str, str]:
    """Returns the name of each file's object, from the folder and what its record holds."""
    return {name: f"{folder}/{file.stored_as or name}" for name, file in files.items()}


class RoundRecord(Scored, Record):
    """One whole round; round 0 is the dense network.

    Scores are values of the workload's first metric on the split in `judged_on`, losses means over
    it. `score_pruned` is measured after the prune and the BatchNorm re-estimation, before any
    fine-tuning; `robust_accuracy` is the share of attacked examples that stay right, where the job
    has an attack; `train_score` is measured on a fixed sample of the training split, not augmented.
    Where fine-tuning may stop early, `kept_step` says after how many steps the weights are that
    were kept. Round 0 has `score_recalibrated` and `loss_recalibrated` as well where its network
    has BatchNorm statistics and the job re-estimates them after pruning: with such statistics in
    place of the stored ones. Its `fingerprints` say what network and data it was made with.

    Attributes:
        other_metrics: What the workload measures beside `metric`.
        metrics: All metrics by name, at the end of the round; likewise `metrics_pruned` and
            `metrics_recalibrated`, which only hold something where there are other metrics.
        metric_fault: Of round 0, why its score tells nothing although it is possible, or "".
    """

    round: Count
    sparsity_target: float
    score: float
    loss: float
    score_pruned: float | None = None
    loss_pruned: float | None = None
    score_recalibrated: float | None = None
    loss_recalibrated: float | None = None
    robust_accuracy: float | None = None
    train_loss: float | None = None
    train_score: float | None = None
    judged_on: str = "test"
    kept_step: int | None = None
    cost: CostRecord
    mask_digest: str
    held_back: tuple[str, ...] = ()
    fingerprints: dict[str, str] = {}
    seconds: dict[str, float] = {}
    files: dict[Name, FileRecord] = {}
    other_metrics: tuple[MetricSpec, ...] = ()
    metrics: dict[str, float] = {}
    metrics_pruned: dict[str, float] = {}
    metrics_recalibrated: dict[str, float] = {}
    metric_fault: str = ""

    @classmethod
    def _read(cls, tree: dict[str, Any]) -> dict[str, Any]:
        tree = super()._read(tree)
        if not tree.get("metrics") and "score" in tree:
            tree["metrics"] = {get_name(tree): tree["score"]}
        return tree

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Zero weights / prunable weights, as measured."""
        return self.cost.sparsity

    @property
    def reached(self) -> str:
        """What pruning has come to, in words, see `CostRecord.reached`."""
        return self.cost.reached

    @property
    def reference(self) -> DenseReference:
        """The measurement of round 0 that later rounds are compared with."""
        return DenseReference.of(
            self.score, self.loss, self.score_recalibrated, self.loss_recalibrated, self.metric
        )

    def _shorten(self, tree: dict[str, Any]) -> dict[str, Any]:
        tree = super()._shorten(tree)
        if not self.other_metrics:
            del tree["metrics"]
        others = ("other_metrics", "metrics_pruned", "metrics_recalibrated", "metric_fault")
        return without_empty(tree, *others)

    @property
    def values(self) -> dict[str, float]:
        """All metrics by name, and the loss."""
        return {**self.metrics, LOSS.name: self.loss}

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """All metrics that were measured, the one that judges first."""
        return (self.metric, *self.other_metrics)


class FinalTest(Scored, Record):
    """The one use of the test split by a trial whose rounds were judged by other examples.

    Attributes:
        round: The one that was chosen, see `choose_round`.
        dense_score: Of round 0, measured at the same time.
        dense_score_recalibrated: Likewise, as `RoundRecord.score_recalibrated`.
        metrics: All metrics of the chosen round, where there are several.
        dense_metrics: Likewise of the dense network.
    """

    round: Count
    score: float
    loss: float
    dense_score: float
    dense_loss: float
    dense_score_recalibrated: float | None = None
    dense_loss_recalibrated: float | None = None
    metrics: dict[str, float] = {}
    dense_metrics: dict[str, float] = {}

    def _shorten(self, tree: dict[str, Any]) -> dict[str, Any]:
        return without_empty(super()._shorten(tree), "metrics", "dense_metrics")


class TrialRecord(Record):
    """One finished trial, dense network first.

    Attributes:
        test: Where rounds were judged by a validation split.
        sources: Of the user's own functions, by name, the SHA-256 of the file that each is in.
    """

    schema_version: int = SCHEMA_VERSION
    trial_id: Part
    job: JobConfig
    rounds: tuple[RoundRecord, ...]
    seconds: float
    num_workers: int | tuple[int, int]
    versions: dict[str, str] = {}
    test: FinalTest | None = None
    sources: dict[str, str] = {}

    def __repr__(self) -> str:
        return (
            f"<TrialRecord {self.trial_id}: {self.chosen.reached}, "
            f"{self.metric.name} {self.metric.write(self.test_score)}>"
        )

    @field_validator("job", mode="before")
    @classmethod
    def _drop_later_fields(cls, value: object) -> object:
        # A job file must not hold unknown keys, but a record of a later version may.
        return _known_fields(JobConfig, value)

    @model_validator(mode="after")
    def _check_rounds(self) -> TrialRecord:
        if [record.round for record in self.rounds] != list(range(len(self.rounds) or 1)):
            raise ValueError("rounds must be numbered from 0")
        _check_depth(self.job.workload.options)
        if self.test is not None and self.test.round >= len(self.rounds):
            raise ValueError("test must be of one of the rounds")
        return self

    @field_serializer("job")
    def _without_sweep(self, job: JobConfig) -> dict[str, Any]:
        # A trial is the same whichever sweep it was part of.
        return job.model_dump(mode="json", exclude={"sweep"})

    @property
    def dense(self) -> RoundRecord:
        """The network before the first prune."""
        return self.rounds[0]

    @property
    def final(self) -> RoundRecord:
        """The network after the last round."""
        return self.rounds[-1]

    @property
    def chosen(self) -> RoundRecord:
        """The network that the trial is for: that of the last round, or the one chosen."""
        return self.final if self.test is None else self.rounds[self.test.round]

    @property
    def metric(self) -> MetricSpec:
        """The metric that judged the rounds."""
        return self.dense.metric

    @property
    def test_score(self) -> float:
        """Score of the chosen round on the test split."""
        return self.final.score if self.test is None else self.test.score

    @property
    def test_accuracy(self) -> float:
        """The same, where it is the accuracy."""
        return as_accuracy(self.metric, self.test_score)

    @property
    def metric_fault(self) -> str:
        """The reason why the metric has no meaning for this trial, or ""."""
        tested = [] if self.test is None else [self.test.score, self.test.dense_score]
        return self.metric.find_fault([*(record.score for record in self.rounds), *tested])

    @property
    def metric_doubt(self) -> str:
        """The reason why the metric tells nothing here although it is possible, or "".

        The dense network is at chance level, or all measurements are the same.
        """
        found = [self.dense.score]
        for record in self.rounds[1:]:
            # Without fine-tuning both are one measurement.
            if record.score_pruned is not None and record.loss_pruned != record.loss:
                found.append(record.score_pruned)
            found.append(record.score)
        if self.dense.metric_fault or self.final.cost.num_kept == self.dense.cost.num_kept:
            return self.dense.metric_fault
        return find_constant(self.metric, found)

    @property
    def dense_reference(self) -> DenseReference:
        """The dense network that the chosen round is compared with, on the test split."""
        if (test := self.test) is None:
            return self.dense.reference
        return DenseReference.of(
            test.dense_score,
            test.dense_loss,
            test.dense_score_recalibrated,
            test.dense_loss_recalibrated,
            test.metric,
        )


def choose_round(rounds: Sequence[RoundRecord]) -> RoundRecord:
    """Chooses among the rounds that are as sparse as the last: the one with the best score.

    Of equals the one with the least loss, then the later. Rounds judged by the test split leave no
    choice: it must not be made by what it is reported on.
    """
    last = rounds[-1]
    if last.judged_on == "test":
        return last
    kept = last.cost.num_kept
    finished = [record for record in rounds if record.cost.num_kept == kept]
    return max(finished, key=lambda r: (r.metric.rank(r.score), -r.loss, r.round))


def dump_job(job: JobConfig) -> str:
    """Write a job as TOML for running it again, without its storage, sweep and cluster address."""
    outside: Any = {"storage": True, "sweep": True, "cluster": {"address"}}
    return tomli_w.dumps(
        job.model_dump(mode="json", exclude_defaults=True, exclude=outside, exclude_none=True)
    )


class FailureRecord(Record):
    """The cause of a failed trial of a sweep; the next sweep tries it again."""

    trial_id: Part
    cause: Annotated[str, AfterValidator(printable)]
    round: Count | None = None


class StopRecord(Record):
    """The round after which a scheduler stopped a trial; only "fifo" goes on with it."""

    trial_id: Part
    round: Count
    scheduler: Annotated[str, AfterValidator(printable)]


class SharedRecord(Record):
    """Files that several trials use, and what they were made from."""

    files: dict[Name, FileRecord]
    origin: dict[str, Any]
    round: RoundRecord | None = None

    @field_validator("origin")
    @classmethod
    def _check_origin(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_depth(value)
        return value


class JobRecord(Record):
    """The claim of a job on its folder."""

    schema_version: int = SCHEMA_VERSION
    factory: str


def seal_record(record: BaseModel) -> bytes:
    """Writes a record with its checksum."""
    body = record.model_dump_json(indent=1).removesuffix("\n}").encode()
    seal = f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'
    return body + seal.encode()


def read_record(objects: Objects, key: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """Reads a stored record and checks it, or returns None where there is none.

    Raises:
        StoreError: It is damaged, also when it is read again.
    """
    for attempt in range(objects.num_reads):
        data = objects.get(key)
        if data is None:
            return None
        try:
            return parse_record(data, kind, objects.uri_of(key))
        except StoreError:
            if attempt == objects.num_reads - 1:
                raise
    raise AssertionError("unreachable")


def parse_record(data: bytes, kind: type[AnyRecord], source: str) -> AnyRecord:
    """Reads a record and checks it.

    Args:
        source: What to call the record in an error.

    Raises:
        StoreError: It is cut short, altered, of another kind, or carries no checksum.
    """
    tree = _parse_sealed(data, source)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise StoreError(f"'{source}': is damaged: {where}: {fault['msg']}") from None
    except GbpError as error:
        raise StoreError(f"'{source}': is damaged: {error}") from None


def _parse_sealed(data: bytes, source: str) -> dict[str, Any]:
    seal = _SEAL.search(data)
    if seal is None:
        raise StoreError(
            f"'{source}': is damaged: it does not end with its checksum; restore it, or delete it "
            "and run the job again"
        )
    if hashlib.sha256(data[: seal.start()]).hexdigest().encode() != seal[1]:
        raise StoreError(
            f"'{source}': is damaged: it does not match its checksum; restore it, or delete it and "
            "run the job again"
        )
    try:
        tree = json.loads(data.decode())
        if _SURROGATE.search(data):
            # Half a character, which JSON can spell and nothing can write again.
            json.dumps(tree, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise StoreError(f"'{source}': is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise StoreError(f"'{source}': is damaged: not a JSON object")
    return tree


def _check_depth(value: object, most: int = 40) -> None:
    """Makes sure that tables and lists are not nested deeper than they can be written."""
    if most == 0:
        raise ValueError("tables and lists must not be nested that deep")
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, most - 1)


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
