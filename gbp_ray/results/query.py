"""Results read back: which rounds there are, the best of them, and the records behind them.

    results = gbp_ray.open_results("s3://bucket/prefix/my-job")
    best = results.where("prune.criterion=taylor").best("accuracy@sparsity>=0.9")

A `Results` is a table with one row per round of each finished trial, read from the jobs' indexes;
neither Ray nor torch is needed, and no record is opened until it is asked for.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.config.schema import nearest_name
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.results.goals import GOAL_FIELDS, Goal, has_units
from gbp_ray.results.index import map_in_threads, read_index, refresh_index, specs_in
from gbp_ray.results.records import TrialRecord, write_value
from gbp_ray.results.scores import name_score, spec_of
from gbp_ray.results.store import Store, locate_jobs

__all__ = [
    "Results",
    "name_columns",
    "name_values",
    "open_results",
    "read_results",
    "summarize",
]

_CONDITION = re.compile(r"\s*([\w.-]+)\s*(>=|<=|!=|==|=|>|<)\s*(.*?)\s*")

_COMPARE = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    ">": pc.greater,
    "<": pc.less,
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}

_MOST_IS_BEST = ("robust_accuracy", "sparsity", "compression")
"""Columns whose greatest values are best, beside those of metrics, which have a direction."""

_NO_WORKLOAD = ("workload.eval_batch_size", "workload.train_sample")
"""Fields that do not make a workload another one."""


class Results:
    """Rounds of finished trials, with the jobs that they are from.

    Args:
        uri: What was opened, for messages.
        stores: The jobs by name.
        table: One row per round; the index's columns and `job`.
    """

    def __init__(self, uri: str, stores: dict[str, Store], table: pa.Table) -> None:
        self._uri, self._stores = uri, stores
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Metrics that rounds were judged by, one where all can be compared."""
        return tuple(dict.fromkeys(specs[0] for specs in specs_in(self.table).values()))

    def scores(self, field: str = "score") -> list[float | None]:
        """Lists a score of each round, such as "score_pruned", whatever its metric."""
        columns = {m.name: self.table[name_score(field, m.name)].to_pylist() for m in self.metrics}
        if len(columns) == 1:
            return next(iter(columns.values()))
        names = self.table["metric"].to_pylist()
        return [columns[name or ACCURACY.name][place] for place, name in enumerate(names)]

    @property
    def _num_trials(self) -> int:
        return len(self.table.group_by(["job", "trial_id"], use_threads=False).aggregate([]))

    def __repr__(self) -> str:
        return f"<Results of {self._uri}: {len(self)} rounds of {self._num_trials} trials>"

    def __iter__(self) -> Iterator[TrialRecord]:
        """Reads the records of the trials that these rounds are of, each once.

        Raises:
            StoreError: One is damaged, or has vanished since it was indexed.
        """
        pairs = zip(*(self.table[name].to_pylist() for name in ("job", "trial_id")), strict=True)
        for job, trial in dict.fromkeys(pairs):
            record = self._stores[job].read_trial(trial)
            if record is None:
                raise StoreError(
                    f"'{self._stores[job].trial_uri(trial)}': is in the index and not there; "
                    "gbp-ray index makes the index anew"
                )
            yield record

    def where(self, *conditions: str) -> Results:
        """Keeps the rounds that meet all conditions, such as "prune.criterion=taylor".

        A column is named in whole or by its last part where that is clear, a comparison is one of
        = != < <= > >=. Measured sparsities count as equal when they differ by less than a weight.

        Raises:
            ConfigError: There is no such column, or it cannot be compared with that.
        """
        table = self.table
        for condition in conditions:
            for part in condition.split(","):
                table = table.filter(self._mask(table, part))
        return Results(self._uri, self._stores, table)

    def ending_with(self, *conditions: str) -> Results:
        """Keeps the trials whose last round meets all conditions, with all their rounds.

        Raises:
            ConfigError: A condition cannot be read, as for `where`.
            StoreError: No trial is left.
        """
        if not conditions:
            return self
        kept = self.final().where(*conditions)
        if not len(kept):
            raise StoreError(f"'{self._uri}': no trial ends with {', '.join(conditions)}")

        def names(table: pa.Table) -> pa.ChunkedArray:
            return pc.binary_join_element_wise(table["job"], table["trial_id"], "/")

        rows = pc.is_in(names(self.table), value_set=names(kept.table).combine_chunks())
        return Results(self._uri, self._stores, self.table.filter(rows))

    def final(self) -> Results:
        """Keeps the last round of each trial."""
        return Results(self._uri, self._stores, self.table.filter(self.table["is_final"]))

    def chosen(self) -> Results:
        """Keeps the round that each trial is for: the last, or of a validation split the best."""
        return Results(self._uri, self._stores, self.table.filter(self.table["is_chosen"]))

    def of_trials(self, trial_ids: Iterable[str]) -> Results:
        """Keeps the rounds of these trials."""
        wanted = pa.array(list(trial_ids), pa.string())
        table = self.table.filter(pc.is_in(self.table["trial_id"], wanted))
        return Results(self._uri, self._stores, table)

    def best(self, wanted: str) -> dict[str, Any]:
        """Finds the best round, as "accuracy@sparsity>=0.9", "perplexity" or "loss" asks.

        Args:
            wanted: A metric, and after "@" conditions as for `where`.

        Returns:
            Its row, as `to_rows` gives it; of equals the first by trial and round.

        Raises:
            ConfigError: There is no such metric, a condition is wrong, or rounds of several
                workloads or metrics meet them, see `by_workload`.
            StoreError: No round meets the conditions.
        """
        metric, _, condition = wanted.partition("@")
        metric = self._column(metric.strip())
        met = self.where(condition) if condition else self
        if len(parts := met.by_workload()) > 1:
            names = "; ".join(title for title, _ in parts[:5])
            raise ConfigError(
                f"'{self._uri}': {len(parts)} workloads have such rounds, which cannot be ranked "
                f"together ({names}); add a condition, such as job={parts[0][1].table['job'][0]}"
            )
        ranked = met.sort(metric)
        if len(ranked) and ranked.table[metric][0].as_py() is None:
            raise StoreError(
                f"'{self._uri}': none of the {len(ranked)} rounds that are meant has a {metric}; "
                "gbp-ray results shows what they were judged by"
            )
        if not len(ranked):
            raise StoreError(
                f"'{self._uri}': none of {len(self)} rounds has {condition or metric}"
                f"{_nearest_miss(self.table, condition)}"
            )
        if (spec := self._spec_of(metric)) is not None:
            # Where all are 0, others may tell whether that has a meaning.
            judged = ranked.table if ranked.table[metric][0].as_py() else self.table
            values = [value for value in judged[metric].to_pylist() if value is not None]
            if fault := spec.find_fault(values):
                raise StoreError(f"'{self._uri}': none is best: {fault}; ask for loss")
        return ranked.head(1).to_rows()[0]

    def by_workload(self) -> list[tuple[str, Results]]:
        """Parts rounds that cannot be ranked together: of other data, split or metric.

        Trials of one job are of one workload, whatever options its sweep varies; of several jobs
        those are whose workload sections agree.

        Returns:
            (What tells these rounds from the others, the rounds), in the order of the first.
        """
        is_one_job = len(pc.unique(self.table["job"])) < 2
        fields = ["workload.validation"] if is_one_job else self.find_varying()
        names = [n for n in fields if n.startswith("workload.") and n not in _NO_WORKLOAD]
        names = [n for n in ("judged_on", "metric", *names) if n in self.table.column_names]
        keys = list(zip(*(self.table[name].to_pylist() for name in names), strict=True))
        places: dict[tuple[Any, ...], list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        if len(places) < 2:
            return [("", self)]
        parts = []
        for key, own in places.items():
            table = self.table.take(own)
            named = dict(zip(names, key, strict=True)) | {
                "workload.factory": table["workload.factory"][0].as_py()
            }
            title = [str(named.pop("workload.factory"))]
            for place, name in enumerate(names):
                if name in ("judged_on", "metric") and len({key[place] for key in places}) == 1:
                    del named[name]
            title += name_values(named)
            parts.append((", ".join(title), Results(self._uri, self._stores, table)))
        return parts

    def sort(self, column: str) -> Results:
        """Puts the best first: the greatest accuracies, the least errors; other columns ascend.

        Raises:
            ConfigError: There is no such column.
        """
        name = self._column(column)
        spec = self._spec_of(name)
        is_most = name in _MOST_IS_BEST if spec is None else spec.higher_is_better
        order = "descending" if is_most else "ascending"
        keys = [(name, order), ("job", "ascending"), ("trial_id", "ascending")]
        keys.append(("round", "ascending"))
        # Not sort_by, which starts threads; see read_stored.
        table = self.table.take(pc.sort_indices(self.table, sort_keys=keys))
        return Results(self._uri, self._stores, table)

    def head(self, num_rows: int) -> Results:
        """Keeps the first rounds."""
        return Results(self._uri, self._stores, self.table.slice(0, num_rows))

    def to_rows(self, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """Lists the rounds as plain values, each with the `uri` of its weights and masks.

        Args:
            columns: Only these.
        """
        rows: list[dict[str, Any]] = self.table.select(
            columns or self.table.column_names
        ).to_pylist()
        if columns is None:
            for row in rows:
                row["uri"] = self._stores[row["job"]].round_uri(row["trial_id"], row["round"])
        return rows

    def find_varying(self) -> list[str]:
        """Names the job's fields in which these rounds differ, criterion and goal first."""
        first = ["prune.criterion", *GOAL_FIELDS]
        skipped = ("seconds.", "versions.")
        fields = [
            name
            for name in self.table.column_names
            if ("." in name or name == "seed") and not name.startswith(skipped)
        ]
        varying = [name for name in fields if len(pc.unique(self.table[name])) > 1]
        return sorted(varying, key=lambda name: (name not in first, varying.index(name)))

    def _spec_of(self, column: str) -> MetricSpec | None:
        """Finds the metric that a column holds values of.

        Raises:
            ConfigError: The column holds several, of which other values are best.
        """
        found = dict.fromkeys(
            spec
            for specs in specs_in(self.table).values()
            for place, spec in enumerate(specs)
            if column in name_columns(spec.name, is_first=place == 0)
        )
        if len({spec.higher_is_better for spec in found}) > 1:
            raise ConfigError(
                f"'{self._uri}': {column} is best where it is highest in some workloads and where "
                "it is lowest in others; add a condition, such as job=NAME"
            )
        if column == "robust_accuracy":
            return ACCURACY
        return next(iter(found), None)

    def _column(self, name: str) -> str:
        names = self.table.column_names
        if name in names:
            return name
        ends = [other for other in names if other.endswith(f".{name}")]
        if len(ends) == 1:
            return ends[0]
        hint = f" (it may be {', '.join(ends)})" if ends else nearest_name(name, names)
        raise ConfigError(f"column '{name}': there is no such one{hint}")

    def _mask(self, table: pa.Table, condition: str) -> pa.ChunkedArray:
        parts = _CONDITION.fullmatch(condition)
        if parts is None:
            raise ConfigError(
                f"condition '{condition}': must read COLUMN, one of = != < <= > >=, and a value, "
                "such as sparsity>=0.9"
            )
        name, sign, text = self._column(parts[1]), parts[2], parts[3]
        column = table[name]
        value = _as_value(column.type, text, condition)
        if name == "sparsity" and sign in (">=", "<=", "="):
            # 90 % of 128 weights are 115 whole ones: what comes within a weight of it is 90 %.
            within = pc.less(
                pc.abs(pc.subtract(column, value)),
                pc.divide(1.0, table["num_units"].cast("double")),
            )
            return pc.or_(within, _COMPARE[sign](column, value))
        return _COMPARE[sign](column, value)


def open_results(uri: str | Path) -> Results:
    """Opens the finished trials of a storage, a job or one trial, on a folder or under `s3://`.

    An index that lacks some trials is completed, and written where that is allowed.

    Raises:
        StoreError: There is no such place, no finished trial in it, or its index is damaged.
    """
    return read_results(uri, *locate_jobs(uri))


def read_results(uri: str | Path, stores: list[Store], trial: str | None) -> Results:
    """Open results of jobs that were located before.

    Args:
        uri: For messages.
        stores: The jobs, as `locate_jobs` finds them.
        trial: The only trial of interest, or None.
    """
    if not stores:
        raise StoreError(f"'{uri}': holds no results; run a job with this storage first")
    tables = map_in_threads(stores[0].objects, _read, stores)
    if trial is not None:
        tables = [table.filter(pc.equal(table["trial_id"], trial)) for table in tables]
    tables = [
        table.add_column(0, "job", pa.array([store.name] * len(table), pa.string()))
        for store, table in zip(stores, tables, strict=True)
        if len(table)
    ]
    if not tables:
        raise StoreError(
            f"'{uri}': holds no finished trial; gbp-ray show tells what there is of others"
        )
    return Results(str(uri), {store.name: store for store in stores}, _stack(tables))


def name_values(values: dict[str, Any]) -> list[str]:
    """Names fields with their values; one that a job does not have needs no word."""
    return [
        f"{_short(name, list(values))} {write_value(value)}"
        for name, value in values.items()
        if value is not None
    ]


def _short(name: str, others: Sequence[str]) -> str:
    last = name.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in others].count(last) == 1 else name


def _read(store: Store) -> pa.Table:
    table, is_stale = read_index(store.objects)
    if is_stale and len(table):
        # A courtesy to the next reader; many may read and not write.
        with contextlib.suppress(StoreError):
            refresh_index(store.objects)
    return table


def _stack(tables: list[pa.Table]) -> pa.Table:
    if len(tables) == 1:
        return tables[0]
    types: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            types.setdefault(field.name, set()).add(field.type)
    kinds = {name: found.pop() if len(found) == 1 else pa.string() for name, found in types.items()}
    return pa.concat_tables(
        [
            pa.table({name: table[name].cast(kinds[name]) for name in table.column_names})
            for table in tables
        ],
        promote_options="default",
    )


def _as_value(kind: pa.DataType, text: str, condition: str) -> Any:
    if pa.types.is_string(kind):
        return text.strip("'\"")
    if pa.types.is_boolean(kind):
        if text in ("true", "false"):
            return text == "true"
        raise ConfigError(f"condition '{condition}': must compare with true or false")
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"condition '{condition}': must compare with a number") from None


def _nearest_miss(table: pa.Table, condition: str) -> str:
    parts = _CONDITION.fullmatch(condition)
    if (
        parts is None
        or parts[1] not in table.column_names
        or parts[2] not in (">=", ">", "<=", "<")
    ):
        return ""
    is_floor = parts[2].startswith(">")
    extreme = (pc.max if is_floor else pc.min)(table[parts[1]]).as_py()
    if not isinstance(extreme, int | float):
        return ""
    return f"; the {'greatest' if is_floor else 'least'} {parts[1]} is {extreme:.4g}"


def name_columns(metric: str, *, is_first: bool = True) -> list[str]:
    """Names the columns that hold values of a metric, of the first one or of another."""
    fields = ["score", "test_score", "score_pruned", "score_recalibrated"]
    fields += ["train_score"] if is_first else []
    return [name_score(field, metric) for field in fields]


_MEASURED = (
    "score",
    "test_score",
    "train_score",
    "loss",
    "sparsity",
    "macs_nonzero",
    "num_nonzero",
)

_MEASURED_BY_SOME = ("robust_accuracy",)
_MEASURED_OF_UNITS = ("macs_left", "parameters_left", "bytes_left")


def summarize(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Summarize the rows of trials that differ only in the seed.

    Args:
        rows: The last round of each trial, as `Results.to_rows` gives them.
        fields: The dotted fields in which the trials differ; the seed among them is passed over.

    Returns:
        One row per combination: its fields, `num_seeds`, and of each measurement the mean and,
        as `..._deviation`, the sample standard deviation, None for a single trial. What only some
        jobs measure is there if any of these trials has it, None where not all have. Sorted by
        sparsity, or by the `goal` that lines of whole units have, then by score, the best first;
        trials of different metrics are kept apart.
    """
    rows = list(rows)
    specs = dict.fromkeys(spec_of(row).name for row in rows) or {ACCURACY.name: None}
    measured = list(dict.fromkeys(name_score(n, metric) for n in _MEASURED for metric in specs))
    measured += [n for n in _MEASURED_BY_SOME if any(row.get(n) is not None for row in rows)]
    measured += _MEASURED_OF_UNITS if any(map(has_units, rows)) else ()
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    kept = [field for field in fields if field != "seed"]
    for row in rows:
        key = (spec_of(row).name, *(repr(row[field]) for field in kept))
        groups.setdefault(key, []).append(row)
    lines = []
    for members in groups.values():
        line: dict[str, Any] = {field: members[0][field] for field in kept}
        line["num_seeds"] = len(members)
        for name in measured:
            values = [row[name] for row in members if row.get(name) is not None]
            is_whole = len(values) == len(members)
            line[name] = statistics.fmean(values) if is_whole else None
            has_spread = is_whole and len(values) > 1 and all(map(math.isfinite, values))
            line[f"{name}_deviation"] = statistics.stdev(values) if has_spread else None
        line["judged_on"] = members[0].get("judged_on", "test")
        if (text := members[0].get("metric_specs")) is not None:
            line["metric_specs"] = text
        if has_units(members[0]):
            line["goal"] = Goal.of(members[0])._asdict()
        lines.append(line)

    def place(line: Mapping[str, Any]) -> tuple[int, str, float, float]:
        spec = spec_of(line)
        # Measured sparsities of equal jobs may differ by a weight.
        kind, depth = "", round(line["sparsity"], 3)
        if (goal := line.get("goal")) is not None:
            kind, depth = goal["kind"], Goal(**goal).depth
        return [*specs].index(spec.name), kind, depth, -spec.rank(line[spec.name])

    return sorted(lines, key=place)
