"""The index of a job's finished trials: one Parquet file, one row per round.

`index.parquet` holds what can be read again from the records: every measurement, every field of the
job under its dotted name, digests. It is sorted by trial and round, and pyarrow, pandas, DuckDB and
Polars read it as it is. Its metadata hold a SHA-256 of the file, taken with zeros in the checksum's
own place.

Scores are named by their metric. Where more than the accuracy was measured, `metric` names what
judged a round and `metric_specs` describes all metrics as JSON; both are null in other rounds.

A trial announces itself in `unindexed/<trial_id>` before its record is written, and whoever writes
an index with that trial in it removes the announcement afterwards. So a reader that first lists the
announcements and then reads the index misses nothing that had finished, in two requests, however
many trials there are. The index is replaced on condition that it is still the one that was read;
of two writers the slower one starts again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from gbp_ray.config.job import JobConfig
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.errors import StoreError
from gbp_ray.results.objects import Objects, is_key
from gbp_ray.results.records import RoundRecord, TrialRecord, read_record
from gbp_ray.results.scores import name_score, read_specs, write_specs

__all__ = [
    "INDEX",
    "UNINDEXED",
    "is_current",
    "is_sound",
    "map_in_threads",
    "name_measured",
    "read_index",
    "rebuild_index",
    "refresh_index",
    "specs_in",
    "stream_in_threads",
    "tabulate",
]

INDEX = "index.parquet"
UNINDEXED = "unindexed/"
_BYTES_PER_FINISH = 50_000
"""A big index waits until this much of it falls to each trial that it lacks."""

_CHECKSUM = re.compile(rb"gbp_ray-sha256-([0-9a-f]{64})")
_BLANK = b"gbp_ray-sha256-" + b"0" * 64

_FLOATS = (
    "sparsity_target",
    "score",
    "loss",
    "score_pruned",
    "loss_pruned",
    "score_recalibrated",
    "loss_recalibrated",
    "robust_accuracy",
    "train_loss",
    "train_score",
)

_TESTED = ("test_score", "test_loss")
"""Known of one round where rounds were judged by other examples, and of all where they were not."""

_COUNTS = ("num_parameters", "num_nonzero", "macs", "macs_nonzero", "num_bytes", "num_bytes_sparse")


def _make_schema(specs: Iterable[tuple[MetricSpec, ...]]) -> pa.Schema:
    """Makes the columns that an index has whatever its jobs, for what is measured in it."""
    specs = list(specs) or [(ACCURACY,)]
    judges = sorted({own[0].name for own in specs})
    others = sorted({other.name for own in specs for other in own[1:]})
    floats = [name_score(field, name) for field in (*_FLOATS, *_TESTED) for name in judges]
    floats += [name for other in others for name in (*_name_other(other), f"test_{other}")]
    return pa.schema(
        [
            ("trial_id", pa.string()),
            ("round", pa.int64()),
            ("is_final", pa.bool_()),
            ("sparsity", pa.float64()),
            *((name, pa.float64()) for name in dict.fromkeys(floats)),
            ("judged_on", pa.string()),
            ("is_chosen", pa.bool_()),
            ("compression", pa.float64()),
            *((name, pa.float64()) for name in ("macs_left", "parameters_left", "bytes_left")),
            ("num_units", pa.int64()),
            *((name, pa.int64()) for name in _COUNTS),
            ("mask_digest", pa.string()),
            ("weights_sha256", pa.string()),
            ("held_back", pa.string()),
            ("trial_seconds", pa.float64()),
        ]
    )


_TYPES = {pa.string(), pa.int64(), pa.float64(), pa.bool_()}
_TRIALS_PER_PART = 200


# A result may have been moved; its place and its sweep are not part of it.
_OUTSIDE = ("storage", "sweep")
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def read_index(objects: Objects) -> tuple[pa.Table, bool]:
    """Reads all finished trials of a job.

    Returns:
        The table, and whether the stored index lacks some of it.

    Raises:
        StoreError: The index or a record that it lacks is damaged.
    """
    announced = _announced(objects)
    table = read_stored(objects)
    if table is None or not is_current(table):
        return _tabulate_all(objects), True
    merged, found = _merge(table, _stream_trials(objects, list(filter(is_key, announced))))
    return merged, bool(found)


def refresh_index(objects: Objects, *, is_lazy: bool = False) -> None:
    """Brings the stored index up to date with the announced trials.

    Args:
        is_lazy: Waits with a big index until enough trials have been announced, so that a sweep
            does not rewrite all of it at every finish.

    Raises:
        StoreError: It cannot be written.
    """
    if is_lazy:
        num_announced = len(_announced(objects))
        size = sum(entry.num_bytes for entry in objects.entries(INDEX))
        if num_announced * _BYTES_PER_FINISH < size:
            return
    _write_index(objects, is_rebuild=False)


def rebuild_index(objects: Objects) -> int:
    """Write the index anew from the records; return the number of its trials.

    Raises:
        StoreError: A record is damaged, or the index cannot be written.
    """
    return _write_index(objects, is_rebuild=True)


def tabulate(records: Iterable[TrialRecord]) -> pa.Table:
    """Makes the index of some trials, sorted. Holds few of the records at a time."""
    parts: list[pa.Table] = []
    records = iter(records)
    while (part := list(itertools.islice(records, _TRIALS_PER_PART))) or not parts:
        parts.append(_tabulate(part))
    return _sort(_join(parts))


def _tabulate(records: Iterable[TrialRecord]) -> pa.Table:
    records = list(records)
    rows = [row for record in records for row in _rows_of(record)]
    schema = _make_schema({item.specs for record in records for item in record.rounds})
    names = sorted({name for row in rows for name in row} - set(schema.names))
    columns = {name: [row.get(name) for row in rows] for name in (*schema.names, *names)}
    arrays = [
        pa.array(values, schema.field(name).type) if name in schema.names else _infer(values)
        for name, values in columns.items()
    ]
    return pa.table(arrays, names=list(columns))


def specs_in(table: pa.Table) -> dict[str | None, tuple[MetricSpec, ...]]:
    """Reads the descriptions of all metrics that were measured, by their text in `metric_specs`."""
    if "metric_specs" not in table.column_names:
        return {None: (ACCURACY,)}
    return {text: read_specs(text) for text in pc.unique(table["metric_specs"]).to_pylist()}


def map_in_threads(
    objects: Objects, function: Callable[[Item], Outcome], items: Sequence[Item]
) -> list[Outcome]:
    """Applies a function that asks the storage, with `num_threads` calls at a time."""
    return list(stream_in_threads(objects, function, items))


def stream_in_threads(
    objects: Objects, function: Callable[[Item], Outcome], items: Sequence[Item]
) -> Iterator[Outcome]:
    """Yield the outcomes of `map_in_threads` one by one, holding few at a time."""
    if objects.num_threads == 1 or len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(objects.num_threads) as pool:
        for start in range(0, len(items), _TRIALS_PER_PART):
            yield from pool.map(function, items[start : start + _TRIALS_PER_PART])


def _announced(objects: Objects) -> list[str]:
    return [entry.key.removeprefix(UNINDEXED) for entry in objects.entries(UNINDEXED)]


def _write_index(objects: Objects, *, is_rebuild: bool) -> int:
    for _ in range(99):
        # In this order: a trial that is announced after the look is in a later index.
        found = objects.get_version(INDEX)
        announced = _announced(objects)
        table = None if is_rebuild or found is None else _parse(found[0])
        if table is None or not is_current(table):
            table, indexed = _tabulate_all(objects), None
        else:
            table, indexed = _merge(table, _stream_trials(objects, list(filter(is_key, announced))))
        if indexed is None:
            indexed = set(table["trial_id"].to_pylist())
        if objects.put_if(INDEX, _dump(table), None if found is None else found[1]) is not None:
            objects.delete([UNINDEXED + trial for trial in announced if trial in indexed])
            return len(pc.unique(table["trial_id"]))
    raise StoreError(
        f"storage: '{objects.uri_of(INDEX)}' is being written by many at once; run gbp-ray index "
        "later"
    )


def read_stored(objects: Objects) -> pa.Table | None:
    """Reads the index as it is stored, or returns None where there is none.

    Raises:
        StoreError: It is damaged, also when it is read again.
    """
    for _ in range(objects.num_reads):
        data = objects.get(INDEX)
        if data is None:
            return None
        if (table := _parse(data)) is not None:
            return table
    raise StoreError(
        f"'{objects.uri_of(INDEX)}': is damaged; gbp-ray index makes it anew from the records"
    )


def is_current(table: pa.Table) -> bool:
    """Check whether a stored index has all columns; one of an earlier version is made anew."""
    if not is_sound(table):
        return False
    wanted = {*_make_schema(specs_in(table).values()).names, *_job_columns()}
    return not len(table) or wanted <= set(table.column_names)


@cache
def _job_columns() -> frozenset[str]:
    """Names the columns of the fields that every job has."""
    prune = {"criterion": "magnitude", "sparsity": 0.5}
    job = {"name": "any", "workload": {"factory": "any:any"}, "prune": prune}
    return frozenset(_describe_job(JobConfig.model_validate(job)))


def _describe_job(job: JobConfig) -> dict[str, Any]:
    return flatten(job.model_dump(mode="json", exclude=set(_OUTSIDE)))


def is_sound(table: pa.Table) -> bool:
    """Check whether some version writes the columns that a stored index has."""
    names = table.column_names
    if len(set(names)) < len(names):
        return False
    try:
        own = _make_schema(specs_in(table).values())
    except ValidationError:
        return False
    return (
        all(table.schema.field(o.name).type == o.type for o in own if o.name in names)
        and {field.type for field in table.schema} <= _TYPES
    )


def _tabulate_all(objects: Objects) -> pa.Table:
    return tabulate(_stream_trials(objects, objects.list_folders("trials/")))


def _stream_trials(objects: Objects, trials: Sequence[str]) -> Iterator[TrialRecord]:
    def read(trial: str) -> TrialRecord | None:
        record = read_record(objects, f"trials/{trial}/trial.json", TrialRecord)
        if record is not None and record.trial_id != trial:
            uri = objects.uri_of(f"trials/{trial}/trial.json")
            raise StoreError(f"'{uri}': is damaged: trial_id is {record.trial_id}")
        return record

    return (record for record in stream_in_threads(objects, read, trials) if record is not None)


def _rows_of(record: TrialRecord) -> Iterable[dict[str, Any]]:
    shared = {
        **_describe_job(record.job),
        **{f"versions.{name}": text for name, text in record.versions.items()},
        "trial_id": record.trial_id,
        "trial_seconds": record.seconds,
    }
    for item in record.rounds:
        weights = item.files.get("weights.safetensors")
        yield {
            **shared,
            **{f"seconds.{name}": value for name, value in item.seconds.items()},
            **name_measured(item),
            **_tested(record, item),
            "judged_on": item.judged_on,
            "is_chosen": item is record.chosen,
            **{name: getattr(item.cost, name) for name in _COUNTS},
            "round": item.round,
            "is_final": item is record.final,
            "sparsity": item.sparsity,
            "compression": item.cost.compression,
            **item.cost.left,
            "num_units": item.cost.num_units,
            "mask_digest": item.mask_digest,
            "weights_sha256": None if weights is None else weights.sha256,
            "held_back": json.dumps(item.held_back),
        }


def name_measured(item: RoundRecord) -> dict[str, Any]:
    """Names what was measured in a round as its columns: metrics, losses, what they are."""
    name = item.metric.name
    row: dict[str, Any] = {name_score(field, name): getattr(item, field) for field in _FLOATS}
    for other in item.other_metrics:
        found = (item.metrics, item.metrics_pruned, item.metrics_recalibrated)
        values = (measured.get(other.name) for measured in found)
        row |= zip(_name_other(other.name), values, strict=True)
    if item.specs != (ACCURACY,):
        row |= {"metric": name, "metric_specs": write_specs(item.specs)}
    return row | {"metric_fault": item.metric_fault} if item.metric_fault else row


def _name_other(metric: str) -> tuple[str, str, str]:
    return metric, f"{metric}_pruned", f"{metric}_recalibrated"


def _tested(record: TrialRecord, item: RoundRecord) -> dict[str, float | None]:
    """Names what a round reached on the test split, as far as it was measured."""
    test = record.test
    found: tuple[float | None, float | None, dict[str, float]] = None, None, {}
    if test is None:
        found = item.score, item.loss, item.metrics
    elif item.round == test.round:
        found = test.score, test.loss, test.metrics
    elif item.round == 0:
        found = test.dense_score, test.dense_loss, test.dense_metrics
    score, loss, metrics = found
    others = {f"test_{other.name}": metrics.get(other.name) for other in item.other_metrics}
    return {name_score("test_score", item.metric.name): score, "test_loss": loss, **others}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names the fields of a nested table by dotted paths; lists become JSON text."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        elif not isinstance(value, dict):
            flat[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _infer(values: list[Any]) -> pa.Array:
    """Finds the type of a column of plain values; a mixed one becomes text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} and kinds and all(abs(value) < 2**63 for value in values if value):
        return pa.array(values, pa.int64())
    if kinds and kinds <= {int, float}:
        # A whole number may be too large for either.
        with contextlib.suppress(OverflowError):
            floats = [None if value is None else float(value) for value in values]
            return pa.array(floats, pa.float64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([_as_text(value) for value in values], pa.string())


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _merge(table: pa.Table, records: Iterable[TrialRecord]) -> tuple[pa.Table, set[str]]:
    """Adds trials to an index; one that is there is replaced. Says which were added."""
    new = tabulate(records)
    if not len(new):
        return table, set()
    kept = table.filter(pc.invert(pc.is_in(table["trial_id"], pc.unique(new["trial_id"]))))
    return _sort(_join([kept, new])), set(new["trial_id"].to_pylist())


def _join(tables: Sequence[pa.Table]) -> pa.Table:
    """Puts tables of trials under each other; a column that is there in several types is text."""
    if len(tables) == 1:
        return tables[0]
    specs = {own for table in tables if len(table) for own in specs_in(table).values()}
    if specs - {(ACCURACY,)}:
        # Else an index without rows would bring the columns of an accuracy.
        tables = [table for table in tables if len(table)]
    schema = _make_schema(specs)
    names = sorted({name for table in tables for name in table.column_names} - set(schema.names))
    columns = {}
    for name in (*schema.names, *names):
        parts = [_column(table, name) for table in tables]
        kinds = {part.type for part in parts if part.null_count < len(part)}
        if len(kinds) < 2:
            kind = kinds.pop() if kinds else pa.string()
            columns[name] = pa.chunked_array(
                [chunk for part in parts for chunk in _nulls_as(part, kind).chunks], kind
            )
        else:
            columns[name] = pa.chunked_array(
                [_infer([value for part in parts for value in _plain(part)])]
            )
    for name in schema.names:
        columns[name] = columns[name].cast(schema.field(name).type)
    return pa.table(columns)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name in table.column_names:
        return table[name]
    return pa.chunked_array([pa.nulls(len(table), pa.string())])


def _nulls_as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    return pa.chunked_array([pa.nulls(len(column), kind)])


def _plain(column: pa.ChunkedArray) -> list[Any]:
    return column.to_pylist()


def _sort(table: pa.Table) -> pa.Table:
    keys = [("trial_id", "ascending"), ("round", "ascending")]
    return table.sort_by(keys).combine_chunks() if len(table) else table


def _dump(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    # Without pyarrow's own copy of the schema, which would repeat the checksum.
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"checksum": _BLANK.decode()})
    data = buffer.getvalue()
    place = data.rindex(_BLANK)
    sealed = f"gbp_ray-sha256-{hashlib.sha256(data).hexdigest()}".encode()
    return data[:place] + sealed + data[place + len(_BLANK) :]


def _parse(data: bytes) -> pa.Table | None:
    """Reads an index, or tells by None that it is damaged."""
    seals = list(_CHECKSUM.finditer(data))
    if not seals:
        return None
    blank = data[: seals[-1].start()] + _BLANK + data[seals[-1].end() :]
    if hashlib.sha256(blank).hexdigest().encode() != seals[-1][1]:
        return None
    # Not read_table, which imports pandas where it is installed, for half a second. Nor threads:
    # pyarrow's, once started, now and then abort a process at its end where torch is, too.
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        return file.read(use_threads=False).replace_schema_metadata(None)
    except (pa.ArrowException, OSError, ValueError):
        return None
