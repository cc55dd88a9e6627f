"""The values of a metric on record, under its name: "accuracy_pruned", "dense_perplexity".

In Python the fields of records are called `score`, whatever the metric; in JSON and in the index
they bear its name. So records of an accuracy read as they always have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.errors import GbpError

__all__ = [
    "DenseReference",
    "Scored",
    "as_accuracy",
    "get_name",
    "name_score",
    "read_specs",
    "spec_of",
    "write_share",
    "write_specs",
]

_SPECS = TypeAdapter(tuple[MetricSpec, ...])
_STORED, _RECALIBRATED = "as stored", "with BatchNorm re-estimated"


write_share = ACCURACY.write
"""Writes a share in percent, and what cannot be one as a word; "" for None."""


def name_score(field: str, metric: str) -> str:
    """Return the key under which JSON and columns hold a field: "accuracy_pruned" and the like."""
    return field.replace("score", metric) if "score" in field.split("_") else field


def get_name(tree: dict[str, Any]) -> str:
    """Returns the name of the metric of a record that was not checked yet."""
    metric = tree.get("metric", ACCURACY)
    name = metric.get("name") if isinstance(metric, dict) else getattr(metric, "name", "")
    return str(name)


def read_specs(text: str | None) -> tuple[MetricSpec, ...]:
    """Reads what the index's `metric_specs` holds, the metric that judges first."""
    return _SPECS.validate_json(text) if text else (ACCURACY,)


def write_specs(specs: tuple[MetricSpec, ...]) -> str:
    """Writes metrics as `read_specs` reads them."""
    return _SPECS.dump_json(specs).decode()


def spec_of(row: Mapping[str, Any]) -> MetricSpec:
    """Reads what judged a round, from its row of the index."""
    return read_specs(row.get("metric_specs"))[0]


def as_accuracy(metric: MetricSpec, value: Any) -> Any:
    """Returns a score, where it is the accuracy.

    Raises:
        GbpError: It is of another metric.
    """
    if metric.name != ACCURACY.name:
        raise GbpError(
            f"accuracy: was not measured, rounds were judged by {metric.name}; read score"
        )
    return value


class DenseReference(NamedTuple):
    """The measurement of the dense network that pruned ones are compared with.

    After each prune BatchNorm's running statistics are re-estimated, but the dense network keeps
    those that it was trained or loaded with, which may be stale. So it is measured with both, and
    the better measurement counts: the one with the better score, of equals the one with the lesser
    loss, of equals the stored one. Otherwise what re-estimation gives would be taken for a gain of
    pruning.
    """

    score: float
    loss: float
    is_recalibrated: bool = False
    other_score: float | None = None
    metric: MetricSpec = ACCURACY

    @classmethod
    def of(
        cls,
        score: float,
        loss: float,
        score_recalibrated: float | None,
        loss_recalibrated: float | None,
        metric: MetricSpec = ACCURACY,
    ) -> DenseReference:
        """Chooses between what stored and re-estimated statistics gave, where both are known.

        Older records, and networks without such statistics, have only the first.
        """
        if score_recalibrated is None or loss_recalibrated is None:
            return cls(score, loss, metric=metric)
        stored = cls(score, loss, False, score_recalibrated, metric)
        other = cls(score_recalibrated, loss_recalibrated, True, score, metric)
        return max(stored, other, key=lambda one: (metric.rank(one.score), -one.loss))

    @property
    def accuracy(self) -> float:
        """The score, where it is the accuracy."""
        return as_accuracy(self.metric, self.score)

    @property
    def has_gap(self) -> bool:
        """Returns True if both measurements are shown, as they differ; see `MetricSpec.has_gap`."""
        return self.other_score is not None and self.metric.has_gap(self.score, self.other_score)

    @property
    def text(self) -> str:
        """Writes the score, how it was measured, and the other one where that differs."""
        how, other = (_RECALIBRATED, _STORED)[:: 1 if self.is_recalibrated else -1]
        write = self.metric.write
        if self.has_gap:
            return f"{write(self.score)} {how}; {other} {write(self.other_score)}"
        return write(self.score) + (f" {how}" if self.is_recalibrated else "")

    @property
    def name(self) -> str:
        """Name the dense network and how it was measured."""
        if self.has_gap:
            return f"dense at {self.text}"
        return f"dense {_RECALIBRATED}" if self.is_recalibrated else "dense"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the scores under the metric's name."""
        values = {key: value for key, value in self._asdict().items() if key != "metric"}
        return {name_score(key, self.metric.name): value for key, value in values.items()}


class Scored(BaseModel):
    """Values of a metric: in Python `score`, `score_pruned`; in JSON "accuracy", "accuracy_pruned".

    Where they are accuracies, attributes can be read by those names, too.

    Attributes:
        metric: What all scores are of; left out of JSON where it is the accuracy.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    metric: MetricSpec = ACCURACY

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Reads a score by the name that it has for the accuracy."""
            field = name.replace(ACCURACY.name, "score")
            if field != name and field in type(self).model_fields:
                return as_accuracy(self.metric, getattr(self, field))
            return super().__getattr__(name)

    @model_validator(mode="before")
    @classmethod
    def _read_names(cls, tree: Any) -> Any:
        return cls._read(tree) if isinstance(tree, dict) else tree

    @classmethod
    def _read(cls, tree: dict[str, Any]) -> dict[str, Any]:
        known = {name_score(field, get_name(tree)): field for field in cls.model_fields}
        return {known.get(key, key): value for key, value in tree.items()}

    @model_serializer(mode="wrap")
    def _write_names(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = self._shorten(write(self))
        return {name_score(key, self.metric.name): value for key, value in tree.items()}

    def _shorten(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Leaves out what goes without saying."""
        return {k: v for k, v in tree.items() if k != "metric" or self.metric != ACCURACY}
