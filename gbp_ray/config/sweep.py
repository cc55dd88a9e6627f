"""The section of a job for sweeps: the axes of its space, and the points that they span.

An axis is a field of the job by its dotted name, or several that vary together, and its values:

    [sweep.space]
    "prune.criterion" = ["magnitude", "fisher"]                    each of these
    "prune.sparsity" = { linear = [0.5, 0.9], num = 5 }            evenly spaced, ends included
    "finetune.epochs" = { log = [0.1, 10], num = 3 }               by equal factors
    "prune.rounds, finetune.epochs" = [[1, 10], [5, 2]]            two fields, pair by pair
    "finetune.learning_rate" = { loguniform = [0.001, 0.1] }       drawn; or uniform, or choice

The points are all combinations of the listed values, in the order of the file, the last axis
changing fastest. Each comes with `num_samples` draws of the drawn axes. Draw n of an axis depends
only on the job's seed, the axis's name and n: all combinations meet the same draws, another axis
changes none of them, and more samples only add to those before.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gbp_ray.config.schema import Section, plain, refuse

__all__ = [
    "Axis",
    "IsWhole",
    "SweepConfig",
    "TargetConfig",
    "first_values",
    "parse_space",
    "span",
]

_MOST_TRIALS = 100_000
_FARTHEST_END = 1e18
_RANGES = ("linear", "log", "uniform", "loguniform")
_KINDS = (*_RANGES, "choice")
IsWhole = Callable[[str], bool | None]
"""Checks whether a field takes whole numbers; None where its schema does not say."""


@dataclass(frozen=True)
class Axis:
    """One direction of the space.

    Attributes:
        fields: Dotted names of the fields that vary together, most often one.
        kind: "list", linear, log, uniform, loguniform or choice.
        given: The listed values, or (low, high) of a range; a tuple holds one per field.
        num: Number of values of a linear or log range.
    """

    fields: tuple[str, ...]
    kind: str
    given: tuple[tuple[Any, ...], ...]
    num: int = 1

    @property
    def is_drawn(self) -> bool:
        """Returns whether values are drawn instead of all taken."""
        return self.kind in ("uniform", "loguniform", "choice")

    def is_whole(self, is_whole: IsWhole) -> bool:
        """Returns whether a range gives whole numbers, by the field or else by both ends."""
        answer = is_whole(self.fields[0])
        ends = (self.given[0][0], self.given[-1][0])
        return all(isinstance(end, int) for end in ends) if answer is None else answer

    def points(self, is_whole: IsWhole) -> list[tuple[Any, ...]]:
        """Lists the values of an axis that is not drawn."""
        if self.kind == "list":
            return list(self.given)
        (low,), (high,) = self.given
        shares = [number / (self.num - 1) for number in range(self.num)]
        if self.kind == "log":
            values = [low * (high / low) ** share for share in shares]
        else:
            values = [low + (high - low) * share for share in shares]
        if self.is_whole(is_whole):
            return [(round(value),) for value in values]
        # 0.5 + 0.2 is not what anyone means by 0.7.
        return [(float(f"{value:.10g}"),) for value in values]

    def draw(self, seed: int, number: int, is_whole: IsWhole) -> tuple[Any, ...]:
        """Returns draw `number` of an axis that is drawn."""
        text = "\x1f".join((str(seed), ",".join(self.fields), str(number)))
        digest = hashlib.sha256(text.encode()).digest()
        share = int.from_bytes(digest[:8], "little") / 2**64
        if self.kind == "choice":
            return self.given[int(share * len(self.given))]
        (low,), (high,) = self.given
        if self.is_whole(is_whole):
            if self.kind == "loguniform":
                return (min(high, int(low * ((high + 1) / low) ** share)),)
            return (low + int(share * (high - low + 1)),)
        if self.kind == "loguniform":
            value = low * (high / low) ** share
        else:
            value = low + (high - low) * share
        return (float(f"{value:.6g}"),)


class TargetConfig(Section):
    """A search for the largest sparsity, by bisection, instead of a list of sparsities."""

    max_drop: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    """By how much sweep.metric may get worse than the dense network's of the same trial: of an
    accuracy a fraction, 0.01 is one point; else in the metric's own unit. Unset: no search."""
    max_relative_drop: float | None = Field(None, ge=0.0, lt=1.0)
    """The same as a fraction of the dense network's value: 0.01 allows a perplexity of 20 to rise
    to 20.2. Instead of max_drop."""
    lowest: float = Field(0.0, ge=0.0, lt=1.0)
    """Sparsity at which the search begins; 0 is the dense network and needs no trial."""
    highest: float = Field(0.99, gt=0.0, lt=1.0)
    """Sparsity at which it ends."""
    tolerance: float = Field(0.01, ge=1e-4, le=0.5)
    """Distance of neighbouring sparsities; the answer is exact to this."""

    @property
    def is_on(self) -> bool:
        """Returns True if there is a search."""
        return self.max_drop is not None or self.max_relative_drop is not None

    @model_validator(mode="after")
    def _is_interval(self) -> TargetConfig:
        if self.max_drop is not None and self.max_relative_drop is not None:
            raise ValueError("max_drop and max_relative_drop: are two targets; unset one of them")
        if self.highest - self.lowest < self.tolerance:
            raise ValueError(
                f"highest = {self.highest:g} is not tolerance = {self.tolerance:g} above lowest = "
                f"{self.lowest:g}; widen the stretch"
            )
        return self


class SweepConfig(Section):
    """Many trials of one job, for `gbp-ray sweep`; nothing here changes a trial's result."""

    space: dict[str, Any] = {}
    """Axes: a dotted field to a list, { linear = [lo, hi], num = n } or { log = ... }; or, drawn,
    to { uniform = [lo, hi] }, { loguniform = ... } or { choice = [...] }. "a, b" = [[1, 2], [3, 4]]
    varies two together."""
    num_samples: int = Field(1, ge=1, le=_MOST_TRIALS)
    """Draws of the drawn fields for each combination of the others; with optuna, all trials."""
    search: Literal["grid", "optuna"] = "grid"
    """Way to choose: "grid" takes all combinations, "optuna" learns from earlier trials."""
    metric: str | None = None
    """Metric of the target, the scheduler, of optuna and of "best so far": one that the workload
    names, or "loss". Unset: the workload's first, which is the accuracy unless it names others."""
    scheduler: Literal["fifo", "asha", "median"] = "fifo"
    """Early stopping of weak trials: never, by successive halving, or below the median.
    Only trials that walk the same sparsities are compared, at the same round."""
    grace_rounds: int = Field(1, ge=1, le=10_000)
    """Pruned rounds that every trial gets before it may be stopped."""
    recovery_rounds: int = Field(1, ge=1, le=10_000)
    """Fine-tunings after a prune, its own round's included, before a trial may be stopped."""
    reduction_factor: float = Field(3.0, gt=1.0, le=1e6)
    """For asha: of so many trials one goes on."""
    max_concurrent: int | None = Field(None, ge=1, le=_MOST_TRIALS)
    """Trials at a time; unset: as many as the cluster's CPUs or GPUs hold."""
    max_failures: int = Field(1, ge=0, le=10_000)
    """How often a trial that breaks is tried again before it becomes a row with its cause."""
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Loggers that receive every round; mlflow and wandb are extras."""
    target: TargetConfig = TargetConfig()

    @field_validator("space", mode="before")
    @classmethod
    def _is_flat(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError('must be a table of "dotted.field" = values')
        return _flatten(value)

    @field_validator("space")
    @classmethod
    def _has_axes(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Like options, the space travels as JSON.
        try:
            value = plain(value)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("must hold text, finite numbers, true or false, lists") from None
        parse_space(value)
        return value

    @model_validator(mode="after")
    def _agree(self) -> SweepConfig:
        axes = parse_space(self.space)
        has_target, is_drawn = self.target.is_on, self.search == "optuna"
        refuse(
            has_target
            and any("prune.sparsity" in axis.fields for axis in axes)
            and "space.prune.sparsity: the target finds the sparsity; leave it out, or unset the "
            "target",
            has_target
            and self.scheduler != "fifo"
            and f"scheduler = {self.scheduler}: would stop trials that the target needs whole; "
            "set fifo",
            has_target
            and self.search != "grid"
            and f"search = {self.search}: the target searches itself; set grid",
            is_drawn and not axes and "space: is empty, and optuna has nothing to choose",
            is_drawn
            and any(len(axis.fields) > 1 for axis in axes)
            and "search = optuna: chooses each field by itself; write them apart",
            is_drawn
            and any(isinstance(v, list | dict) for a in axes for row in a.given for v in row)
            and "search = optuna: chooses among text, numbers, true and false alone",
            is_drawn
            and self.scheduler == "median"
            and "scheduler = median: does not go with optuna; take asha or fifo",
        )
        return self


def parse_space(space: Mapping[str, Any]) -> list[Axis]:
    """Parses the axes of a flat space.

    Raises:
        ValueError: Some are not as the module describes; names all of them.
    """
    axes, faults = [], []
    seen: set[str] = set()
    for key, value in space.items():
        fields = tuple(field.strip() for field in key.split(","))
        for field in fields:
            if field in seen:
                faults.append(f"{field}: varies twice")
            seen.add(field)
            if field.split(".")[0] in ("name", "storage", "cluster", "sweep"):
                faults.append(f"{field}: does not change a result, so it cannot vary")
        try:
            axes.append(_parse_axis(fields, value))
        except ValueError as error:
            faults.append(f"{key}: {error}")
    refuse(*faults)
    return axes


def first_values(space: object) -> dict[str, Any]:
    """Returns each field's first value, as far as the space can be parsed."""
    values: dict[str, Any] = {}
    for key, value in _flatten(space).items() if isinstance(space, dict) else ():
        try:
            (axis,) = parse_space({key: value})
        except ValueError:
            continue
        values |= zip(axis.fields, axis.given[0], strict=True)
    return values


def span(sweep: SweepConfig, seed: int, is_whole: IsWhole) -> list[dict[str, Any]]:
    """Lists the points of a sweep, each as dotted field to value.

    Raises:
        ValueError: There are too many.
    """
    axes = parse_space(sweep.space)
    grid = [axis for axis in axes if not axis.is_drawn]
    drawn = [axis for axis in axes if axis.is_drawn]
    columns = [axis.points(is_whole) for axis in grid]
    num_samples = sweep.num_samples if drawn else 1
    num_trials = math.prod(map(len, columns)) * num_samples
    if num_trials > _MOST_TRIALS:
        raise ValueError(f"makes {num_trials:,} trials; {_MOST_TRIALS:,} are allowed")
    draws = [
        [(axis, axis.draw(seed, number, is_whole)) for axis in drawn]
        for number in range(num_samples)
    ]
    points = []
    for values in itertools.product(*columns):
        for sample in draws:
            pairs = [*zip(grid, values, strict=True), *sample]
            points.append(
                {k: v for axis, vs in pairs for k, v in zip(axis.fields, vs, strict=True)}
            )
    return points


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Joins nested tables to dotted keys, as TOML nests `prune.sparsity = ...` without quotes."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict) and value and not set(value) & set(_KINDS):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(tree, ""))


def _parse_axis(fields: tuple[str, ...], value: Any) -> Axis:
    if not all(fields):
        raise ValueError('must name a field, or several as "a, b"')
    if isinstance(value, list):
        return Axis(fields, "list", _as_rows(fields, value))
    if not isinstance(value, dict):
        raise ValueError(f"must be a list, or a table with one of {', '.join(_KINDS)}")
    kinds = [kind for kind in value if kind in _KINDS]
    if len(kinds) != 1:
        raise ValueError(f"must have one of {', '.join(_KINDS)}")
    kind, allowed = kinds[0], {kinds[0]}
    if kind == "choice":
        axis = Axis(fields, kind, _as_rows(fields, value[kind]))
    else:
        if kind in ("linear", "log"):
            allowed.add("num")
        axis = _parse_range(fields, kind, value[kind], value.get("num"))
    if unknown := [key for key in value if key not in allowed]:
        raise ValueError(f"'{unknown[0]}' does not go with {kind}")
    return axis


def _as_rows(fields: tuple[str, ...], values: Any) -> tuple[tuple[Any, ...], ...]:
    if not isinstance(values, list) or not values:
        raise ValueError("must list at least one value")
    if len(fields) == 1:
        return tuple((value,) for value in values)
    if any(not isinstance(row, list) or len(row) != len(fields) for row in values):
        raise ValueError(f"must list rows of {len(fields)} values, one for each field")
    return tuple(tuple(row) for row in values)


def _parse_range(fields: tuple[str, ...], kind: str, ends: Any, num: Any) -> Axis:
    if len(fields) > 1:
        raise ValueError("fields that vary together need a list of rows")
    is_pair = isinstance(ends, list) and len(ends) == 2
    if not is_pair or any(
        isinstance(end, bool) or not isinstance(end, int | float) for end in ends
    ):
        raise ValueError(f"{kind} must be [low, high]")
    low, high = ends
    if not all(abs(end) <= _FARTHEST_END for end in ends):
        raise ValueError(f"{kind}: low and high must lie within +-{_FARTHEST_END:g}")
    if not low < high:
        raise ValueError(f"{kind} = [{low}, {high}]: low must be below high")
    if kind in ("log", "loguniform") and low < 1 / _FARTHEST_END:
        raise ValueError(f"{kind} = [{low}, {high}]: low must be above 0")
    if kind not in ("linear", "log"):
        num = 1
    elif isinstance(num, bool) or not isinstance(num, int) or not 2 <= num <= _MOST_TRIALS:
        raise ValueError(f"{kind} needs num = 2 or more, how many values")
    return Axis(fields, kind, ((low,), (high,)), num)
